"""Bad numbers, and being told to stop: nothing poisoned is kept, all ranks decide alike, the state is saved."""

import collections
import contextlib
import json
import math
import os
import pathlib
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from launch import run_forked
from model_helpers import initialize

from megatron_retro.config import flags
from megatron_retro.config.flags import parse
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.training import DataConfig, PretrainConfig
from megatron_retro.data.samples import Samples
from megatron_retro.errors import UserError
from megatron_retro.training.bad_steps import LossWatch, report
from megatron_retro.training.checkpoint import RunState, trains_alike
from megatron_retro.training.data import TrainingData
from megatron_retro.training.log import RunLog
from megatron_retro.training.step import Step
from megatron_retro.training.stopping import SIGNALS, StopRequest, TimeLimit

SMALL = (
    "--retro-add-retriever --num-layers 2 --retro-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 128 "
    "--micro-batch-size 2 --global-batch-size 4 --eval-iters 0 --log-interval 1 --lr 1e-2 --num-workers 0"
).split()
GLOBAL_BATCH = 4


class Runs:
    """Runs of one --save directory with faults, two ranks each."""

    def __init__(self, folder: pathlib.Path, work: pathlib.Path):
        self.save, self._work, self._folder, self._number = folder / "save", work, folder, 0

    def __call__(self, faults: dict[int, str], arguments: str, expect: int = 0) -> str:
        self._number += 1
        self.trace = self._folder / f"trace{self._number}"
        self.trace.mkdir()
        given = ["--retro-work-dir", self._work, "--save", self.save, "--load", self.save, *SMALL, *arguments.split()]
        program = ["tests/fault_worker.py", self.trace, json.dumps(faults)]
        return run_forked(*program, *given, ranks=2, expect=expect)

    def steps(self) -> list[dict[int, dict]]:
        """Of each rank: update -> what the last run noted of it."""
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(self.trace.iterdir())]
        return [{line["update"]: line for line in of_rank} for of_rank in lines]

    def report(self, update: int) -> dict:
        return json.loads((self.save / "bad_steps" / f"iter_{update:07d}.json").read_text())

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.save.glob("iter_*"))

    def metrics(self, key: str) -> dict[int, object]:
        lines = [json.loads(line) for line in (self.save / "metrics.jsonl").read_text().splitlines()]
        return {line["iteration"]: line[key] for line in lines if key in line}


@pytest.fixture
def runs(tmp_path: pathlib.Path, small_work: pathlib.Path) -> Runs:
    return Runs(tmp_path, small_work)


def test_stop_then_skip(runs: Runs, small_work: pathlib.Path) -> None:
    """A loss that only the last pipeline stage knows stops both; the state before it goes on at another layout."""
    text = runs({3: "nan_loss"}, "--train-iters 30 --pipeline-model-parallel-size 2", expect=2)
    line = next(line for line in text.splitlines() if ": error: " in line)
    assert "iteration 3: the loss is nan and the gradient norm is nan; no update was made" in line
    assert "--on-bad-step skip" in line and "Traceback" not in text
    before = [steps[3]["before"] for steps in runs.steps()]
    for steps in runs.steps():
        assert steps[3]["after"] == steps[3]["before"] == steps[2]["after"] != steps[2]["before"]
        assert steps[3]["bad"] and not steps[2]["bad"]
    assert runs.checkpoints() == ["iter_0000002"]
    assert runs.metrics("bad_step") == {3: "the loss is nan and the gradient norm is nan"}
    assert_describes(runs.report(3), 3, small_work)
    assert {sample["loss"] for sample in runs.report(3)["samples"]} == {"nan"}

    runs({3: "nan_loss"}, "--train-iters 30 --pipeline-model-parallel-size 2", expect=2)
    assert [steps[3]["before"] for steps in runs.steps()] == before  # what was saved is the state before the step
    assert runs.checkpoints() == ["iter_0000002"]

    faults = {3: "nan_norm", 6: "spike", **dict.fromkeys(range(8, 30), "nan_loss")}
    text = runs(faults, "--train-iters 30 --on-bad-step skip", expect=2)
    assert "iteration 17: " in text and "the last of 10 bad steps in a row" in text
    steps = runs.steps()
    for of_rank in steps:
        bad = [number for number, step in of_rank.items() if step["bad"]]
        assert bad == [3, 6, *range(8, 18)]
        assert all((of_rank[number]["after"] == of_rank[number]["before"]) == (number in bad) for number in of_rank)
    assert steps[0][3]["bad"] == "the gradient norm is not finite on another rank"
    assert "is a spike, above" in steps[0][6]["bad"] and steps[0][6]["bad"] == steps[1][6]["bad"]
    assert sorted(runs.metrics("lm_loss")) == [1, 2, 4, 5, 7]
    assert "NaN" not in (runs.save / "metrics.jsonl").read_text()
    assert runs.checkpoints() == ["iter_0000002", "iter_0000016"]
    losses = [sample["loss"] for sample in runs.report(8)["samples"]]
    assert losses[2:] == ["nan", "nan"] and all(math.isfinite(loss) for loss in losses[:2])  # the second rank's
    assert [sample["rank"] for sample in runs.report(8)["samples"]] == [0, 0, 1, 1]


