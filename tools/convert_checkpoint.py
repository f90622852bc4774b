#!/usr/bin/env python
"""Models of other projects as checkpoints of this one, and back.

python tools/convert_checkpoint.py --load HUGGING_FACE_DIR --save SAVE_DIR
python tools/convert_checkpoint.py --load SAVE_DIR --save HUGGING_FACE_DIR
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.config.conversion import ConvertConfig
from megatron_retro.config.flags import parse
from megatron_retro.distributed import world_size
from megatron_retro.errors import UserError, exit_on_user_error


def main() -> None:
    config = parse(ConvertConfig, description=(__doc__ or "").splitlines()[0])
    config.finish()
    if (ranks := world_size()) > 1:
        raise UserError(f"WORLD_SIZE is {ranks}; a conversion is the work of one process, start it without torchrun")
    from megatron_retro.interop.source import is_own_checkpoint

    if is_own_checkpoint(config.conversion.load or ""):
        from megatron_retro.hf.export import export

        export(config.conversion)
    else:
        from megatron_retro.interop.convert import convert

        convert(config)


if __name__ == "__main__":
    exit_on_user_error(main)
