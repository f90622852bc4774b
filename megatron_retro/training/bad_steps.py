"""Steps whose numbers are bad: which they are, and what is written down of each.

A step is bad when the loss or the gradient norm is not a finite number on some rank, or when the loss is a spike: far
above those of the last good steps. A bad step changes no weights. What happens then is --on-bad-step's:

    stop    save the state before the step, end the run
    skip    go on with the next samples
    rewind  put weights and optimizer back to the newest checkpoint, then go on with the next samples (PaLM's way past
            spikes, arXiv 2204.02311, section 5.1): counters and learning rate do not go back
"""

import collections
import json
import math
import pathlib
from typing import Any

import numpy as np

from megatron_retro import distributed, mcore
from megatron_retro.storage import write_atomically
from megatron_retro.training.data import TrainingSamples
from megatron_retro.training.step import Step

MOST_IN_A_ROW = 10  # bad steps, after which no policy helps

_WINDOW, _LEAST = 128, 32  # good losses that a spike is measured by; none is called before there are so many
_DEVIATIONS = 6
_FLOOR = 0.01  # smallest standard deviation, as a share of the mean: where losses hardly differ, no ripple is a spike


class LossWatch:
    """Tells bad steps from good ones. Equal on all ranks, for it sees only what they agreed on.

    Attributes:
        losses: of the last good steps, oldest first; a checkpoint holds them, so that a resumed run judges alike.
        in_a_row: bad steps since the last good one.
    """

    def __init__(self, losses: list[float], in_a_row: int):
        self.losses, self.in_a_row = collections.deque(losses, maxlen=_WINDOW), in_a_row

    def judge(self, step: Step) -> str | None:
        """Why a step is bad, None for a good one; either is remembered."""
        reason = self._reason(step)
        if reason is None:
            self.losses.append(step.loss)
        self.in_a_row = 0 if reason is None else self.in_a_row + 1
        return reason

    def _reason(self, step: Step) -> str | None:
        if not step.is_finite:
            numbers = {"loss": step.loss, "gradient norm": step.grad_norm}
            bad = [f"the {name} is {number}" for name, number in numbers.items() if not math.isfinite(number)]
            return " and ".join(bad) or "the gradient norm is not finite on another rank"
        if len(self.losses) >= _LEAST and step.loss > (limit := spike_limit(list(self.losses))):
            return f"the loss {step.loss:.4f} is a spike, above {limit:.4f} (mean + 6 σ of the good losses before it)"
        return None


def spike_limit(losses: list[float]) -> float:
    """The loss above which a step is a spike, after good steps of these losses."""
    mean = math.fsum(losses) / len(losses)
    deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / len(losses))
    return mean + _DEVIATIONS * max(deviation, _FLOOR * abs(mean))


def last_words(bad: str, policy: str, in_a_row: int, save: str | None) -> str:
    """The line that a run ends with.

    Args:
        bad: which step, and why.
        save: the directory that holds the state before the step; None for none.
    """
    state = f"{save} holds the state before it" if save else "without --save the weights are lost"
    if in_a_row >= MOST_IN_A_ROW:
        return f"{bad}; it is the last of {in_a_row} bad steps in a row; {state}; look at the data, or lower --lr"
    if policy == "rewind":
        return f"{bad}, and there is no checkpoint yet to rewind to; {state}; --on-bad-step skip goes on behind it"
    return (
        f"{bad}; no update was made and {state}; --on-bad-step skip or rewind goes on with the samples behind it; "
        "where steps stay bad, lower --lr and go back with --ckpt-step"
    )


def report(directory: str | None, iteration: int, step: Step, samples: TrainingSamples, ids: np.ndarray) -> str:
    """Write down what a bad step read; every rank calls it.

    Args:
        directory: where `bad_steps/iter_0000123.json` goes; None to have it all in the answer.
        iteration: of the step.
        ids: of the global batch's samples.

    Returns:
        On rank 0 the file's path, or the report itself.
    """
    losses = _losses(step)

    def write() -> str:
        if distributed.rank():
            return ""
        numbers = {"loss": _json(step.loss), "grad_norm": _json(step.grad_norm)}
        facts = {"iteration": iteration, "reason": step.bad, **numbers, "samples": _samples(samples, ids, losses)}
        if not directory:
            return json.dumps(facts)
        path = pathlib.Path(directory) / "bad_steps" / f"iter_{iteration:07d}.json"
        write_atomically(path, lambda file: file.write(json.dumps(facts, indent=1).encode()))
        return str(path)

    return distributed.together(write)


def _samples(samples: TrainingSamples, ids: np.ndarray, losses: dict[int, tuple[float, int]]) -> list[dict[str, Any]]:
    """What each sample of a batch is made of: it follows from its id, so any rank can tell."""
    described = []
    for sample, parts in zip(ids.tolist(), samples.described(ids), strict=True):
        loss, rank = losses.get(sample, (math.nan, None))
        described.append({"id": sample, "loss": _json(loss), "rank": rank, **parts})
    return described


def _losses(step: Step) -> dict[int, tuple[float, int]]:
    """Sample -> (nats a predicted token, the rank that computed them)."""
    mine: list[tuple[int, float]] = []
    for report in step.reports if mcore.parallel_state.get_tensor_model_parallel_rank() == 0 else []:
        means = report["loss"].double() / report["tokens"].double().clamp(min=1)
        mine += zip(report["ids"].tolist(), means.tolist(), strict=True)
    of_ranks = enumerate(distributed.all_gather(mine))
    return {sample: (loss, rank) for rank, pairs in of_ranks for sample, loss in pairs}


def _json(number: float) -> float | str:
    """JSON has no word for numbers that are not finite."""
    return number if math.isfinite(number) else str(number)