def train_samples(work: pathlib.Path) -> Samples:
    return TrainingData.open(str(work), retrieve=True).samples(
        "train", DataConfig(), RetroConfig(), seq_length=128, num_samples=120, training=True
    )


def assert_describes(report: dict, update: int, work: pathlib.Path) -> None:
    ids = (update - 1) * GLOBAL_BATCH + np.arange(GLOBAL_BATCH)
    samples = train_samples(work)
    assert report["iteration"] == update
    assert [sample["id"] for sample in report["samples"]] == ids.tolist()
    assert [sample["chunks"] for sample in report["samples"]] == [samples.chunks(n).tolist() for n in ids]
    neighbors = np.array([sample["neighbors"] for sample in report["samples"]])
    read = samples.batch(ids)
    assert read.neighbor_tokens_BxLxKxR is not None and neighbors.max() >= 0
    tokens, _ = samples.table.tokens(neighbors.reshape(-1), 128, samples._pad)
    assert np.array_equal(read.neighbor_tokens_BxLxKxR.numpy().reshape(tokens.shape), tokens)


def test_rewind_and_no_poisoned_checkpoint(runs: Runs) -> None:
    """With the distributed optimizer. In the end one rank's moments are poisoned: nothing is saved."""
    sharded = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    faults = {4: "nan_loss", 6: "nan_moment"}
    text = runs(faults, f"{sharded} --train-iters 6 --save-interval 2 --on-bad-step rewind", expect=2)
    assert f"weights and optimizer are those of {runs.save / 'iter_0000002'} again" in text
    for steps in runs.steps():
        assert steps[4]["bad"] and steps[4]["before"] == steps[4]["after"] == steps[3]["after"]
        assert steps[5]["before"] == steps[3]["before"]  # as when update 2 was done and saved
        assert not steps[5]["bad"] and steps[5]["after"] != steps[5]["before"]
    assert "iteration 6: weights or Adam's moments are not finite numbers, so they are not saved" in text
    assert runs.checkpoints() == ["iter_0000002"]  # not behind a bad step
    consumed = runs.metrics("consumed_samples")
    assert consumed == {update: update * GLOBAL_BATCH for update in (1, 2, 3, 5, 6)}


def test_all_ranks_end_after_the_step_in_which_one_is_told_to(runs: Runs) -> None:
    text = runs({2: "SIGUSR2"}, "--train-iters 20")
    assert "exiting after iteration 2 as asked by a signal or the file STOP" in text
    assert [sorted(steps) for steps in runs.steps()] == [[1, 2], [1, 2]]
    runs({3: "stop_file"}, "--train-iters 20")
    assert [sorted(steps) for steps in runs.steps()] == [[3], [3]]
    assert runs.checkpoints() == ["iter_0000002", "iter_0000003"]
    assert (runs.save / "STOP.obeyed").exists() and not (runs.save / "STOP").exists()


# ------------------------------------------------------------------------------------------ one part after the other


def made_step(loss: float, grad_norm: float = 1.0, is_finite: bool = True) -> Step:
    return Step(loss, grad_norm, is_finite, 1.0, False, False, [])


