"""Flags of `tools/evaluate_retro.py`."""

import dataclasses

from megatron_retro.config.flags import flag
from megatron_retro.config.model import ParallelConfig
from megatron_retro.errors import UserError


@dataclasses.dataclass
class EvaluationConfig:
    """Evaluation"""

    load: str | None = flag(None, "directory of checkpoints (the newest is taken)")
    retro_work_dir: str | None = flag(None, "work dir with the text and its neighbors")
    split: str = flag("valid", "documents to evaluate on", choices=("train", "valid", "test"))
    output: str | None = flag(None, "JSON file for all figures")
    micro_batch_size: int = flag(4, "samples a rank runs at once")
    seq_length: int | None = flag(None, "tokens a sample", show="the checkpoint's")
    max_samples: int | None = flag(None, "evaluate on this many samples at the most", show="all of the split")


@dataclasses.dataclass
class EvaluateConfig:
    """Everything `tools/evaluate_retro.py` takes."""

    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def finish(self) -> None:
        """Check.

        Raises:
            UserError: names the flag and what is missing.
        """
        if not self.evaluation.load:
            raise UserError("--load is missing; it takes the --save directory of a training run")
        if not self.evaluation.retro_work_dir:
            raise UserError("--retro-work-dir is missing; tools/preprocess_retro_data.py builds one")
        for name in ("micro_batch_size", "max_samples"):
            value = getattr(self.evaluation, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
