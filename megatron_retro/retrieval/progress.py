"""Progress of a stage: a bar on a terminal, else a plain line every ten seconds. Rank 0 alone prints."""

import contextlib
import pathlib
import resource
import sys
import time
from typing import Any

from megatron_retro import distributed

_SECONDS_BETWEEN_LINES = 10


class Progress:
    """Counts units of work that are done.

    Args:
        stage: what is being done.
        total: units in all.
        unit: their name, in the plural.
        done: units that an earlier run finished; they do not count for the rate.
        together: the units are those of all ranks, not of this rank alone.
    """

    def __init__(self, stage: str, total: int, unit: str, done: int = 0, together: bool = False):
        self._stage, self._total, self._unit = stage, total, unit
        self._first, self._done, self._start = done, done, time.monotonic()
        self._next_line = self._start + _SECONDS_BETWEEN_LINES
        self._bar: Any = None
        ranks = 1 if together else distributed.world_size()
        self._ranks = f" on each of {ranks} ranks" if ranks > 1 else ""
        self._prints = distributed.rank() == 0
        if self._prints and sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(desc=stage, total=total, unit=f" {unit}", initial=done)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int) -> None:
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
        elif self._prints and time.monotonic() >= self._next_line:
            say(self._line())
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def _line(self) -> str:
        rate = (self._done - self._first) / max(1e-9, time.monotonic() - self._start)
        left = (self._total - self._done) / max(1e-9, rate)
        share = f"{self._done:,} of {self._total:,} {self._unit}"
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"{self._stage}: {share}, {shown}/s{self._ranks}, {duration(left)} left"


def say(line: str) -> None:
    """Print a line, on rank 0."""
    if distributed.rank() == 0:
        print(line, file=sys.stderr, flush=True)


def forget_peak_memory() -> None:
    """Let `peak_memory` count from here on, where the system can."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most memory that this process has held, files that are mapped into it included, in bytes."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def duration(seconds: float) -> str:
    """Like "3 h 20 min", "5 min 10 s" or "4 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
