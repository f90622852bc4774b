#!/usr/bin/env python
"""Every byte of a work dir or of checkpoints, compared with what was recorded when it was written.

python tools/verify_retro_data.py --retro-work-dir DIR
python tools/verify_retro_data.py --checkpoint SAVE_DIR
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.config.flags import parse
from megatron_retro.config.verification import VerifyConfig
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    config = parse(VerifyConfig, description=(__doc__ or "").splitlines()[0])
    from megatron_retro.training.verification import verify

    if not verify(config):
        raise SystemExit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
