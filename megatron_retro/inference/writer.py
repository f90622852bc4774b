"""The writing loop: prompts in, one token a text and step out, with what was read for each chunk."""

import dataclasses
import time
from collections.abc import Generator, Iterator

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
class _Text:
    number: int
    tokens: list[int]
    num_prompt: int
    begin: int = 0  # where the window that the model sees begins, at a chunk's edge
    neighbors: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)  # chunk -> tokens, lengths


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
        self._model, self._chunk_length, self._context = model, chunk_length, context
        self._vocab_size, self._eod, self._pad = vocab_size, eod, pad
        self._reader, self._num_neighbors = reader, num_neighbors if reader else 0
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
        texts = [_Text(number, list(prompt), len(prompt)) for number, prompt in enumerate(prompts)]
        cached: CachedModel | None = None
        while texts:
            if cached is None or max(len(text.tokens) - text.begin for text in texts) > self._context:
                cached, logits = yield from self._begin(texts)
            else:
                logits = yield from self._step(cached, texts)
            running = []
            for row, token in enumerate(self._choose(logits, texts, choice)):
                text = texts[row]
                text.tokens.append(token)
                finish = None
                if token == self._eod:
                    finish = "stop"
                elif len(text.tokens) - text.num_prompt == max_new_tokens:
                    finish = "length"
                else:
                    running.append(row)
                yield Event(text.number, token=token, finish=finish)
            if len(running) < len(texts):
                texts = [texts[row] for row in running]
                cached.keep(torch.tensor(running, dtype=torch.int64, device=mcore.device()))

    def _begin(self, texts: list[_Text]) -> Generator[Event, None, tuple[CachedModel, Tensor | None]]:
        """Show the model all that it may see of the texts."""
        length, device = self._chunk_length, mcore.device()
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
        if self._num_neighbors:
            shape = (len(texts), num_chunks, self._num_neighbors)
            neighbor_tokens = torch.zeros(*shape, 2 * length, dtype=torch.int64, device=device)
            neighbor_lengths = torch.zeros(shape, dtype=torch.int64, device=device)
            for row, text in enumerate(texts):
                first = text.begin // length
                for chunk, (found, lengths) in text.neighbors.items():
                    if chunk >= first:
                        neighbor_tokens[row, chunk - first], neighbor_lengths[row, chunk - first] = found, lengths
        start = time.perf_counter()
        cached = CachedModel(self._model, len(texts), self._context, self._num_neighbors)
        sizes = torch.tensor([len(window) for window in windows], device=device)
        logits = cached.begin(tokens.to(device), sizes, neighbor_tokens, neighbor_lengths)
        self.model_seconds += time.perf_counter() - start
        return cached, logits

    def _step(self, cached: CachedModel, texts: list[_Text]) -> Generator[Event, None, Tensor | None]:
        """Show the model the last token of each text."""
        device = mcore.device()
        yield from self._read(texts)
        arrivals = None
        completing = [row for row, text in enumerate(texts) if len(text.tokens) % self._chunk_length == 0]
        if completing and self._num_neighbors:
            found = [texts[row].neighbors[len(texts[row].tokens) // self._chunk_length - 1] for row in completing]
            arrivals = Arrivals(
                torch.tensor(completing, device=device),
                torch.stack([tokens for tokens, _ in found]),
                torch.stack([lengths for _, lengths in found]),
            )
        start = time.perf_counter()
        logits = cached.step(torch.tensor([text.tokens[-1] for text in texts], device=device), arrivals)
        self.model_seconds += time.perf_counter() - start
        return logits

    def _read(self, texts: list[_Text]) -> Iterator[Event]:
        """Find the neighbors of chunks in the window that are complete and have none yet."""
        if self._reader is None:
            return
        length, wanted = self._chunk_length, []
        for text in texts:
            for chunk in range(text.begin // length, len(text.tokens) // length):
                if chunk not in text.neighbors:
                    wanted.append((text, chunk))
        if not wanted:
            return
        reads = self._reader.read([text.tokens[chunk * length : (chunk + 1) * length] for text, chunk in wanted])
        for row, (text, chunk) in enumerate(wanted):
            text.neighbors[chunk] = (reads.tokens_nxKxR[row], reads.lengths_nxK[row])
            yield Event(text.number, chunk=chunk, ids=reads.ids_nxK[row], distances=reads.distances_nxK[row])

    def _choose(self, logits: Tensor | None, texts: list[_Text], choice: Choice) -> list[int]:
        """The next token of each text: chosen on the last rank, told to all."""
        start = time.perf_counter()
        tokens = torch.empty(len(texts), dtype=torch.int64, device=mcore.device())
        last = distributed.world_size() - 1
        if distributed.rank() == last:
            assert logits is not None
            logits = logits[:, : self._vocab_size].clone()
            if self._pad != self._eod:
                logits[:, self._pad] = -torch.inf
            draws = [
                np.random.default_rng((choice.seed, text.number, len(text.tokens) - text.num_prompt)).random()
                for text in texts
            ]
            tokens = choose(
                logits, np.array(draws), temperature=choice.temperature, top_k=choice.top_k, top_p=choice.top_p
            )
        if distributed.world_size() > 1:
            dist.broadcast(tokens, src=last)
        chosen = tokens.tolist()
        self.model_seconds += time.perf_counter() - start
        return chosen
