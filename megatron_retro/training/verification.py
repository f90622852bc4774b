"""What `tools/verify_retro_data.py` does: reads every byte of a work dir or of checkpoints, and changes nothing."""

import dataclasses
import pathlib
import shlex

from megatron_retro import distributed, storage
from megatron_retro.config.verification import VerifyConfig
from megatron_retro.errors import UserError
from megatron_retro.retrieval.progress import Progress, say
from megatron_retro.training import checkpoint_files
from megatron_retro.training.data import open_work_dir
from megatron_retro.workdir import BACKUP, COPY, STAGES


@dataclasses.dataclass
class Damage:
    """A file that is not what it was, and what mends that."""

    name: str
    recorded: str
    found: str
    repair: str

    def __str__(self) -> str:
        return (
            f"damaged   {self.name}\n  recorded  {self.recorded}\n  found     {self.found}\n  repair    {self.repair}"
        )


def verify(config: VerifyConfig) -> bool:
    """Verify, and print what is damaged; every rank calls it. Whether all is sound.

    Raises:
        UserError: there is no such work dir or checkpoint.
    """
    config.finish()
    distributed.init_gloo(timeout_minutes=24 * 60)
    damages: list[Damage] = []
    if config.verify.retro_work_dir:
        damages += _work_dir(config.verify.retro_work_dir)
    if config.verify.checkpoint:
        damages += _checkpoints(pathlib.Path(config.verify.checkpoint))
    if distributed.rank() == 0:
        for damage in damages:
            print(damage)
    return not damages


def _work_dir(path: str) -> list[Damage]:
    work = open_work_dir(path)
    work.full = True
    stages = tuple(stage for stage in STAGES if work.has(stage))
    work.check_chain(stages)
    sizes = [_size(print_) for stage in stages for print_ in work.manifest["stages"][stage]["files"].values()]
    with Progress(f"verify {path}", sum(sizes), "bytes", together=True) as progress:
        damaged = work.damaged(stages, _of_all_ranks(progress))
    say(f"{path}: {len(sizes):,} files, {sum(sizes):,} bytes, {_told(len(damaged))}")
    for stage in STAGES:
        if not work.has(stage):
            say(f"{path}: the stage {stage!r} is not finished")
    places = [(work.path / name, was, work.repair(name)) for name, was in damaged]
    damages = [Damage(str(place), was, storage.found(place), repair) for place, was, repair in places]
    if not work.has_copy():
        copy, manifest = work.path / COPY, work.path / "manifest.json"
        mend = shlex.join(["cp", str(manifest), str(copy)])
        damages.append(Damage(str(copy), storage.fingerprint(manifest), storage.found(copy), mend))
    return damages


def _checkpoints(path: pathlib.Path) -> list[Damage]:
    paths = [path] if (path / "manifest.json").exists() else checkpoint_files.complete(path)
    if not paths:
        raise UserError(f"--checkpoint {path} is no checkpoint, and holds none")
    return [damage for each in paths for damage in _checkpoint(each)]


def _checkpoint(path: pathlib.Path) -> list[Damage]:
    try:
        recorded = checkpoint_files.recorded_files(path)
    except UserError as error:
        return [Damage(str(path / "manifest.json"), "as it was written", str(error), _way_back(path))]
    sizes = list(map(_size, recorded.values()))
    with Progress(f"verify {path}", sum(sizes), "bytes", together=True) as progress:
        damaged = checkpoint_files.damaged(path, _of_all_ranks(progress))
    say(f"{path}: {len(sizes):,} files, {sum(sizes):,} bytes, {_told(len(damaged))}")
    return [Damage(str(path / name), was, storage.found(path / name), _way_back(path)) for name, was in damaged]


def _way_back(path: pathlib.Path) -> str:
    number = checkpoint_files.iteration_of(path)
    older = [other for other in checkpoint_files.complete(path.parent) if checkpoint_files.iteration_of(other) < number]
    aside = shlex.join(["mv", str(path), f"{path}.damaged"])
    return f"{aside}\n  then      the run goes on from {older[0].name}" if older else BACKUP


def _of_all_ranks(progress: Progress) -> storage.Advance:
    """Every rank reads about as much."""
    return lambda num_bytes: progress.advance(num_bytes * distributed.world_size())


def _size(print_: str) -> int:
    return int(print_.split(":")[0])


def _told(number: int) -> str:
    return f"{number:,} damaged" if number else "sound"
