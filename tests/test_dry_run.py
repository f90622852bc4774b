"""--dry-run: what it says is what a run takes, and it says it without running."""

import json
import pathlib
import re
import sys

import pytest
from launch import ROOT, run, run_forked

WORKER = ROOT / "tests" / "dry_run_worker.py"
SMALL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --micro-batch-size 2 --retro-layers 2,3"
).split()
READS = "--retro-add-retriever --retro-encoder-hidden-size 32 --retro-encoder-num-attention-heads 2".split()
LAYOUTS = {
    "gpt": (1, []),
    "retro": (1, READS),
    "bf16": (1, [*READS, "--bf16", "--normalization", "RMSNorm", "--swiglu", "--global-batch-size", "6"]),
    "tensor-parallel": (2, [*READS, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--bf16"]),
    "pipeline": (2, [*READS, "--pipeline-model-parallel-size", "2", "--global-batch-size", "10"]),
}


def found_beside_planned(what: str, flags: list[str], ranks: int = 1) -> list[dict[str, list[float]]]:
    lines = run_forked(WORKER, what, *flags, ranks=ranks).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_counts_the_bytes_and_flops_of_real_tensors(layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    found = found_beside_planned("tensors", [*SMALL, *flags], ranks)
    assert len(found) == ranks
    for of_rank in found:
        for name, (planned, counted) in of_rank.items():
            assert planned == pytest.approx(counted, rel=2e-3), (name, of_rank)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("flags", [[], READS, [*READS, "--bf16"]], ids=["gpt", "retro", "bf16"])
def test_planned_peak_is_that_of_the_process(flags: list[str]) -> None:
    large = "--num-layers 3 --hidden-size 512 --num-attention-heads 8 --seq-length 256 --micro-batch-size 4".split()
    (found,) = found_beside_planned("process", [*large, "--retro-layers", "2,3", *flags])
    planned, measured = found["peak"]
    assert planned > 200 * 2**20
    assert planned == pytest.approx(measured, rel=0.1)
