"""The writing loop: prompts in, one token a text and step out, with what was read for each chunk."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_retro import distributed, mcore
from megatron_retro.inference.cached import Arrivals, CachedModel
from megatron_retro.inference.reader import Reader
from megatron_retro.inference.sampling import choose
from megatron_retro.model.model import RetroModel


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the next token is chosen, see `sampling.choose`; a text's tokens depend on (seed, its number) alone."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 1234


@dataclasses.dataclass
class Event:
    """Something that happened to a text.

    Attributes:
        text: its number.
        token: one that was written, or None.
        chunk: number of the chunk whose neighbors were found, or None.
        ids, distances: [K] of that chunk's neighbors.
        finish: "stop" behind the end of the document, "length" behind the last token asked for, or None.
    """

    text: int
    token: int | None = None
    chunk: int | None = None
    ids: np.ndarray | None = None
    distances: np.ndarray | None = None
    finish: str | None = None


@dataclasses.dataclass
class Text:
    """A text that is written on.

    Attributes:
        number: names it in events.
        tokens: the prompt's at first, at least one; then what is written as well.
        choice: how its tokens are chosen.
        place: with the choice's seed decides its random numbers.
        max_new_tokens: when it ends at the latest.
        reader: finds its neighbors; None turns retrieval off for it.
        is_cancelled: set it, and the text leaves before the next step.
    """

    number: int
    tokens: list[int]
    choice: Choice
    place: int
    max_new_tokens: int
    reader: Reader | None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.begin = 0  # where the window that the model sees begins, at a chunk's edge
        self.neighbors: dict[int, tuple[Tensor, Tensor]] = {}  # chunk -> tokens, lengths


class Writer:
    """Writes on from prompts; every rank calls it alike, and all get the same events.

    Texts longer than the model's context go on in a window: the model sees their last half context, and more as it
    grows.

    Args:
        model: in evaluation mode.
        chunk_length: C.
        context: positions that the model was made for, a multiple of C.
        vocab_size: the tokenizer's; padded ids are never chosen.
        eod: id that ends a document.
        pad: id that is never chosen either, unless it is `eod`.
        reader: None turns retrieval off.
        num_neighbors: K, 0 with retrieval off.

    Attributes:
        chunk_length: C.
        num_neighbors: K.
    """

    def __init__(
        self,
        model: RetroModel,
        *,
        chunk_length: int,
        context: int,
        vocab_size: int,
        eod: int,
        pad: int,
        reader: Reader | None,
        num_neighbors: int,
    ):
        self._model, self.chunk_length, self._context = model, chunk_length, context
        self._vocab_size, self._eod, self._pad = vocab_size, eod, pad
        self._reader, self.num_neighbors = reader, num_neighbors if reader else 0
        self.model_seconds = 0.0

    @property
    def reading_seconds(self) -> float:
        return self._reader.seconds if self._reader else 0.0

    def write(self, prompts: list[list[int]], choice: Choice, max_new_tokens: int) -> Iterator[Event]:
        """Events, as they happen, until every text is finished.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: of each text.
        """
        texts = [
            Text(number, list(prompt), choice, number, max_new_tokens, self._reader)
            for number, prompt in enumerate(prompts)
        ]
        batches = iter([texts])
        yield from self.write_texts(lambda: next(batches, []))

    def write_texts(self, arriving: Callable[[], list[Text]]) -> Iterator[Event]:
        """Events of texts that come and go, until there is none.

        Args:
            arriving: called before every step; gives the texts that join.
        """
        texts: list[Text] = []
        cached: CachedModel | None = None
        while True:
            texts, cached = _keep(texts, cached, [row for row, text in enumerate(texts) if not text.is_cancelled])
            arrived = arriving()
            if not texts and not arrived:
                return
            if cached is None or max(len(text.tokens) - text.begin for text in texts) > self._context:
                texts = texts + arrived
                cached, logits = yield from self._begin(texts)
            else:
                logits = yield from self._step(cached, texts)
                if arrived:
                    joining, more = yield from self._begin(arrived)
                    cached.join(joining)
                    texts = texts + arrived
                    logits = torch.cat([logits, more]) if logits is not None and more is not None else None
            running = []
            for row, token in enumerate(self._choose(logits, texts)):
                text = texts[row]
                text.tokens.append(token)
                finish = None
                if token == self._eod:
                    finish = "stop"
                elif len(text.tokens) - text.num_prompt == text.max_new_tokens:
                    finish = "length"
                else:
                    running.append(row)
                yield Event(text.number, token=token, finish=finish)
            texts, cached = _keep(texts, cached, running)

    def _begin(self, texts: list[Text]) -> Generator[Event, None, tuple[CachedModel, Tensor | None]]:
        """Show the model all that it may see of the texts."""
        length, device = self.chunk_length, mcore.device()
        for text in texts:
            if len(text.tokens) - text.begin > self._context:
                text.begin = -(-(len(text.tokens) - self._context // 2) // length) * length
        yield from self._read(texts)
        windows = [text.tokens[text.begin :] for text in texts]
        num_chunks = max(-(-len(window) // length) for window in windows)
        tokens = torch.zeros(len(texts), num_chunks * length, dtype=torch.int64)
        for row, window in enumerate(windows):
            tokens[row, : len(window)] = torch.tensor(window)
        neighbor_tokens = neighbor_lengths = None
        if self.num_neighbors:
            shape = (len(texts), num_chunks, self.num_neighbors)
            neighbor_tokens = torch.zeros(*shape, 2 * length, dtype=torch.int64, device=device)
            neighbor_lengths = torch.zeros(shape, dtype=torch.int64, device=device)
            for row, text in enumerate(texts):
                first = text.begin // length
                for chunk, (found, lengths) in text.neighbors.items():
                    if chunk >= first:
                        neighbor_tokens[row, chunk - first], neighbor_lengths[row, chunk - first] = found, lengths
        start = time.perf_counter()
        cached = CachedModel(self._model, len(texts), self._context, self.num_neighbors)
        sizes = torch.tensor([len(window) for window in windows], device=device)
        logits = cached.begin(tokens.to(device), sizes, neighbor_tokens, neighbor_lengths)
        self.model_seconds += time.perf_counter() - start
        return cached, logits

    def _step(self, cached: CachedModel, texts: list[Text]) -> Generator[Event, None, Tensor | None]:
        """Show the model the last token of each text."""
        device = mcore.device()
        yield from self._read(texts)
        arrivals = None
        length = self.chunk_length
        last = {row: len(text.tokens) // length - 1 for row, text in enumerate(texts) if len(text.tokens) % length == 0}
        completing = [row for row, chunk in last.items() if chunk in texts[row].neighbors]
        if completing:
            found = [texts[row].neighbors[last[row]] for row in completing]
            arrivals = Arrivals(
                torch.tensor(completing, device=device),
                torch.stack([tokens for tokens, _ in found]),
                torch.stack([lengths for _, lengths in found]),
            )
        start = time.perf_counter()
        logits = cached.step(torch.tensor([text.tokens[-1] for text in texts], device=device), arrivals)
        self.model_seconds += time.perf_counter() - start
        return logits

    def _read(self, texts: list[Text]) -> Iterator[Event]:
        """Find the neighbors of chunks in the window that are complete and have none yet."""
        length = self.chunk_length
        wanted: dict[Reader, list[tuple[Text, int]]] = {}
        for text in texts:
            for chunk in range(text.begin // length, len(text.tokens) // length):
                if text.reader and chunk not in text.neighbors:
                    wanted.setdefault(text.reader, []).append((text, chunk))
        for reader, chunks in wanted.items():
            reads = reader.read([text.tokens[chunk * length : (chunk + 1) * length] for text, chunk in chunks])
            for row, (text, chunk) in enumerate(chunks):
                text.neighbors[chunk] = (reads.tokens_nxKxR[row], reads.lengths_nxK[row])
                yield Event(text.number, chunk=chunk, ids=reads.ids_nxK[row], distances=reads.distances_nxK[row])

    def _choose(self, logits: Tensor | None, texts: list[Text]) -> list[int]:
        """The next token of each text: chosen on the last rank, told to all."""
        start = time.perf_counter()
        tokens = torch.empty(len(texts), dtype=torch.int64, device=mcore.device())
        last = distributed.world_size() - 1
        if distributed.rank() == last:
            assert logits is not None
            logits = logits[:, : self._vocab_size].clone()
            if self._pad != self._eod:
                logits[:, self._pad] = -torch.inf
            for choice in {dataclasses.replace(text.choice, seed=0) for text in texts}:
                rows = [row for row, text in enumerate(texts) if dataclasses.replace(text.choice, seed=0) == choice]
                draws = np.array([_draw(texts[row]) for row in rows])
                tokens[rows] = choose(
                    logits[rows], draws, temperature=choice.temperature, top_k=choice.top_k, top_p=choice.top_p
                )
        if distributed.world_size() > 1:
            dist.broadcast(tokens, src=last)
        chosen = tokens.tolist()
        self.model_seconds += time.perf_counter() - start
        return chosen


def _draw(text: Text) -> float:
    return np.random.default_rng((text.choice.seed, text.place, len(text.tokens) - text.num_prompt)).random()


def _keep(texts: list[Text], cached: CachedModel | None, rows: list[int]) -> tuple[list[Text], CachedModel | None]:
    """The texts of these rows, and their part of what is cached."""
    if len(rows) == len(texts):
        return texts, cached
    if cached is not None and rows:
        cached.keep(torch.tensor(rows, dtype=torch.int64, device=mcore.device()))
    return [texts[row] for row in rows], cached if rows else None
