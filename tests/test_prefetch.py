"""The data path of training: no file is opened once it runs, and reading ahead changes nothing but the time."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from launch import run_forked

from megatron_retro.config.model import RetroConfig
from megatron_retro.config.training import DataConfig
from megatron_retro.data.samples import Samples
from megatron_retro.training.data import TrainingData
from megatron_retro.training.prefetch import Prefetched


@pytest.fixture
def samples(small_work: pathlib.Path) -> Samples:
    data = TrainingData.open(str(small_work), retrieve=True)
    retro = RetroConfig(retro_add_retriever=True, retro_random_neighbor_prob=0.2, retro_max_overlap=0.5)
    return data.samples("train", DataConfig(), retro, seq_length=256, num_samples=200, training=True)


def opened_during(work: Callable[[], object]) -> list[str]:
    """The files that Python opens while `work` runs."""
    opened, watching = [], True

    def note(event: str, arguments: tuple) -> None:
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(note)  # which stays for the life of the process
    work()
    watching = False
    return opened


def test_no_file_is_opened_while_samples_are_read(samples: Samples, tmp_path: pathlib.Path) -> None:
    assert opened_during(lambda: (tmp_path / "some").write_text("")) == [str(tmp_path / "some")]
    assert opened_during(lambda: [samples.batch(np.arange(first, first + 4)) for first in range(0, 200, 4)]) == []


def test_read_ahead_the_batches_are_the_same(samples: Samples) -> None:
    order = [np.arange(first, first + 3) for first in range(5, 50, 3)]
    ahead = Prefetched(samples, iter(order), num_workers=2)
    for ids in order:
        expected, found = samples.batch(ids), ahead.batch(ids)
        for field in dataclasses.fields(expected):
            one, other = getattr(expected, field.name), getattr(found, field.name)
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else same(one, other), field.name
    with pytest.raises(AssertionError, match=r"\[ 8  9 10\] were read, not \[0 1 2\]"):
        Prefetched(samples, iter(order[1:]), num_workers=1).batch(np.arange(3))


FAILING = """
import types
from megatron_retro.errors import UserError, exit_on_user_error
from megatron_retro.training.prefetch import Prefetched

class Source:
    def batch(self, ids):
        return types.SimpleNamespace(sample_ids=ids)

def main():
    source = Prefetched(Source(), ([n] for n in range(1000)), num_workers=2)
    source.batch([0])
    raise UserError("enough")

exit_on_user_error(main)
"""


def test_a_program_that_fails_ends_its_readers(tmp_path: pathlib.Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    assert "failing.py: error: enough" in run_forked(tmp_path / "failing.py", expect=2)


def test_benchmark_reports_the_loader(small_work: pathlib.Path) -> None:
    small = "--preset cpu-tiny --samples 8 --num-layers 2 --hidden-size 32 --num-attention-heads 2 --retro-layers 1"
    output = run_forked("benchmarks/data_path.py", "--retro-work-dir", small_work, *small.split())
    line = json.loads(output.splitlines()[-1])
    assert line["samples"] == 8 and line["opened_files"] == 0
    assert line["tokens_per_cpu_second"] == pytest.approx(256 * line["samples_per_cpu_second"], rel=1e-3)
    step_seconds_a_sample = line["step_tflop"] / line["matmul_tflops_per_second"] / 4
    assert line["loader_over_step"] == pytest.approx(step_seconds_a_sample * line["samples_per_cpu_second"], rel=0.1)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
