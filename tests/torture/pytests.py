"""Campaigns that are files of the test suite."""

import pathlib
import re
import subprocess
import sys

from launch import ROOT, environment


def run(folder: pathlib.Path, file: str, more: dict[str, str] | None = None) -> tuple[list[str], list[str]]:
    """Run a test file with `more` environment; (the tests that ended, those of them that failed)."""
    command = [sys.executable, "-m", "pytest", file, "-o", "addopts=", "-q", "-rA"]
    command += ["--basetemp", str(folder / "tests")]
    done = subprocess.run(command, cwd=ROOT, env={**environment(), **(more or {})}, capture_output=True, text=True)
    ended = sorted(set(re.findall(r"^(PASSED|FAILED|ERROR) (tests/\S+::[^\n]*?)(?: - |$)", done.stdout, re.M)))
    failures = sorted(test for how, test in ended if how != "PASSED")
    if done.returncode and not failures:
        failures = [f"pytest ended with exit code {done.returncode}"]
    if failures:
        print((done.stdout + done.stderr)[-20_000:], file=sys.stderr, flush=True)
    return [test for _, test in ended], failures
