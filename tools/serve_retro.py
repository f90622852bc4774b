#!/usr/bin/env python
"""A trained model as a service that speaks OpenAI's completions and shows what it reads.

python tools/serve_retro.py --load DIR --retro-work-dir DIR
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.config.flags import parse
from megatron_retro.config.serving import ServeConfig
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    config = parse(ServeConfig, description=(__doc__ or "").splitlines()[0])
    from megatron_retro.serving.serve import serve  # it imports torch, after the flags are known to be right

    serve(config)


if __name__ == "__main__":
    exit_on_user_error(main)
