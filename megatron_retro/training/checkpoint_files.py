"""Which checkpoints there are, and whether each is still what was saved. Needs no torch.

    <save>/iter_0000100/                       the files of a checkpoint (see `checkpoint.py`), and
                       manifest.json           the fingerprint of each
    <save>/latest_checkpointed_iteration.txt   the newest update's number, for people and other programs

The newest directory counts; each gets its name when all in it is on the disk.
"""

import functools
import os
import pathlib
import re

from megatron_retro import distributed, storage
from megatron_retro.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"


def name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iteration_of(path: pathlib.Path) -> int:
    return int(path.name.removeprefix("iter_"))


def complete(root: pathlib.Path) -> list[pathlib.Path]:
    """All complete checkpoints under a directory, newest first."""
    found = [path for path in root.glob("iter_*") if path.name.removeprefix("iter_").isdecimal() and path.is_dir()]
    return sorted(found, key=iteration_of, reverse=True)


# ------------------------------------------------------------------------------------------------ loading


def find(directory: str, iteration: int | None = None) -> pathlib.Path | None:
    """The newest complete checkpoint under `directory`, or that of an update; None where there is none.

    Raises:
        UserError: there is none of this update.
    """
    root = pathlib.Path(directory)
    if iteration is not None and not (root / name_of(iteration)).is_dir():
        there = ", ".join(str(iteration_of(path)) for path in complete(root)) or "none"
        raise UserError(f"--ckpt-step {iteration}: --load {directory} has no such checkpoint, but {there}")
    if iteration is not None:
        return root / name_of(iteration)
    return next(iter(complete(root)), None)


def find_sound(directory: str, iteration: int | None = None, *, own: bool = False) -> pathlib.Path | None:
    """As `find`, but damaged ones are passed over, loudly; every rank calls it.

    Args:
        own: whether this run saves there; what is damaged then gets another name.

    Raises:
        UserError: all are damaged, or the one that `iteration` names.
    """
    while path := distributed.together(lambda: find(directory, iteration)):
        try:
            verify(path)
            return path
        except UserError as error:
            older = [other for other in complete(path.parent) if iteration_of(other) < iteration_of(path)]
            if not (older and own and iteration is None):
                before = f", or take the one before it, {older[0].name}" if older else ""
                raise UserError(f"{error}; restore it from a backup{before}") from None
            line = f"{error}: moved aside; the run goes on from the checkpoint before it\n"
            distributed.together(functools.partial(_set_aside, path, line))
    return None


def verify(path: pathlib.Path) -> None:
    """Compare every byte of a checkpoint with its fingerprints; ranks share the reading, all call it.

    Raises:
        UserError: names a file, and both fingerprints, on every rank.
    """
    for name, was in damaged(path):
        raise UserError(
            f"checkpoint file {path / name} was {was} when it was saved, is now {storage.found(path / name)}"
        )


def damaged(path: pathlib.Path, advance: storage.Advance = lambda num_bytes: None) -> list[tuple[str, str]]:
    """(name, recorded fingerprint) of files that are not what was saved; ranks share the reading, all call it.

    Args:
        advance: told how many bytes were read.

    Raises:
        UserError: the manifest is damaged.
    """
    recorded = distributed.together(lambda: recorded_files(path))

    def look() -> list[tuple[str, str]]:
        mine = sorted(recorded.items())[distributed.rank() :: distributed.world_size()]
        return [(name, was) for name, was in mine if not storage.is_same(path / name, was, full=True, advance=advance)]

    return sorted(item for of_rank in distributed.all_gather(distributed.together(look)) for item in of_rank)


def set_newer_aside(path: pathlib.Path) -> None:
    """Point to the checkpoint that a run goes on from, and give newer ones other names."""
    if distributed.rank():
        return
    newer = [other for other in complete(path.parent) if iteration_of(other) > iteration_of(path)]
    for other in newer:
        storage.set_aside(other, "old")
    _point_to(path)  # also where a crash came before that


# ------------------------------------------------------------------------------------------------ saving


def clear(final: pathlib.Path, partial: pathlib.Path) -> None:
    """Make room for the partial checkpoint; a complete one of the same update is set aside."""
    if distributed.rank():
        return
    storage.remove(partial)  # left by a crash inside a save; no complete checkpoint has this name
    if final.exists():
        storage.set_aside(final, "old")
    partial.mkdir(parents=True)


def sync_share(partial: pathlib.Path) -> dict[str, str]:
    """Sync the files that this rank has written; their fingerprints by name."""
    prints = {}
    for file in sorted(partial.iterdir()):
        writer = re.match(r"__(\d+)_", file.name)  # megatron-core's names
        if (int(writer[1]) if writer else 0) == distributed.rank():
            storage.sync(file)
            prints[file.name] = storage.fingerprint(file)
    return prints


def publish(final: pathlib.Path, partial: pathlib.Path, prints: dict[str, str]) -> None:
    """Write down the fingerprints, give the checkpoint its name, then point to it (by one rank)."""
    storage.write_sealed(partial / "manifest.json", {"files": prints})
    os.rename(partial, final)
    storage.sync(final.parent)
    _point_to(final)


def remove_partial(root: pathlib.Path) -> None:
    """Remove what crashes inside saves have left (by one rank, that no other run saves beside)."""
    for partial in [*root.glob("iter_*.partial"), root / f"{LATEST}.partial"]:
        storage.remove(partial)


def _point_to(path: pathlib.Path) -> None:
    latest = f"{iteration_of(path)}\n".encode()
    storage.write_atomically(path.parent / LATEST, lambda file: file.write(latest))


def recorded_files(path: pathlib.Path) -> dict[str, str]:
    """Name -> fingerprint of each file."""
    if not (path / "manifest.json").exists():
        raise UserError(f"checkpoint {path} holds no manifest.json: it is none of this version, or not complete")
    try:
        recorded = storage.read_sealed(path / "manifest.json")["files"]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"checkpoint file {path / 'manifest.json'} is damaged ({error})") from None
    return dict(recorded)


def _set_aside(path: pathlib.Path, line: str) -> None:
    if distributed.rank() == 0:
        storage.set_aside(path)
        os.write(2, line.encode())
