"""Starts the programs: as a user would, or forked from a process that has imported what they take."""

import atexit
import functools
import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS = 300  # a program may take

# What takes the programs most of their start; `frozen` comes last.
_IMPORTED = ["faiss", "sentence_transformers", "megatron_retro.evaluation.evaluate", "megatron_retro.retrieval.changes"]
_IMPORTED += ["frozen"]


def command(*arguments: object, ranks: int = 1) -> list[str]:
    """`python …`, or `torchrun --nproc-per-node ranks …`."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*arguments: object, ranks: int = 1, expect: int = 0) -> str:
    """Run from the repository's root and return what it printed; its exit code must be `expect`."""
    done = subprocess.run(
        command(*arguments, ranks=ranks), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    return _checked(done.stdout + done.stderr, done.returncode, expect)


def run_forked(*arguments: object, ranks: int = 1, expect: int = 0) -> str:
    """As `run`, many times as quick to start: each rank is a fork. When one fails, the others are killed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = _start([folder] * ranks, arguments)
        code = _wait(processes)
        text = _printed(folder)
    return _checked(text, code, expect)


class LeftAlone:
    """Ranks that were started as `run_forked` starts them, but nobody ends one when another has ended.

    Args:
        folder: an empty one, for what each prints.
        sabotage: `module:function:arguments…` that each rank calls before the program, to break what is to be broken.
    """

    def __init__(self, folder: pathlib.Path, *arguments: object, ranks: int, sabotage: str = ""):
        self._folders = [folder / str(rank) for rank in range(ranks)]
        for of_rank in self._folders:
            of_rank.mkdir(parents=True)
        self._processes = _start(self._folders, arguments, sabotage)

    def wait_until_printed(self, rank: int, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in self.printed(rank):
            assert time.monotonic() < end and self._processes[rank].is_alive(), f"no {text!r}\n{self.printed(rank)}"
            time.sleep(0.02)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self._processes[rank].pid, number)

    def printed(self, rank: int) -> str:
        return _printed(self._folders[rank])

    def wait(self, *ranks: int, seconds: float = 120) -> dict[int, int]:
        """Exit codes of these ranks, which must end; what else still runs is then killed."""
        end = time.monotonic() + seconds
        try:
            for rank in ranks:
                self._processes[rank].join(max(0.0, end - time.monotonic()))
                assert not self._processes[rank].is_alive(), f"rank {rank} did not end\n{self.printed(rank)}"
            return {rank: self._processes[rank].exitcode for rank in ranks}
        finally:
            self.kill()

    def wait_for_all(self, seconds: float = SECONDS, seconds_apart: float = 60) -> list[tuple[int, float]]:
        """Exit code and end (`time.time()`) of each rank; killed (-9) is who has not ended so long after a failure."""
        ends: dict[int, tuple[int, float]] = {}
        latest = time.time() + seconds
        while len(ends) < len(self._processes) and time.time() < latest:
            running = {process.sentinel: rank for rank, process in enumerate(self._processes) if rank not in ends}
            for sentinel in multiprocessing.connection.wait(list(running), timeout=latest - time.time()):
                process = self._processes[running[sentinel]]
                process.join()
                ends[running[sentinel]] = process.exitcode, time.time()
                if process.exitcode:
                    latest = min(latest, time.time() + seconds_apart)
        self.kill()
        return [ends.get(rank, (-9, time.time())) for rank in range(len(self._processes))]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _start(folders: Sequence[pathlib.Path | str], arguments: Sequence[object], sabotage: str = "") -> list[Any]:
    """A process for each of the folders that their output goes to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes, ranks = [], len(folders)
    for rank, folder in enumerate(folders):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        more = {**places, "MASTER_ADDR": "localhost", "MASTER_PORT": port} if ranks > 1 else {}
        given = (str(folder), {name: str(value) for name, value in more.items()}, [str(word) for word in arguments])
        processes.append(_server().Process(target=_be_program, args=(*given, sabotage)))
    for process in processes:
        process.start()
    return processes


def _printed(folder: pathlib.Path | str) -> str:
    files = [pathlib.Path(folder) / name for name in ("stdout", "stderr")]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.exists())


def _checked(text: str, code: int, expect: int) -> str:
    assert code == expect, f"exit code {code}\n{text}"
    return text


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    paths = f"{ROOT}:{ROOT / 'tests'}"
    with unittest.mock.patch.dict(os.environ, {**environment(), "PYTHONPATH": paths}):
        multiprocessing.forkserver.ensure_running()  # it imports now
    return context


def _be_program(folder: str, more: dict[str, str], arguments: list[str], sabotage: str = "") -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.update(more)
    sys.argv = arguments
    if sabotage:
        module, function, *words = sabotage.split(":")
        getattr(importlib.import_module(module), function)(*words)
    runpy.run_path(arguments[0], run_name="__main__")
    atexit._run_exitfuncs()  # which an interpreter does at its end, multiprocessing does not


def _wait(processes: list[Any]) -> int:
    """The first exit code that is not 0, if there is one."""
    running, code = {process.sentinel: process for process in processes}, 0
    try:
        while running and not code:
            ended = multiprocessing.connection.wait(list(running), timeout=SECONDS)
            assert ended, f"no program ended in {SECONDS} seconds"
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                code = code or process.exitcode
    finally:
        for process in running.values():
            process.kill()
            process.join()
    return code
