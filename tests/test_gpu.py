"""On a GPU: the losses are those of a CPU, whole programs run, and a benchmark reports."""

import json
import pathlib

import pytest
import torch
from conftest import SMALL, build
from launch import ROOT, run

pytestmark = pytest.mark.gpu
TESTS = ROOT / "tests"


def test_losses_are_those_of_a_cpu(tmp_path: pathlib.Path) -> None:
    golden = json.loads((TESTS / "golden_losses.json").read_text())
    layouts = [*golden, "1x1xselective:2,4", "1x1xfull:2,4"]
    run(TESTS / "parallel_worker.py", tmp_path / "out.pt", *layouts)
    for layout, result in torch.load(tmp_path / "out.pt").items():
        expected = golden[layout if layout in golden else "1x1:2,4"]
        assert result["loss"] == pytest.approx(expected, rel=1e-3 if "bf16" in layout else 1e-4), layout


@pytest.fixture(scope="module")
def work(small_input: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A work dir whose neighbors share words: it needs no embedder, which the machine may lack."""
    directory = tmp_path_factory.mktemp("work")
    build(directory, "--input", str(small_input), *SMALL, "--retro-retriever", "bm25")
    return directory


@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_pretraining_resumes(work: pathlib.Path, tmp_path: pathlib.Path, precision: str) -> None:
    shape = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 128 --retro-layers 1 --swiglu"
    save = f"--retro-add-retriever --save {tmp_path} --load {tmp_path} --log-interval 1 {precision}"
    for last in (2, 4):
        iterations = f"--train-iters 4 --exit-interval {last} --lr-warmup-iters 1"
        run("pretrain_retro.py", "--retro-work-dir", work, *shape.split(), *save.split(), *iterations.split())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4]
    assert all(0 < line["lm_loss"] < 15 for line in lines if "lm_loss" in line)


def test_benchmark_reports_the_gpu() -> None:
    output = run("benchmarks/train_step.py", "--steps", 2, "--dtype", "bf16", "--model", "gpt", "retro")
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == 2 and all(line["device"] != "cpu" and line["peak_gib"] > 0 for line in lines)
