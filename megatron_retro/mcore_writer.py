"""Writes megatron-core's checkpoints in the process that trains. Used by `mcore.py` alone.

megatron-core 0.16 leaves writing to helper processes, and waits forever for one that died; what rank 0 alone cannot
write leaves the other ranks waiting. Here every rank writes its own files, in two threads, and what fails is kept until
all ranks have come to the end of the save.
"""

import concurrent.futures
import contextlib
import pathlib
import queue
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from megatron_retro import storage


@contextlib.contextmanager
def writing_here() -> Iterator[list[OSError]]:
    """Around `dist_checkpointing.save`, which then ends on every rank; yields what this rank could not write."""
    failures: list[OSError] = []

    def kept(write: Callable) -> Callable:
        def call(*arguments: Any, **more: Any) -> None:
            try:
                write(*arguments, **more)
            except OSError as error:
                failures.append(error)

        return call

    def write_buckets(transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue) -> None:
        with concurrent.futures.ThreadPoolExecutor(len(buckets)) as threads:
            waiting = [threads.submit(_write_bucket, bucket, transforms) for bucket in buckets]
        written: dict[int, list] = {}
        for number, future in enumerate(waiting):
            written[number] = []
            try:
                written[number] = future.result()
            except OSError as error:
                failures.append(error)
        results.put(written)

    writer = filesystem_async.FileSystemWriterAsync
    with (
        unittest.mock.patch.object(common.TorchCommonSaveStrategy, "save_common", kept(_save_common)),
        unittest.mock.patch.object(writer, "finish", kept(writer.finish)),
        unittest.mock.patch.object(serialization, "save_config", kept(serialization.save_config)),
        unittest.mock.patch.object(writer, "write_preloaded_data_multiproc", staticmethod(write_buckets)),
        unittest.mock.patch.object(filesystem_async, "_get_write_results_queue", queue.Queue),
    ):
        yield failures


def _save_common(strategy: Any, state: dict, directory: str) -> None:
    if torch.distributed.get_rank() == 0:
        with storage.for_library(pathlib.Path(directory) / common.COMMON_STATE_FNAME) as stream:
            torch.save(state, stream)


def _write_bucket(bucket: Any, transforms: list) -> list:
    """One file of tensors; where each of them lies."""
    path, name, (objects, tensors) = bucket
    with storage.for_library(pathlib.Path(path)) as stream:
        return [
            _write_item(transforms[0], stream, data, item, name, serialization_format=SerializationFormat.TORCH_SAVE)
            for item, data in [*objects, *tensors]
        ]
