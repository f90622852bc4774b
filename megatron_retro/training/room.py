"""Whether checkpoints will fit on the disk, told before the first update."""

import pathlib
import shutil

from megatron_retro import distributed
from megatron_retro.errors import UserError
from megatron_retro.retrieval.room import amount


def check(save: str, num_bytes: int, num_checkpoints: int) -> str:
    """Refuse a run whose first checkpoint would not fit; every rank calls it.

    Returns:
        A line that tells what checkpoints take and what is free.

    Raises:
        UserError: tells both.
    """
    directory = pathlib.Path(save).absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = min(distributed.all_gather(shutil.disk_usage(existing).free))
    if num_checkpoints and num_bytes > free:
        raise UserError(
            f"--save {save}: a checkpoint takes {amount(num_bytes)}, its disk has {amount(free)} free; "
            "make room and run the same command again, or give a directory on another disk"
        )
    line = f"a checkpoint takes {amount(num_bytes)}, the disk of {save} has {amount(free)} free"
    if num_checkpoints * num_bytes > free:
        line += f": not enough for the {num_checkpoints} that this run will write; remove some in time"
    return line
