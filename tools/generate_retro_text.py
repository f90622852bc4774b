#!/usr/bin/env python
"""Text from a trained model, which looks things up in a work dir's database while it writes.

python tools/generate_retro_text.py --load DIR --retro-work-dir DIR --prompt "Once upon a time" --show-neighbors
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.config.flags import parse
from megatron_retro.config.generation import GenerateConfig
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    config = parse(GenerateConfig, description=(__doc__ or "").splitlines()[0])
    from megatron_retro.inference.generate import generate  # it imports torch, after the flags are known to be right

    generate(config)


if __name__ == "__main__":
    exit_on_user_error(main)
