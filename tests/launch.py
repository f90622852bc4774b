"""Starts the programs: as a user would, or forked from a process that has imported what they take."""

import atexit
import functools
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
import unittest.mock
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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            more = {**places, "MASTER_ADDR": "localhost", "MASTER_PORT": port} if ranks > 1 else {}
            given = (folder, {name: str(value) for name, value in more.items()}, [str(word) for word in arguments])
            processes.append(_server().Process(target=_be_program, args=given))
        for process in processes:
            process.start()
        code = _wait(processes)
        texts = [(pathlib.Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return _checked("".join(texts), code, expect)


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


def _be_program(folder: str, more: dict[str, str], arguments: list[str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.update(more)
    sys.argv = arguments
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
