"""Ranks outside of megatron-core: who am I, wait for all, fail together.

Works under `torchrun` and as a plain process (rank 0 of 1, no process group).
"""

import contextlib
import datetime
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_retro import watch
from megatron_retro.errors import UserError, as_told

Result = TypeVar("Result")

_DAYS_OF_WORK = 7  # one rank's share of a task may take so much longer than another's
_TO_START = datetime.timedelta(minutes=1)
_AFTER_THE_WATCH = datetime.timedelta(seconds=20)

# Through these methods goes all communication, whichever function of torch.distributed was called and under which name.
_COLLECTIVES = (
    "all",
    "_all",
    "broadcast",
    "gather",
    "reduce",
    "_reduce",
    "scatter",
    "send",
    "recv",
    "_end_coalescing",
    "barrier",
)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size(otherwise: int = 1) -> int:
    """Number of ranks; `otherwise` in a process that no launcher started.

    Raises:
        UserError: WORLD_SIZE is no number of ranks.
    """
    given = os.environ.get("WORLD_SIZE")
    if given is None:
        return otherwise
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"WORLD_SIZE is {given!r}; it takes a number of ranks, from 1")
    return int(given)


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def use_this_ranks_share() -> int:
    """Give torch this rank's GPU and its share of the machine's cores; returns the number of threads.

    torchrun sets OMP_NUM_THREADS=1 for several ranks; any other value is the user's and is kept.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if local_world_size() > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size()))
    return torch.get_num_threads()


def init_gloo(timeout_minutes: float) -> None:
    """Join the ranks over gloo, once; nothing to do for a single plain process.

    They may wait for each other for as long as each gives signs of life, at the latest every `timeout_minutes`.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        join("gloo", timeout_minutes, datetime.timedelta(days=_DAYS_OF_WORK))


def join(backend: str, timeout_minutes: float, may_wait: datetime.timedelta | None = None) -> None:
    """Find the other ranks, watch over them, and form the process group.

    Args:
        timeout_minutes: without a sign of a rank, until the others give up.
        may_wait: how long one collective may take; without it as long, and a little more, so that the watch, which
            knows whom it waits for, is there first.

    Raises:
        UserError: not all ranks came.
    """
    import torch.distributed as dist

    timeout = datetime.timedelta(minutes=timeout_minutes)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=max(timeout, _TO_START)))
    except dist.DistError as error:
        raise UserError(
            f"rank {os.environ.get('RANK')} found no {os.environ.get('WORLD_SIZE')} ranks at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within "
            f"--distributed-timeout-minutes {timeout_minutes:g} ({str(error).splitlines()[0]}); see whether all started"
        ) from None
    if size > 1:
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        watch.start(store, rank, size, timeout.total_seconds(), "torchrun's process" if by_agent else "rank 0")
        observe_collectives(watch.waiting)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=size,
        timeout=may_wait or collective_timeout(timeout_minutes),
    )


def collective_timeout(timeout_minutes: float) -> datetime.timedelta:
    """For process groups, where the watch gives up after `timeout_minutes`."""
    return datetime.timedelta(minutes=timeout_minutes) + _AFTER_THE_WATCH


def observe_collectives(around: Callable[[], contextlib.AbstractContextManager]) -> Callable[[], None]:
    """From now on run each collective, send and receive, and each wait for one, inside `around()`.

    Returns:
        What ends this.
    """
    import torch.distributed as dist

    methods: list[tuple[type, str]] = [
        (dist.ProcessGroup, name) for name in vars(dist.ProcessGroup) if name.startswith(_COLLECTIVES)
    ]
    methods.append((dist.Work, "wait"))
    originals = [(owner, name, vars(owner)[name]) for owner, name in methods]  # getattr's would lose their `self`
    for owner, name, original in originals:
        setattr(owner, name, _inside(around, original))

    def stop() -> None:
        for owner, name, original in originals:
            setattr(owner, name, original)

    return stop


def _inside(around: Callable[[], contextlib.AbstractContextManager], function: Callable) -> Callable:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return called


def all_gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order."""
    dist = sys.modules.get("torch.distributed")  # nobody has joined ranks without importing it
    if dist is None or not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with watch.waiting():
        dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], Result]) -> Result:
    """Run `work` on this rank and wait for all; if it raised on any rank, raise that error on every rank.

    `work` must not communicate: a rank that failed would leave the others waiting. Where another rank has hours of work
    before it, it does not come here: the watch ends it, with that error.

    Raises:
        UserError: some rank's `work` raised it.
        RuntimeError: some rank's `work` raised anything else.
    """
    error: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as caught:  # re-raised below, on every rank
        error = caught
        watch.tell(*as_told(error))
    try:
        reports = all_gather(
            None if error is None else (isinstance(error, UserError), str(error), type(error).__name__)
        )
    except RuntimeError:
        if error is not None:  # the others have left because of it
            raise error from None
        raise
    if error is not None:
        watch.take_back()
        raise error
    for failed_rank, report in enumerate(reports):
        if report is not None:
            by_user, message, kind = report
            raise UserError(message) if by_user else RuntimeError(f"rank {failed_rank} failed: {kind}: {message}")
    return result  # type: ignore[return-value]
