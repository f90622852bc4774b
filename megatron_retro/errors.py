"""How programs end: bad input in one line with exit code 2, a failure in a traceback, and on every rank."""

import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable

from megatron_retro import watch

_LONGEST = 2000  # characters of a message
_SECONDS_FOR_RANK_0 = 5.0  # to say what it has found as well


class UserError(ValueError):
    """Bad input: the message names what, where, which flag, both values, and the way out."""

    def __str__(self) -> str:
        """One line, of printable characters, whatever a file put into it."""
        line = "".join(letter if letter.isprintable() else " " for letter in super().__str__())
        return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a program's `main`; a `UserError` becomes one line and exit code 2 on every rank.

    Rank 0 prints the line. Launchers end all ranks when one has ended, so the others leave a little later; one that
    is still there by then has found what rank 0 did not, and prints it. Ctrl-C ends with exit code 130. Any other
    exception is told to the other ranks; one that says no more than that another rank is not there ends with the line
    that names that rank (see `watch`).
    """
    try:
        main()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave(0)
    except (UserError, KeyboardInterrupt) as error:
        said, code = as_told(error)
        _end_with(said, code)
        _leave(code)
    except Exception as error:
        if not watch.is_on():
            raise
        if watch.is_lost_connection(error):
            watch.await_verdict(error)
        traceback.print_exc()
        watch.leave_with(*as_told(error))
        _leave(1)


def as_told(error: BaseException) -> tuple[str, int]:
    """What an error is in one line, and the exit code that it ends a program with."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}", 1


def _end_with(said: str, code: int) -> None:
    """Tell the other ranks, and the user."""
    rank, is_said = os.environ.get("RANK", "0"), code != 2
    if rank != "0":
        if code == 2 and not watch.is_on():
            time.sleep(_SECONDS_FOR_RANK_0)
        is_said |= watch.leave_with(said, code)
    if not is_said:
        where = "" if rank == "0" else f"rank {rank}: "
        print(f"{os.path.basename(sys.argv[0])}: error: {where}{said}", file=sys.stderr, flush=True)
    if rank == "0":
        watch.leave_with(said, code)


def _leave(code: int) -> None:
    """End at once: threads of a process group would now and then abort, or hang, the interpreter's own shutdown.

    Its first step is still taken, for helper processes (that read samples ahead) end there: orphans would keep this
    program's output open, and whoever reads it waiting.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
