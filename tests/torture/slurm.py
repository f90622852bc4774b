"""Training on two nodes of a SLURM cluster that ends its jobs early: what is requeued ends as if nothing had been."""

import os
import pathlib
import signal

from cluster import Cluster
from launch import ROOT, run_forked

from torture.training import make_work, metrics_lines
from torture.trials import Result, run_trials, seeds

SMALL = (
    "--retro-add-retriever --num-layers 2 --retro-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 128 "
    "--micro-batch-size 1 --global-batch-size 4 --eval-iters 0 --log-interval 1 --hidden-dropout 0.1"
).split()


def requeued_training(folder: pathlib.Path, work: pathlib.Path, *, times: int, iterations: int) -> None:
    """Warn a job's tasks `times` times that their time is nearly up, and let it run to its end.

    Args:
        folder: empty.
        work: a work dir to train on.

    Raises:
        AssertionError: a loss, gradient norm or learning rate differs from the uninterrupted run's.
    """
    flags = [*SMALL, "--train-iters", str(iterations)]
    run_forked("pretrain_retro.py", "--retro-work-dir", work, "--save", folder / "whole", *flags, ranks=2)
    cluster = Cluster(folder / "cluster", ROOT, work)
    try:
        cluster.sbatch("pretrain.sbatch", *flags)
        for attempt in range(times):
            begun = _last_iteration(cluster.save)
            cluster.wait_until(lambda begun=begun: _last_iteration(cluster.save) > begun)  # type: ignore[misc]
            for task in cluster.tasks():
                os.kill(task, signal.SIGUSR1)
            cluster.wait_until(lambda attempt=attempt: cluster.times_requeued() > attempt)  # type: ignore[misc]
        code, output = cluster.finish()
    finally:
        cluster.kill_leftovers()
    assert code == 0 and cluster.times_requeued() == times, output
    assert _figures(cluster.save) == _figures(folder / "whole"), output


def _figures(save: pathlib.Path) -> dict[int, tuple]:
    return {
        line["iteration"]: (line["lm_loss"], line["grad_norm"], line["learning_rate"])
        for line in metrics_lines(save)
        if "lm_loss" in line  # others name stragglers
    }


def _last_iteration(save: pathlib.Path) -> int:
    return max(_figures(save), default=0)


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """`count` jobs of three requeues each, or the one of number `only`."""
    work = make_work(folder)
    failures = run_trials(
        "slurm",
        seeds(count, only),
        lambda _, place: requeued_training(place, work, times=3, iterations=60),
        at_once=1,
    )
    return Result(
        "A SLURM job that is warned of its time limit saves, exits and requeues itself; losses, gradient norms and "
        "learning rates are those of a run that was not interrupted.",
        "`examples/pretrain.sbatch` under stand-ins for `srun` and `scontrol` that start two nodes here; SIGUSR1 to "
        "the tasks.",
        f"{3 * count} requeues",
        failures,
    )
