"""How bad input ends: one line, exit code 2, on every rank."""

import atexit
import os
import sys
import time
from collections.abc import Callable

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
    is still there by then has found what rank 0 did not, and prints it. Ctrl-C ends with exit code 130.
    """
    try:
        main()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave(0)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(_SECONDS_FOR_RANK_0)
        where = "" if rank == "0" else f"rank {rank}: "
        print(f"{os.path.basename(sys.argv[0])}: error: {where}{error}", file=sys.stderr, flush=True)
        _leave(2)
    except KeyboardInterrupt:
        _leave(130)


def _leave(code: int) -> None:
    """End at once: threads of a process group would now and then abort, or hang, the interpreter's own shutdown.

    Its first step is still taken, for helper processes (megatron-core's, of a save) end there: orphans would keep this
    program's output open, and whoever reads it waiting.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
