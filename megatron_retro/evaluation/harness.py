"""The model "retro" of EleutherAI's lm-evaluation-harness (the extra `[lm-eval]`).

    from megatron_retro.evaluation.harness import register
    register()
    lm_eval.simple_evaluate(model="retro", model_args="load=DIR,retro_work_dir=DIR,retrieval=on", tasks=[…])

A context is filled up on the left until it ends with a chunk, as `questions` does it, so that what follows reads the
neighbors of the context's last chunk. A text without context stands behind a chunk of ends of documents.
"""

import functools
from typing import Any

from megatron_retro import mcore
from megatron_retro.config.model import RETRIEVAL_MODES, ParallelConfig
from megatron_retro.data.questions import filled, filler
from megatron_retro.errors import UserError
from megatron_retro.evaluation.scoring import Row, Scorer, windows
from megatron_retro.inference.generate import make_writer, open_trained
from megatron_retro.inference.reader import open_reader
from megatron_retro.inference.writer import Choice, Text


class RetroRequests:
    """Answers the harness's three kinds of requests, given as tuples of arguments; one process.

    Args:
        load: directory of checkpoints.
        retro_work_dir: work dir with the tokenizer and the database.
        retrieval: "on", "off" or "random".
        retro_num_neighbors: K; None takes the checkpoint's.
        batch_size: requests at once.
        max_gen_toks: tokens to write where a request does not say.

    Raises:
        UserError: they do not fit together.
    """

    def __init__(
        self,
        load: str,
        retro_work_dir: str,
        retrieval: str = "on",
        retro_num_neighbors: int | None = None,
        batch_size: int = 8,
        max_gen_toks: int = 128,
    ):
        if retrieval not in RETRIEVAL_MODES:
            raise UserError(f"retrieval={retrieval}; it takes one of {', '.join(RETRIEVAL_MODES)}")
        work, trained, table, self._tokenizer = open_trained(load, retro_work_dir, ParallelConfig())
        reads = trained.retro is not None and retrieval != "off"
        k = (retro_num_neighbors or trained.retro.retro_num_neighbors) if trained.retro and reads else 0
        self._reader = open_reader(work, table, k, retrieval) if reads else None
        self._batch_size, self._max_gen_toks, self._length = int(batch_size), max_gen_toks, table.chunk_length
        longest = trained.model.max_position_embeddings or trained.model.seq_length
        self._context = longest // self._length * self._length
        if self._context < 2 * self._length:
            raise UserError(f"load={load}: --seq-length {longest} is less than two chunks of {self._length} tokens")
        self._fill = filler(self._tokenizer)
        silent = {self._fill, self._tokenizer.eod}
        self._scorer = Scorer(mcore.unwrap(trained.module), self._length, self._reader, k, silent)
        self._writer = make_writer(trained, table, self._tokenizer, self._reader, k)

    def loglikelihood(self, requests: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(context, continuation) -> (log-probability of the continuation, whether greedy choice would write it)."""
        texts = []
        for context, continuation in requests:
            kept = context.rstrip()  # a space goes with the word behind it
            before, whole = self._tokenizer.encode([kept, kept + context[len(kept) :] + continuation])
            prompt = self._prompt(before)
            texts.append((prompt + whole[len(before) :], len(prompt)))
        return self._score(texts)

    def loglikelihood_rolling(self, requests: list[tuple[str]]) -> list[float]:
        """(text,) -> log-probability of all of it."""
        before = [self._tokenizer.eod] * self._length
        encoded = self._tokenizer.encode([text for (text,) in requests])
        return [found for found, _ in self._score([(before + tokens, self._length) for tokens in encoded])]

    def generate_until(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """(context, settings) -> what is written before the first of the strings `until`."""
        found = []
        for begin in range(0, len(requests), self._batch_size):
            found += self._generate(requests[begin : begin + self._batch_size])
        return found

    def _prompt(self, tokens: list[int], room: int = 0) -> list[int]:
        """A context on the grid, its beginning cut off where it and `room` tokens more exceed the model's context."""
        most = max(self._length, (self._context - room) // self._length * self._length)
        if not tokens:
            return [self._tokenizer.eod] * self._length
        return filled(tokens[-most:], self._length, self._fill)

    def _score(self, texts: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """(tokens, first scored one) -> (log-probability, whether each is the likeliest), over windows."""
        rows: list[tuple[int, Row]] = [
            (number, row)
            for number, (tokens, first) in enumerate(texts)
            for row in windows(tokens, first, self._context, self._length)
        ]
        rows.sort(key=lambda numbered: len(numbered[1].tokens))
        found = [(0.0, True)] * len(texts)
        for begin in range(0, len(rows), self._batch_size):
            some = rows[begin : begin + self._batch_size]
            for (number, _), (score, greedy) in zip(some, self._scorer.score([row for _, row in some]), strict=True):
                found[number] = found[number][0] + score, found[number][1] and greedy
        return found

    def _generate(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        encoded = self._tokenizer.encode([context for context, _ in requests])
        texts, ends = [], []
        for number, (tokens, (_, settings)) in enumerate(zip(encoded, requests, strict=True)):
            most, until = int(settings.get("max_gen_toks") or self._max_gen_toks), settings.get("until") or []
            ends.append([until] if isinstance(until, str) else list(until))
            prompt = self._prompt(tokens, most)
            texts.append(Text(number, prompt, _choice(settings), number, most, self._reader))
        written: list[list[int]] = [[] for _ in texts]
        batches = iter([texts])
        for event in self._writer.write_texts(lambda: next(batches, [])):
            if event.token is not None:
                written[event.text].append(event.token)
                found = self._tokenizer.decode([written[event.text]])[0]
                texts[event.text].is_cancelled = any(end in found for end in ends[event.text] if end)
        answers = self._tokenizer.decode(written)
        return [_before(answer, until) for answer, until in zip(answers, ends, strict=True)]


def _choice(settings: dict[str, Any]) -> Choice:
    if not settings.get("do_sample"):
        return Choice(temperature=0)
    temperature, top_k, top_p = settings.get("temperature", 1.0), settings.get("top_k", 0), settings.get("top_p", 1.0)
    return Choice(float(temperature), int(top_k), float(top_p))


def _before(text: str, ends: list[str]) -> str:
    return text[: min([text.find(end) for end in ends if end and end in text], default=len(text))]


@functools.cache
def register() -> Any:
    """Make the model "retro" known to the harness; returns its class, a `lm_eval.api.model.LM`.

    Raises:
        UserError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(f"lm-eval is not installed ({error}): pip install 'lm-eval>=0.4.9'") from None

    class RetroLM(LM):
        def __init__(self, device: Any = None, max_batch_size: Any = None, **settings: Any):
            super().__init__()
            self.requests = RetroRequests(**settings)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return self.requests.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return self.requests.loglikelihood_rolling([request.args for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self.requests.generate_until([request.args for request in requests])

    return register_model("retro")(RetroLM)
