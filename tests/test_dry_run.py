"""--dry-run: what it says is what a run takes, and it says so without running."""

import json
import pathlib
import re
import shutil
import sys

import pytest
from launch import ROOT, run_forked

from megatron_retro.config.flags import parse
from megatron_retro.config.training import PretrainConfig
from megatron_retro.distributed import world_size
from megatron_retro.errors import UserError
from megatron_retro.training.dry_run import _ranges, dry_run

WORKER = ROOT / "tests" / "dry_run_worker.py"
SMALL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --micro-batch-size 2 --retro-layers 2,3"
).split()
TWO = "--num-layers 2 --retro-layers 1,2 --retro-encoder-layers 1".split()
READS = "--retro-add-retriever --retro-encoder-hidden-size 32 --retro-encoder-num-attention-heads 2".split()
VIRTUAL = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 12".split()
VIRTUAL += ["--retro-encoder-layers", "1"]
LAYOUTS = {
    "one rank": (1, [*TWO, *READS, "--bf16", "--normalization", "RMSNorm", "--swiglu", "--global-batch-size", "6"]),
    "tensor-parallel": (2, [*TWO, *READS, "--bf16", "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pipeline": (2, [*READS, "--pipeline-model-parallel-size", "2", "--global-batch-size", "8"]),
    "interleaved": (2, [*READS, "--bf16", *VIRTUAL]),
    "sharded": (2, [*TWO, *READS, "--bf16", "--use-distributed-optimizer"]),
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
        assert of_rank["activations full"] < of_rank["activations selective"] < of_rank["activations None"]
        for name, (planned, counted) in of_rank.items():
            assert planned == pytest.approx(counted, rel=2e-3), (name, of_rank)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("flags", [[], [*READS, "--recompute-granularity", "selective"]], ids=["gpt", "retro"])
def test_planned_peak_is_that_of_the_process(flags: list[str]) -> None:
    large = "--num-layers 3 --hidden-size 512 --num-attention-heads 8 --seq-length 256 --micro-batch-size 4".split()
    (found,) = found_beside_planned("process", [*large, "--retro-layers", "2,3", *flags])
    planned, measured = found["peak"]
    assert planned > 200 * 2**20
    assert planned == pytest.approx(measured, rel=0.1)


def test_it_plans_many_ranks_from_the_manifest_alone(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    work, save = tmp_path / "work", tmp_path / "save"
    work.mkdir()
    shutil.copy(small_work / "manifest.json", work)
    sixteen = tmp_path / "of_sixteen.py"  # forks have the environment of the process that they come from
    sixteen.write_text(
        "import os, runpy\nos.environ['WORLD_SIZE'] = '16'\nrunpy.run_path('pretrain_retro.py', run_name='__main__')\n"
    )
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --global-batch-size 16".split()
    text = run_forked(sixteen, "--retro-work-dir", work, "--save", save, *SMALL, *TWO, *READS, *layout, "--dry-run")
    assert "TP 2 × PP 2 × DP 4" in text and "tokens/s on 16 ranks" in text and "2 micro-batches" in text
    stages = re.findall(r"^ +\d +(\d-\d)(?: \+ encoder)? +([0-9.]+)M +.* ([0-9.]+)$", text, re.MULTILINE)
    assert [layers for layers, *_ in stages] == ["1-1", "2-2"] and _ranges((1, 2, 3, 7, 9)) == "1-3,7-7,9-9"
    assert all(float(peak) > 0 for *_, peak in stages)
    assert "MiB a micro-batch from a rank of one stage to the next" in text
    assert not save.exists()


def test_launched_it_speaks_once(small_work: pathlib.Path) -> None:
    flags = ["--retro-work-dir", small_work, *SMALL, "--pipeline-model-parallel-size", 2, "--dry-run"]
    text = run_forked("pretrain_retro.py", *flags, ranks=2)
    assert text.count("GiB of tensors") == 1 and text.startswith("GPT")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-length", "100"], "--seq-length 100 is no multiple of the work dir's chunk length 64"),
        (["--retro-add-retriever", "--retro-num-neighbors", "99"], "--retro-num-neighbors 99 is more than"),
        (["--split", "1,1,1"], "--split 1,1,1 differs"),
        (["--retro-work-dir", "/nowhere"], "--retro-work-dir /nowhere holds no manifest.json"),
    ],
)
def test_it_refuses_what_training_refuses(small_work: pathlib.Path, flags: list[str], message: str) -> None:
    config = parse(PretrainConfig, ["--retro-work-dir", str(small_work), *SMALL, *flags])
    config.finish(1)
    with pytest.raises(UserError, match=message):
        dry_run(config, 1)


@pytest.mark.parametrize("given", ["many", "0", "-4"])
def test_a_wrong_number_of_ranks_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(UserError, match=f"WORLD_SIZE is '{given}'"):
        world_size()
