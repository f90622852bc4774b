"""What a directory holds: the kinds of models that weights can come from, each a `training.fit.Source`."""

import pathlib

from megatron_retro.errors import UserError
from megatron_retro.training import checkpoint_files
from megatron_retro.training.fit import Source


def open_source(flag: str, directory: str) -> Source:
    """Look what a directory holds, and open it.

    Args:
        flag: that names the directory.

    Raises:
        UserError: nothing known, or it is damaged.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise UserError(f"{flag} {directory}: no such directory")
    if newest := checkpoint_files.find(directory):
        from megatron_retro.interop.own import OwnCheckpoint

        return OwnCheckpoint(newest)
    if (path / "config.json").is_file():
        from megatron_retro.interop.hugging_face import HuggingFaceDirectory

        return HuggingFaceDirectory(path)
    raise UserError(
        f"{flag} {directory} holds no model: neither a checkpoint of this project (iter_…) nor a Hugging Face "
        "directory (config.json)"
    )
