"""Ranks outside of megatron-core: who am I, wait for all, fail together.

Works under `torchrun` and as a plain process (rank 0 of 1, no process group).
"""

import datetime
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_retro.errors import UserError

Result = TypeVar("Result")


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
    """Join the ranks over gloo, once; nothing to do for a single plain process."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=timeout_minutes))


def all_gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order."""
    dist = sys.modules.get("torch.distributed")  # nobody has joined ranks without importing it
    if dist is None or not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], Result]) -> Result:
    """Run `work` on this rank and wait for all; if it raised on any rank, raise that error on every rank.

    `work` must not communicate: a rank that failed would leave the others waiting.

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
    reports = all_gather(None if error is None else (isinstance(error, UserError), str(error), type(error).__name__))
    if error is not None:
        raise error
    for failed_rank, report in enumerate(reports):
        if report is not None:
            by_user, message, kind = report
            raise UserError(message) if by_user else RuntimeError(f"rank {failed_rank} failed: {kind}: {message}")
    return result  # type: ignore[return-value]
