"""Disks that fill up, and limits on a file's size, anywhere in preprocessing and inside saves of training.

A trial runs a program on a disk of some size (a tmpfs, where this process may mount one) or under RLIMIT_FSIZE. What
does not fit must end every rank within ten seconds with one line and leave no temporary file; with room, the same
command must keep what was finished and end as an undisturbed run does.
"""

import contextlib
import functools
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

from conftest import stdlib_texts, write_jsonl
from launch import LeftAlone

from megatron_retro.config.preprocessing import TASKS
from torture.preprocessing import write_tiny_embedder
from torture.training import SHAPE, make_work
from torture.trees import checkpoint_hashes, difference, tree
from torture.trials import Lost, Result, run_trials, say, seeds, telling

_SECONDS_TO_LEAVE = 10
_LEAST_LIMIT = 2000  # bytes; what the programs print goes to files, too


def campaign(folder: pathlib.Path, count: int, only: int | None) -> Result:
    """Programs, ranks, means and stages alternate; sizes are spread over what a stage needs, or are next to none."""
    numbers, found = seeds(count, only), list[tuple[str, float]]()
    material = Material(folder)
    failures = run_trials("room", numbers, lambda number, place: _trial(material, count, found, number, place))
    files = re.findall(r"\S+(?= cannot be written)", "\n".join(line for line, _ in found))
    kinds = sorted({re.sub(r"\d+", "0", file.partition("/disk/output/")[2]) for file in files})
    say(f"room: refused were {', '.join(kinds)}")
    return Result(
        "A full disk or a limit on files ends every rank within ten seconds with one line; what was finished stays as "
        "it is, nothing half-done is left, and with room the same command finishes, with the same bytes.",
        "A tmpfs or RLIMIT_FSIZE of any size, from each stage of preprocessing on and under saves, at 1 and 2 ranks."
        if _may_mount()
        else "RLIMIT_FSIZE of any size, from each stage of preprocessing on and under saves, at 1 and 2 ranks.",
        f"{len(numbers)} runs, {len(found)} refused, at {len(kinds)} kinds of file",
        failures,
        f"all ranks ended within {max([seconds for _, seconds in found], default=0):.1f} s",
    )


