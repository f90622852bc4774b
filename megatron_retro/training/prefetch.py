"""Samples read ahead of their step, by processes of their own, into pinned memory where there is a GPU."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from megatron_retro import mcore
from megatron_retro.data.samples import Batch
from megatron_retro.training.stopping import SIGNALS


class BatchSource(Protocol):
    """What a training step reads: `Samples`, or the same ahead of time."""

    def batch(self, sample_ids: np.ndarray) -> Batch:
        """The samples of ids [B] int64."""


class Prefetched:
    """A source that is read in an order known before.

    Args:
        samples: read by forks of this process, which share its memory-mapped files.
        order: the ids [B] of every batch to come.
        num_workers: processes; each reads two batches ahead.
    """

    def __init__(self, samples: BatchSource, order: Iterator[np.ndarray], num_workers: int):
        others = set(multiprocessing.active_children())
        self._batches = iter(
            DataLoader(
                _ById(samples),
                sampler=order,  # type: ignore[arg-type]
                batch_size=None,  # the sampler gives whole batches
                num_workers=num_workers,
                multiprocessing_context="fork",
                pin_memory=mcore.has_gpu(),
                worker_init_fn=_leave_signals_to_the_parent,
            )
        )
        atexit.register(_kill, set(multiprocessing.active_children()) - others)

    def batch(self, sample_ids: np.ndarray) -> Batch:
        """The next batch; it must be the one of `sample_ids`."""
        batch = next(self._batches)
        assert np.array_equal(batch.sample_ids, sample_ids), f"{batch.sample_ids} were read, not {sample_ids}"
        return batch


class _ById(Dataset):
    def __init__(self, samples: BatchSource):
        self._samples = samples

    def __getitem__(self, sample_ids: np.ndarray) -> Batch:
        return self._samples.batch(sample_ids)


def _kill(workers: set[Any]) -> None:
    """At the end of a program that failed, else they have ended. Python would send SIGTERM, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for each
    for worker in workers:
        worker.kill()


def _leave_signals_to_the_parent(_: int) -> None:
    """A scheduler signals all processes of a job; the parent then saves, and needs batches until it ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
