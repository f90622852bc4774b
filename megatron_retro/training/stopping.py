"""When a run shall save and end before its last update: it is told to, or its time is nearly up."""

import os
import pathlib
import signal
import time
from collections.abc import Callable
from types import FrameType

from megatron_retro import distributed

# What schedulers and people send: SLURM's warning before the time limit is what the job's script asks for.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_UNKNOWN_SAVE = 120.0  # seconds that a first save may take, but at most a tenth of the time given


class StopRequest:
    """Remembers the signals, and looks for a file `STOP`. A second SIGINT ends the program at once.

    Args:
        save: the directory where rank 0 looks for the file; None for nowhere.
    """

    def __init__(self, save: str | None):
        self._received = self._interrupted = False
        self._file = pathlib.Path(save) / "STOP" if save and distributed.rank() == 0 else None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def is_made(self) -> bool:
        return self._received or (self._file is not None and self._file.exists())

    def obeyed(self) -> None:
        """Set the file aside, as `STOP.obeyed`: it shall not stop the next run."""
        if self._file is not None and self._file.exists():
            os.replace(self._file, self._file.with_name("STOP.obeyed"))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if number != signal.SIGINT:
            return
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        if distributed.rank() == 0:  # print could be what was interrupted
            os.write(2, b"saving after this step; Ctrl-C again ends at once, without\n")


class TimeLimit:
    """Whether there is time for one more step and a save.

    Made when the first step begins.

    Args:
        minutes: that the program may take, from `started`; None for ever.
        started: seconds, by `clock`.
    """

    def __init__(self, minutes: float | None, started: float, clock: Callable[[], float] = time.monotonic):
        seconds = float("inf") if minutes is None else 60 * minutes
        self._clock, self._end = clock, started + seconds
        self._longest_step, self._save = 0.0, min(_UNKNOWN_SAVE, seconds / 10)
        self._asked = clock()

    def is_near(self) -> bool:
        """Asked once a step. What comes between two askings (evaluation, saving) counts to the step."""
        now = self._clock()
        self._longest_step = max(self._longest_step, now - self._asked)
        self._asked = now
        return now + self._longest_step + self._save > self._end

    def saved(self, seconds: float) -> None:
        """A save took so long; the next one may too."""
        self._save = seconds
