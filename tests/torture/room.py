"""Disks that fill up, and limits on a file's size, anywhere in preprocessing and inside saves of training.

A trial runs a program on a disk of some size (a tmpfs, where this process may mount one) or under RLIMIT_FSIZE. What
does not fit must end every rank within ten seconds with one line and leave no temporary file and nothing half-done;
with room, the same command must end with the same bytes.
"""

import contextlib
import functools
import multiprocessing.connection
import pathlib
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

from conftest import build, stdlib_texts, write_jsonl
from launch import _be_program, _server

from torture.preprocessing import write_tiny_embedder
from torture.training import SHAPE, make_work
from torture.trees import difference, tree
from torture.trials import Lost, Result, run_trials, seeds

_SECONDS_TO_LEAVE, _SECONDS = 10, 300
_LEAST_LIMIT = 20_000  # bytes; what the programs print goes to files, too


def campaign(folder: pathlib.Path, count: int, only: int | None) -> Result:
    """Sizes are spread over all that make a difference, programs, ranks and means alternate."""
    numbers, found = seeds(count, only), []
    trial = functools.partial(_trial, folder, count, found)
    _preprocessed(folder), make_work(folder)  # before trials run side by side
    failures = run_trials("room", numbers, trial)
    return Result(
        "A full disk or a limit on files ends every rank within ten seconds in one line; nothing finished is lost, "
        "and with room the same command finishes",
        "tmpfs and RLIMIT_FSIZE of every size, preprocessing and saves of training, 1 and 2 ranks",
        f"{len(numbers)} runs",
        failures,
        f"{len(found)} of them found the disk full",
    )


def _trial(folder: pathlib.Path, count: int, found: list, number: int, place: pathlib.Path) -> None:
    trains, ranks, is_disk = bool(number & 1), 1 + (number >> 1 & 1), bool(number >> 2 & 1) and _may_mount()
    share = (number + 0.5) / count
    with _disk(place / "disk", None if not is_disk else _most(folder, trains) * share) as disk:
        limit = 0 if is_disk else round(_LEAST_LIMIT * (_largest(folder, trains) * 1.1 / _LEAST_LIMIT) ** share)
        command = _training(folder, disk / "save") if trains else _preprocessing(folder, disk / "work")
        if _run(["tests/limited.py", limit, *command], ranks):
            found.append(number)
            left = [file for file in disk.rglob("*") if re.search(r"\.(tmp|partial)", file.name)]
            if left:
                raise Lost(f"temporary files are left: {left}")
        if is_disk:
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        before = tree(disk)
        if _run(command, ranks):
            raise Lost("with room it does not finish")
        after = tree(disk)
        if not trains:
            if lost := difference(after, _preprocessed(folder)):
                raise Lost(f"it is not what an undisturbed run makes: {lost}")
        elif not any("iter_0000002/" in name for name in after):
            raise Lost(f"no checkpoint: {sorted(before)} … {sorted(after)}")


def _run(command: list[object], ranks: int) -> bool:
    """Whether it was refused; every rank must then leave soon, with exit code 2, and one line."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        processes = []
        for rank in range(ranks):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            more = {**places, "MASTER_ADDR": "localhost", "MASTER_PORT": port} if ranks > 1 else {}
            given = (folder, {name: str(value) for name, value in more.items()}, [str(word) for word in command])
            processes.append(_server().Process(target=_be_program, args=given))
        for process in processes:
            process.start()
        multiprocessing.connection.wait([process.sentinel for process in processes], timeout=_SECONDS)
        end = time.monotonic() + (_SECONDS_TO_LEAVE if any(process.exitcode for process in processes) else _SECONDS)
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        text = "".join((pathlib.Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    if set(codes) == {0}:
        return False
    lines = [line for line in text.splitlines() if ": error: " in line]
    if set(codes) != {2} or "Traceback" in text or len(lines) != 1 or "make room" not in lines[0]:
        raise Lost(f"exit codes {codes}\n{text[-3000:]}")
    return True


# ------------------------------------------------------------------------------------------------ what is run


def _preprocessing(folder: pathlib.Path, work: pathlib.Path) -> list[object]:
    documents, embedder = folder / "room.jsonl", folder / "room-embedder"
    size = ["--vocab-size", 600, "--retro-block-size", 100, "--retro-index-str", "IVF16,RaBitQ"]
    input = ["--input", documents, "--retro-embedder", embedder, "--retro-retriever", "hybrid"]
    return ["tools/preprocess_retro_data.py", "--retro-work-dir", work, *input, *size]


def _training(folder: pathlib.Path, save: pathlib.Path) -> list[object]:
    flags = ["--retro-work-dir", make_work(folder), "--retro-add-retriever", *SHAPE]
    return ["pretrain_retro.py", *flags, "--train-iters", 2, "--save-interval", 1, "--save", save, "--load", save]


@functools.cache
def _preprocessed(folder: pathlib.Path) -> dict[str, str]:
    """What an undisturbed run makes, by file."""
    write_jsonl(folder / "room.jsonl", stdlib_texts(60))
    write_tiny_embedder(folder / "room-embedder")
    build(folder / "whole" / "work", *map(str, _preprocessing(folder, folder)[3:]))
    return tree(folder / "whole")


def _most(folder: pathlib.Path, trains: bool) -> int:
    """Bytes of a disk on which everything fits."""
    if trains:
        return 3_000_000
    return 2 * sum(file.stat().st_size for file in (folder / "whole").rglob("*") if file.is_file())


def _largest(folder: pathlib.Path, trains: bool) -> int:
    if trains:
        return 1_000_000
    return max(file.stat().st_size for file in (folder / "whole").rglob("*") if file.is_file())


# ------------------------------------------------------------------------------------------------ disks


@functools.cache
def _may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


@contextlib.contextmanager
def _disk(place: pathlib.Path, num_bytes: float | None) -> Iterator[pathlib.Path]:
    """A directory; a small disk of its own where a size is given."""
    place.mkdir()
    if num_bytes is None:
        yield place
        return
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={max(4096, round(num_bytes))}", "tmpfs", str(place)], check=True
    )
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
