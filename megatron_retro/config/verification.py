"""Flags of `tools/verify_retro_data.py`."""

import dataclasses

from megatron_retro.config.flags import flag
from megatron_retro.errors import UserError


@dataclasses.dataclass
class VerifyGroup:
    """what to read; nothing is changed"""

    retro_work_dir: str | None = flag(None, "work dir")
    checkpoint: str | None = flag(None, "one checkpoint, or a --save directory with some")


@dataclasses.dataclass
class VerifyConfig:
    """Everything `tools/verify_retro_data.py` takes."""

    verify: VerifyGroup = dataclasses.field(default_factory=VerifyGroup)

    def finish(self) -> None:
        """Check.

        Raises:
            UserError: nothing to read is named.
        """
        if not (self.verify.retro_work_dir or self.verify.checkpoint):
            raise UserError("--retro-work-dir DIR or --checkpoint DIR is needed: what to verify")
