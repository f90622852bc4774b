"""Hostile input: the fuzz tests of tests/test_hostile.py with more examples, each reader on files of any bytes."""

import pathlib
import re
import subprocess
import sys

from launch import ROOT, environment

from torture.trials import Result


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """`count` files for each reader; there are no single trials, so `only` tells nothing apart."""
    command = [sys.executable, "-m", "pytest", "tests/test_hostile.py", "-o", "addopts=", "-q", "-rA"]
    done = subprocess.run(
        [*command, "--basetemp", str(folder / "tests")],
        cwd=ROOT,
        env={**environment(), "RETRO_FUZZ_EXAMPLES": str(count)},
        capture_output=True,
        text=True,
    )
    ended = set(re.findall(r"^(PASSED|FAILED|ERROR) (tests/\S+::[^\n]*?)(?: - |$)", done.stdout, re.M))
    readers = {test for _, test in ended if "any_bytes_are_read_or_refused[" in test}
    failures = sorted(test for how, test in ended if how != "PASSED")
    if done.returncode and not failures:
        failures = [f"pytest ended with exit code {done.returncode}"]
    if failures:
        print((done.stdout + done.stderr)[-20_000:], file=sys.stderr, flush=True)
    return Result(
        "Whatever a file's bytes are, its reader counts and skips what is no good or ends in one line, in memory that "
        "does not grow with the file, and never runs code from it.",
        "Random bytes, spliced pieces and mutations of valid files (hypothesis) for every reader; documents of "
        "1.5 million tokens and endless lines under RLIMIT_AS; pickles, YAML tags, indices that point outside.",
        f"{len(readers)} readers × {count} files",
        failures,
    )