class Material:
    """What the programs work on, and what undisturbed runs leave."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        write_jsonl(folder / "room.jsonl", stdlib_texts(60))
        write_tiny_embedder(folder / "room-embedder")
        self.trained_on = make_work(folder)
        self.begun = [folder / "begun"]  # work dirs with ever more stages
        self.begun[0].mkdir()
        for task in TASKS:
            self.begun.append(shutil.copytree(self.begun[-1], folder / f"after-{task}"))
            self._run([*self.program(self.begun[-1], trains=False), "--retro-tasks", task], 1)
        self.work = tree(self.begun[-1])
        self.trained = [folder / f"trained-{ranks}" for ranks in (1, 2)]
        for ranks, save in enumerate(self.trained, 1):
            self._run(self.program(save, trains=True), ranks)
        self.saved = [checkpoint_hashes(save / "iter_0000002") for save in self.trained]

    def _run(self, command: list[object], ranks: int) -> None:
        with tempfile.TemporaryDirectory() as place:
            if _run(pathlib.Path(place), 0, command, ranks) is not None:
                raise Lost("the disk here is full")

    def program(self, place: pathlib.Path, trains: bool) -> list[object]:
        """What writes into `place`."""
        if trains:
            flags = ["--retro-work-dir", self.trained_on, "--retro-add-retriever", *SHAPE, "--train-iters", 2]
            return ["pretrain_retro.py", *flags, "--save-interval", 1, "--save", place, "--load", place]
        input = ["--input", self.folder / "room.jsonl", "--retro-embedder", self.folder / "room-embedder"]
        size = ["--vocab-size", 600, "--retro-block-size", 100, "--retro-index-str", "IVF16,RaBitQ"]
        more = ["--retro-retriever", "hybrid"]
        return ["tools/preprocess_retro_data.py", "--retro-work-dir", place, *input, *size, *more]


def _trial(material: Material, count: int, found: list[tuple[str, float]], number: int, place: pathlib.Path) -> None:
    trains, ranks, is_disk = bool(number & 1), 1 + (number >> 1 & 1), bool(number >> 2 & 1) and _may_mount()
    stage, nearly_full = (number >> 3) % len(TASKS), (number >> 3) // len(TASKS) % 2
    begun = material.begun[0 if trains else stage]
    done = material.trained[ranks - 1] if trains else material.begun[stage + 1]
    share = (number * 37 % count + 0.5) / count
    here, most = 4096 * sum(_pages(begun)), 4096 * sum(_pages(done))
    room = 4096 * (stage // 2) if nearly_full else round(share * 1.1 * (most - here))
    num_bytes = here + room if is_disk else 0
    limit = 0 if is_disk else round(_LEAST_LIMIT * (4096 * 1.1 * max(_pages(done)) / _LEAST_LIMIT) ** share)
    what = "training" if trains else f"preprocessing from {begun.name}"
    told = [f"{what} at {ranks} ranks, a disk of {num_bytes} bytes, a limit of {limit}"]
    with telling(told), _disk(place / "disk", num_bytes) as disk:
        output = shutil.copytree(begun, disk / "output")
        command = material.program(output, trains)
        before: dict[str, str] = {}
        refused = _run(place / "first", limit, command, ranks)
        if refused is not None:
            found.append(refused)
            told.append(refused[0])
            before = tree(output)
            if left := [name for name in before if _is_temporary(name)]:
                raise Lost(f"left behind: {left}")
        if is_disk:
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        if _run(place / "second", 0, command, ranks) is not None:
            raise Lost("with room it does not finish")
        after = tree(output)
        kept = {name: hash for name, hash in before.items() if not _GROWS.match(name)}
        if lost := difference({name: after.get(name) for name in kept}, kept):
            raise Lost(f"what was finished did not stay: {lost}")
        expected = material.saved[ranks - 1] if trains else material.work
        if lost := difference(checkpoint_hashes(output / "iter_0000002") if trains else after, expected):
            raise Lost(f"it is not what an undisturbed run makes: {lost}")


# What changes as a run goes on.
_GROWS = re.compile(r"manifest(\.copy)?\.json|unfinished|corpus/[^/]*\.parts|metrics\.jsonl|latest|\.lock")


def _is_temporary(name: str) -> bool:
    return bool(re.search(r"\.(tmp|partial|damaged)", name))


def _pages(directory: pathlib.Path) -> list[int]:
    """Of each file, and one more: there may be none."""
    return [1, *(-(-file.stat().st_size // 4096) for file in directory.rglob("*") if file.is_file())]


def _run(folder: pathlib.Path, limit: int, command: list[object], ranks: int) -> tuple[str, float] | None:
    """What a run was refused with, and how many seconds later its last rank ended; None where it was not.

    Raises:
        Lost: it did not end on every rank in time, with exit code 2, and one line.
    """
    run = LeftAlone(folder, "tests/limited.py", limit, *command, ranks=ranks)
    ends = run.wait_for_all()
    codes, text = [code for code, _ in ends], "".join(map(run.printed, range(ranks)))
    if set(codes) == {0}:
        return None
    lines = [line for line in text.splitlines() if ": error: " in line]
    times = [float(time) for time in re.findall(r"^refused at (\S+)$", text, re.M)]
    if set(codes) != {2} or "Traceback" in text or len(lines) != 1 or "make room" not in lines[0] or not times:
        raise Lost(f"exit codes {codes}\n{text[-5000:]}")
    seconds = max(end for _, end in ends) - min(times)
    if seconds > _SECONDS_TO_LEAVE:
        raise Lost(f"the last rank ended {seconds:.0f} s after the first was refused\n{text[-5000:]}")
    return lines[0], seconds


# ------------------------------------------------------------------------------------------------ disks


@functools.cache
def _may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


@contextlib.contextmanager
def _disk(place: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """A directory; a disk of its own where a size is given."""
    place.mkdir()
    if not num_bytes:
        yield place
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
