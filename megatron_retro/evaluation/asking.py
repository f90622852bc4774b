"""The same questions asked of several models and modes."""

from collections.abc import Callable
from typing import Any

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.questions import Question
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.evaluation.questions import ask, compare
from megatron_retro.inference.generate import make_writer
from megatron_retro.inference.loading import Trained
from megatron_retro.inference.reader import GivenReader, Reader, open_reader
from megatron_retro.workdir import WorkDir


class QuestionEvaluation:
    """Answers by mode; every rank calls every method.

    Args:
        template: the prompt, with `{question}` in it.
        num_neighbors: K.
    """

    def __init__(
        self,
        questions: list[Question],
        work: WorkDir,
        table: ChunkTable,
        tokenizer: Tokenizer,
        *,
        template: str,
        max_new_tokens: int,
        batch_size: int,
        num_neighbors: int,
    ):
        self.num_questions = len(questions)
        self._questions, self._work, self._table, self._tokenizer = questions, work, table, tokenizer
        self._settings = {"template": template, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        self._num_neighbors = num_neighbors
        self._answers: dict[str, list[str]] = {}

    def measure(self, mode: str, trained: Trained, progress: Callable[[int], None]) -> None:
        """Ask in mode "on" (what is read: the question's texts, else what live retrieval finds), "off" or "gpt"."""
        length, k = self._table.chunk_length, self._num_neighbors if mode == "on" else 0
        searches = k and not all(question.ctxs for question in self._questions)
        live = open_reader(self._work, self._table, k) if searches else None

        def reader_of(question: Question) -> Reader | None:
            if not (k and question.ctxs):
                return live
            return GivenReader(self._tokenizer.encode(question.ctxs[:k]), k, 2 * length)

        reader = live or (GivenReader([], k, 2 * length) if k else None)
        writer = make_writer(trained, self._table, self._tokenizer, reader, k)
        self._answers[mode] = ask(
            self._questions,
            writer,
            self._tokenizer,
            reader_of,
            chunk_length=length,
            progress=progress,
            **self._settings,  # type: ignore[arg-type]
        )

    def result(self) -> dict[str, Any]:
        """`count`, `modes` (mode -> figures, see `compare`) and `asked`: each question with its answers."""
        asked = [
            {
                "question": question.question,
                "answers": question.answers,
                "found": {mode: found[number] for mode, found in self._answers.items()},
            }
            for number, question in enumerate(self._questions)
        ]
        return {"count": len(asked), "modes": compare(self._questions, self._answers), "asked": asked}
