"""What a directory holds: the kinds of models that weights can come from, each a `training.fit.Source`."""

import pathlib

from megatron_retro.errors import UserError
from megatron_retro.interop.families import Config
from megatron_retro.interop.hugging_face import HuggingFaceDirectory
from megatron_retro.interop.megatron_lm import MegatronCheckpoint, is_megatron
from megatron_retro.interop.own import RETRO_TYPE, ExportedRetro, OwnCheckpoint
from megatron_retro.training import checkpoint_files


def open_source(
    flag: str, directory: str, trust_pickle: bool = False
) -> OwnCheckpoint | ExportedRetro | HuggingFaceDirectory | MegatronCheckpoint:
    """Look what a directory holds, and open it.

    Args:
        flag: that names the directory.
        trust_pickle: whether the user has said that pickles may be read.

    Raises:
        UserError: nothing known, or it is damaged.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise UserError(f"{flag} {directory}: no such directory")
    if is_megatron(path):  # first: its directories are called as ours are
        return MegatronCheckpoint(path, trust_pickle)
    if newest := checkpoint_files.find(directory):
        return OwnCheckpoint(newest)
    if (path / "config.json").is_file():
        is_ours = Config.read(path).get("model_type") == RETRO_TYPE
        return ExportedRetro(path) if is_ours else HuggingFaceDirectory(path)
    if path.absolute() in checkpoint_files.complete(path.absolute().parent):
        raise UserError(f"{flag} {directory} is one of a directory's checkpoints; give the directory above it")
    raise UserError(
        f"{flag} {directory} holds no model: no checkpoint of this project (iter_…), no Hugging Face directory "
        "(config.json), and none of Megatron-LM's (mp_rank_00)"
    )


def is_own_checkpoint(directory: str) -> bool:
    """Whether a directory holds checkpoints of this project."""
    return not is_megatron(pathlib.Path(directory)) and checkpoint_files.find(directory) is not None
