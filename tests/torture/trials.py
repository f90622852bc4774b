"""Trials of a campaign: two at a time, each repeatable from its number, with a line of progress."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator


class Lost(AssertionError):
    """A promise was not kept; the message tells how."""


@contextlib.contextmanager
def telling(story: list[str]) -> Iterator[None]:
    """Around a trial: what was done to it so far becomes part of what is told when it is lost."""
    try:
        yield
    except Lost as lost:
        raise Lost("\n".join([str(lost), *story])) from None


@dataclasses.dataclass
class Result:
    """One row of the table of docs/reliability.md.

    Attributes:
        promise: what holds.
        how: how it was tested.
        count: of what, in words.
        failures: what was lost, a line each.
        found: figures worth telling, in words.
    """

    promise: str
    how: str
    count: str
    failures: list[str]
    found: str = ""


def run_trials(
    name: str, numbers: list[int], trial: Callable[[int, pathlib.Path], object], *, at_once: int = 2
) -> list[str]:
    """Run trials, each in a directory of its own; the failures, with the command that repeats each."""
    failures, start, told = [], time.monotonic(), 0.0

    def one(number: int) -> str:
        with tempfile.TemporaryDirectory() as folder:
            try:
                trial(number, pathlib.Path(folder))
            except Exception as error:
                why = str(error) if isinstance(error, Lost) else traceback.format_exc()
                return f"{name} {number}: {why} (again: make torture ONLY={name}:{number})"
        return ""

    with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
        for done, failure in enumerate(
            concurrent.futures.as_completed(map(lambda n: threads.submit(one, n), numbers)), 1
        ):
            if failure.result():
                failures.append(failure.result())
                say(failures[-1])
            if time.monotonic() - told > 10 or done == len(numbers):
                told = time.monotonic()
                say(f"{name}: {done} of {len(numbers)}, {len(failures)} failed, {told - start:.0f} s")
    return failures


def seeds(count: int, only: int | None) -> list[int]:
    """The numbers of all trials, or just of `only`."""
    return list(range(count)) if only is None else [only]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
