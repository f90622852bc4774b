"""Ranks that take longer than their peers for their own work, and for what of it.

Every tenth step the ranks tell each other their own seconds by phase; what they wait for each other is nobody's own.
Peers are the ranks of a pipeline stage. Where a stage has one rank all ranks are, by seconds a piece of work: in
forward and backward by the stage's multiply-adds, in the optimizer by its parameters.
"""

import dataclasses

import numpy as np
import torch
import torch.distributed as dist

from megatron_retro import mcore
from megatron_retro.training.timing import DATA, FORWARD_BACKWARD, OPTIMIZER, StepClock

STEPS, FACTOR = 10, 1.5  # compared after so many steps; slower than so many medians is named
_OWN = (DATA, FORWARD_BACKWARD, OPTIMIZER)


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A rank that is slow.

    Attributes:
        phase: that it loses most time in.
        factor: its seconds ÷ the median of its peers.
    """

    rank: int
    phase: str
    factor: float


class Stragglers:
    """Looks for the slowest rank.

    Args:
        clock: of the steps.
        multiply_adds: a token, of this rank's stage.
        parameters: of this rank.
    """

    def __init__(self, clock: StepClock, multiply_adds: float, parameters: int):
        self._clock, self._work = clock, (1.0, multiply_adds, float(parameters))
        self._steps, self._before, self._known = 0, clock.total(), -1

    def after_step(self) -> Straggler | None:
        """Every rank calls it after every step: the slowest rank, on all of them, when it has not been named already.

        What is slow in the first step is set-up, and left out.
        """
        self._steps += 1
        if dist.get_world_size() == 1 or self._steps % STEPS != 1:
            return None
        now = self._clock.total()
        spent, self._before = [now[phase] - self._before[phase] for phase in _OWN], now
        if self._steps == 1:
            return None
        mine = torch.tensor([*spent, *self._work, mcore.parallel_state.get_pipeline_model_parallel_rank()])
        mine = mine.double().to(mcore.device())
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        table = torch.stack(every).cpu().numpy()
        found = slowest(table[:, :3], table[:, 3:6], table[:, 6])
        before, self._known = self._known, found.rank if found else -1
        return found if self._known not in (before, -1) else None


def slowest(seconds_WxP: np.ndarray, work_WxP: np.ndarray, stage_W: np.ndarray) -> Straggler | None:
    """The slowest of W ranks, if it is too slow.

    Args:
        seconds_WxP: of each rank in the phases data, forward and backward, optimizer.
        work_WxP: what it had to do there, in any unit, above 0.
        stage_W: number of its pipeline stage.
    """
    alone = len(set(stage_W.tolist())) == len(stage_W)
    worst = None
    for stage in [None] if alone else sorted(set(stage_W.tolist())):
        ranks = np.arange(len(stage_W)) if stage is None else np.flatnonzero(stage_W == stage)
        paces_RxP = seconds_WxP[ranks] * work_WxP[ranks].mean(0) / work_WxP[ranks]
        total_R = paces_RxP.sum(1)
        slow = int(total_R.argmax())
        factor = float(total_R[slow] / max(_median(total_R[:, None])[0], 1e-9))
        if factor > max(FACTOR, worst.factor if worst else 0):
            excess_P = paces_RxP[slow] - _median(paces_RxP)
            worst = Straggler(int(ranks[slow]), _OWN[int(excess_P.argmax())], factor)
    return worst


def _median(x_RxP: np.ndarray) -> np.ndarray:
    """The lower one, so that of two ranks the slow one stands out."""
    return np.sort(x_RxP, axis=0)[(len(x_RxP) - 1) // 2]
