#!/usr/bin/env python
"""A work dir for people: one page of figures and chunks with their neighbors, or the nearest chunks of any text.

python tools/inspect_retro_data.py --retro-work-dir DIR --output report
python tools/inspect_retro_data.py --retro-work-dir DIR --query "how are packages uploaded" -k 5
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.config.flags import parse
from megatron_retro.config.inspection import InspectConfig
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    config = parse(InspectConfig, description=(__doc__ or "").splitlines()[0])
    from megatron_retro.inspection.inspect import inspect

    inspect(config)


if __name__ == "__main__":
    exit_on_user_error(main)
