"""How bad input ends: one line, exit code 2, on every rank."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: the message names what, where, which flag, both values, and the way out."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a program's `main`; a `UserError` becomes one line on rank 0 and exit code 2 on every rank.

    Ctrl-C ends it with exit code 130.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    except KeyboardInterrupt:
        _leave(130)


def _leave(code: int) -> None:
    """End at once: a process group's threads, waiting for other ranks, may crash or hang the interpreter's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
