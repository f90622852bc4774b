"""What `launch.LeftAlone` breaks in a rank before the program starts."""

import os
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

from megatron_retro import mcore
from megatron_retro.data.samples import Samples
from megatron_retro.errors import UserError
from megatron_retro.retrieval.embedding import Embedder

# Where a rank can meet its end: in which call, from 0, of which function.
_WHERE: dict[str, tuple[Any, str, int]] = {
    "preprocessing": (Embedder, "embed", 0),
    "training": (Samples, "batch", 5),
    "save": (mcore, "save_state", 0),
    "evaluation": (Samples, "batch", 1),
}


def _before(owner: Any, name: str, act: Callable[[int], Any]) -> None:
    """Call `act(number of the call)` before each call of a method."""
    original, calls = getattr(owner, name), iter(range(10**9))

    def method(*arguments: Any, **more: Any) -> Any:
        act(next(calls))
        return original(*arguments, **more)

    unittest.mock.patch.object(owner, name, method).start()


def signal_itself(where: str, rank: str, number: str) -> None:
    """Let a rank send a signal to itself in the middle of something."""
    owner, name, call = _WHERE[where]

    def act(calls: int) -> None:
        if calls == call and os.environ["RANK"] == rank:
            os.kill(os.getpid(), int(number))

    _before(owner, name, act)


def fail_in_the_fourth_batch() -> None:
    def act(number: int) -> None:
        if number == 3 and os.environ["RANK"] == "1":
            raise ValueError("no luck")

    _before(Samples, "batch", act)


def read_slowly() -> None:
    _before(Samples, "batch", lambda number: time.sleep(0.2 * (os.environ["RANK"] == "1")))


def refuse_a_block_while_rank_0_has_hours_of_work() -> None:
    def act(number: int) -> None:
        if os.environ["RANK"] == "1":
            raise UserError("no such block")
        time.sleep(1000)

    _before(Embedder, "embed_blocks", act)
