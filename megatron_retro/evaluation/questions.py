"""Questions asked of a model, answers compared; `data/questions.py` reads them and lays them out."""

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_retro.data.questions import Question, filled, filler, prompt
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.evaluation import answers
from megatron_retro.evaluation.bootstrap import estimate, ratio, resampled
from megatron_retro.inference.reader import Reader
from megatron_retro.inference.writer import Choice, Text, Writer

# ------------------------------------------------------------------------------------------------ asking


def ask(
    questions: list[Question],
    writer: Writer,
    tokenizer: Tokenizer,
    reader_of: Callable[[Question], Reader | None],
    *,
    template: str,
    chunk_length: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda more: None,
) -> list[str]:
    """The answers, greedily chosen, up to the end of their first line; every rank calls it.

    Args:
        reader_of: what finds the neighbors that a question reads; None for no neighbors.
        template: the prompt, with `{question}` in it.
        batch_size: questions answered at once.
        progress: called with the number of questions that were answered since it was called before.
    """
    fill, choice, found = filler(tokenizer), Choice(temperature=0), []
    for begin in range(0, len(questions), batch_size):
        some = questions[begin : begin + batch_size]
        encoded = tokenizer.encode([prompt(template, question.question) for question in some])
        texts = [
            Text(number, filled(tokens, chunk_length, fill), choice, number, max_new_tokens, reader_of(question))
            for number, (tokens, question) in enumerate(zip(encoded, some, strict=True))
        ]
        batches = iter([texts])
        written: list[list[int]] = [[] for _ in some]
        for event in writer.write_texts(lambda batches=batches: next(batches, [])):  # type: ignore[misc]
            if event.token is not None:
                written[event.text].append(event.token)
        found += [first_line(text) for text in tokenizer.decode(written)]
        progress(len(some))
    return found


def first_line(text: str) -> str:
    """An answer ends with its line."""
    return text.strip().split("\n")[0].strip()


def compare(questions: list[Question], found: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Exact match and F1 of each mode's answers, with 95 % intervals over questions and paired differences."""
    columns: dict[tuple[str, str], np.ndarray] = {}
    for mode, texts in found.items():
        for name, measure in (("exact_match", answers.exact_match), ("f1", answers.f1)):
            pairs = zip(texts, questions, strict=True)
            columns[mode, name] = np.array([measure(text, question.answers) for text, question in pairs])
    sums = resampled(columns, np.arange(len(questions)))
    count = np.full(len(next(iter(sums.values()))), float(len(questions)))
    result: dict[str, dict[str, Any]] = {mode: {} for mode in found}
    for mode, name in columns:
        figures = result[mode]
        figures[name], figures[f"{name}_interval"] = estimate(ratio(sums[mode, name], count))
        for other in ("off", "gpt"):
            if other in found and mode not in (other, "gpt"):
                difference = estimate(ratio(sums[mode, name] - sums[other, name], count))
                figures[f"{name}_versus_{other}"], figures[f"{name}_versus_{other}_interval"] = difference
    return result
