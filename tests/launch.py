"""Starts the programs as a user would."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


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
        command(*arguments, ranks=ranks), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    text = done.stdout + done.stderr
    assert done.returncode == expect, f"exit code {done.returncode}\n{text}"
    return text
