"""What the time of steps goes into, without holding a step up.

On a CPU the host's time. On a GPU that of the current stream between CUDA events, which are looked at when they have
passed: what overlaps with computation counts nothing, nor does reading that ends before the GPU needs it.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_retro import distributed, mcore, watch

DATA, FORWARD_BACKWARD, COMMUNICATION, OPTIMIZER = PHASES = ("data", "forward_backward", "communication", "optimizer")
_OTHER = "other"
_PLACES = {DATA: "the samples", FORWARD_BACKWARD: "the forward and backward pass", OPTIMIZER: "the optimizer"}


class StepClock:
    """Seconds by phase, summed over steps. A phase inside another is taken out of that one."""

    def __init__(self) -> None:
        self._gpu = mcore.has_gpu()
        self._seconds = dict.fromkeys((*PHASES, _OTHER), 0.0)
        self._taken = dict(self._seconds)
        self._phases: list[str] = []
        self._marks: collections.deque[tuple[Any, str | None]] = collections.deque()  # when; the phase from then on

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: only in there is anything counted, communication where it happens."""
        self._sum_up(wait=False)
        stop = distributed.observe_collectives(functools.partial(self.phase, COMMUNICATION))
        try:
            with self.phase(_OTHER):
                yield
        finally:
            stop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self._mark()
        try:
            with watch.doing(_PLACES[name]) if name in _PLACES else contextlib.nullcontext():
                yield
        finally:
            self._phases.pop()
            self._mark()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, those of none as "other"; on a GPU it waits for the steps to end."""
        self._sum_up(wait=True)
        before, self._taken = self._taken, dict(self._seconds)
        return {phase: seconds - before[phase] for phase, seconds in self._seconds.items()}

    def total(self) -> dict[str, float]:
        """Seconds by phase of all steps, on a GPU of what has come to its end."""
        self._sum_up(wait=False)
        return dict(self._seconds)

    def _mark(self) -> None:
        phase = self._phases[-1] if self._phases else None
        if not self._gpu:
            self._marks.append((time.perf_counter(), phase))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((event, phase))

    def _sum_up(self, *, wait: bool) -> None:
        """Count what lies between marks, on a GPU up to the last that has passed."""
        if wait and self._gpu and self._marks:
            self._marks[-1][0].synchronize()
        while len(self._marks) > 1 and (not self._gpu or self._marks[1][0].query()):
            begin, phase = self._marks.popleft()
            end = self._marks[0][0]
            if phase is not None:
                self._seconds[phase] += begin.elapsed_time(end) / 1e3 if self._gpu else end - begin


def speed_figures(clock: StepClock, tokens: int, flops_a_token: float, best_rate: float) -> dict[str, float]:
    """Figures of the run's speed since this was called before, means over its ranks.

    Args:
        tokens: that all ranks together trained on since then.
        best_rate: FLOP/s of a matrix product on this rank.
    """
    seconds = clock.take()
    mean = torch.tensor([*(seconds[phase] for phase in PHASES), sum(seconds.values()), best_rate], dtype=torch.float64)
    mean = mean.to(mcore.device())
    dist.all_reduce(mean)
    *of_phases, total, rate = (mean / dist.get_world_size()).tolist()
    reached = tokens * flops_a_token / dist.get_world_size() / total
    return {
        "tokens_per_second": tokens / total,
        "model_tflops_per_second": reached / 1e12,
        "matmul_share": reached / rate,
        **{f"{phase}_share": of_phase / total for phase, of_phase in zip(PHASES, of_phases, strict=True)},
    }
