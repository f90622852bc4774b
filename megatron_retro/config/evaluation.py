"""Flags of `tools/evaluate_retro.py`."""

import dataclasses

from megatron_retro.config.flags import at_least, flag, required
from megatron_retro.config.model import ParallelConfig, check_qa_prompt
from megatron_retro.errors import UserError


@dataclasses.dataclass
class EvaluationConfig:
    """what to evaluate on which text"""

    load: str | None = flag(None, "directory of checkpoints, the newest is taken (required)")
    retro_work_dir: str | None = flag(None, "work dir with the text and its neighbors (required)")
    split: str = flag("valid", "documents to evaluate on", choices=("train", "valid", "test", "none"))
    data_path: tuple[str, ...] = flag((), "corpora of the work dir to evaluate on", many=True, show="all of them")
    gpt: str | None = flag(None, "directory of a GPT's checkpoints, to compare with on the same tokens")
    also_db: str | None = flag(None, "another work dir, whose database is read as well", show="none")
    retro_num_neighbors: int | None = flag(None, "neighbors read by each chunk (K)", show="the checkpoint's")
    micro_batch_size: int = flag(4, "samples, or questions, a rank runs at once")
    seq_length: int | None = flag(None, "tokens a sample", show="the checkpoint's")
    max_samples: int | None = flag(None, "evaluate on this many samples at the most", show="all of the split")


@dataclasses.dataclass
class QuestionConfig:
    """questions"""

    qa: str | None = flag(None, 'JSON lines with "question", "answers" and, where given, "ctxs" to read', show="none")
    qa_prompt: str | None = flag(
        None, "what a question becomes, with {question} in it", show="the checkpoint's: Question: … Answer:"
    )
    qa_max_new_tokens: int = flag(32, "tokens an answer")


@dataclasses.dataclass
class OutputConfig:
    """results"""

    output: str | None = flag(None, "JSON file for all figures")
    report: str | None = flag(None, "HTML file for people: table, curves, settings")


@dataclasses.dataclass
class EvaluateConfig:
    """Everything `tools/evaluate_retro.py` takes."""

    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    questions: QuestionConfig = dataclasses.field(default_factory=QuestionConfig)
    results: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def finish(self) -> None:
        """Check.

        Raises:
            UserError: names the flag and what is missing.
        """
        given, questions = self.evaluation, self.questions
        required(
            given,
            load="it takes the --save directory of a training run",
            retro_work_dir="tools/preprocess_retro_data.py builds one",
        )
        at_least(1, given, "micro_batch_size", "seq_length", "max_samples", "retro_num_neighbors")
        at_least(1, questions, "qa_max_new_tokens")
        if given.split == "none" and not questions.qa:
            raise UserError("--split none evaluates no text, and there is no --qa FILE; give one of the two")
        if questions.qa_prompt is not None:
            check_qa_prompt(questions.qa_prompt)
        if questions.qa and self.parallel.sequence_parallel:
            raise UserError("--sequence-parallel shards whole samples, not answers that grow; leave it out with --qa")