def test_spikes() -> None:
    watch, draws = LossWatch([], 0), np.random.default_rng(0)
    assert watch.judge(made_step(50.0)) is None  # nothing to compare it with
    for loss in 3 + 0.1 * draws.standard_normal(200):
        assert watch.judge(made_step(loss)) is None
    assert len(watch.losses) == 128 and 50.0 not in watch.losses
    assert watch.judge(made_step(3.3)) is None
    again = LossWatch(json.loads(json.dumps(list(watch.losses))), watch.in_a_row)
    for loss in (4.1, 3.2, 3.5, 3.62, math.nan, 3.61, 3.63):
        step = made_step(loss, is_finite=math.isfinite(loss))
        assert watch.judge(step) == again.judge(step)
        assert watch.in_a_row == again.in_a_row
    assert "spike" in (watch.judge(made_step(4.0)) or "")
    assert "the gradient norm is inf" in (watch.judge(made_step(3.0, math.inf, False)) or "")
    assert watch.in_a_row >= 2 and watch.judge(made_step(3.0)) is None and watch.in_a_row == 0


def test_a_ripple_on_flat_losses_is_no_spike() -> None:
    watch = LossWatch([2.0] * 128, 0)
    assert watch.judge(made_step(2.1)) is None
    assert watch.judge(made_step(2.2)) is not None


def test_losses_of_other_training_are_no_measure() -> None:
    def config(more: str = "") -> PretrainConfig:
        return parse(PretrainConfig, f"--retro-work-dir x --num-layers 2 --seq-length 64 {more}".split())

    state = RunState(3, 12, json.loads(json.dumps(flags.to_dict(config("--data-path a b")))), 128, 64, "", "")
    for more in ("", "--train-iters 50 --save y --tensor-model-parallel-size 2 --on-bad-step skip"):
        assert trains_alike(state, config(f"--data-path a b {more}"))
    for more in ("--data-path a", "--data-path a b --lr 1e-3", "--data-path a b --retro-retrieval-dropout 0.5"):
        assert not trains_alike(state, config(more))


def test_without_save_the_report_is_told(small_work: pathlib.Path) -> None:
    initialize()
    samples = train_samples(small_work)
    text = report(None, 5, made_step(math.inf, is_finite=False), samples, 16 + np.arange(GLOBAL_BATCH))
    assert "\n" not in text and json.loads(text)["loss"] == "inf"
    assert_describes(json.loads(text), 5, small_work)


def test_rewind_needs_save() -> None:
    config = parse(PretrainConfig, "--retro-work-dir x --on-bad-step rewind".split())
    with pytest.raises(UserError, match="--on-bad-step rewind needs --save"):
        config.finish(world_size=1)


def test_time_limit() -> None:
    """Each step, evaluation, and save of a run fits in, whichever comes when."""
    for costs in ([10.0] * 99, [30.0, *[10.0] * 99], [10.0, 10.0, 45.0, *[10.0] * 99]):
        now = [100.0]
        limit = TimeLimit(10, started=70.0, clock=lambda now=now: now[0])
        for number, cost in enumerate(costs):
            now[0] += cost
            near = limit.is_near()
            if number % 5 == 4 or near:
                now[0] += 50
                limit.saved(50.0)
            if near:
                break
        assert 600 - 50 - 2 * max(costs) - 50 < now[0] - 70 <= 600
    assert not TimeLimit(None, started=0.0).is_near()


@contextlib.contextmanager
def own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        collections.deque(map(signal.signal, before.keys(), before.values()), maxlen=0)


def test_signals_and_the_stop_file(tmp_path: pathlib.Path) -> None:
    for number in SIGNALS:
        with own_handlers():
            stop = StopRequest(None)
            assert not stop.is_made()
            os.kill(os.getpid(), number)
            assert stop.is_made()
            if number == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), number)
    with own_handlers():
        stop = StopRequest(str(tmp_path))
        assert not stop.is_made()
        stop.obeyed()
        (tmp_path / "STOP").touch()
        assert stop.is_made()
        stop.obeyed()
        assert not stop.is_made() and (tmp_path / "STOP.obeyed").exists()


@pytest.mark.parametrize("torn", ['{"iteration": 2, "lm_', '{"iteration": 2}', ""])
def test_a_torn_line_is_cut(tmp_path: pathlib.Path, torn: str) -> None:
    file = tmp_path / "metrics.jsonl"
    for whole in ("", '{"iteration": 1}\n'):
        file.write_text(whole + torn)
        log = RunLog(str(tmp_path), None, 3)
        log.write(2, {"lm_loss": 1.5, "valid_loss_on": math.inf, "bad_step": "why"})
        log.close()
        assert (
            file.read_text() == whole + '{"iteration": 2, "lm_loss": 1.5, "valid_loss_on": null, "bad_step": "why"}\n'
        )
