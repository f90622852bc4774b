"""The clock of training steps, and the matrix product that they are measured by."""

import pytest
import torch
import torch.distributed as dist
from model_helpers import initialize

from megatron_retro import mcore
from megatron_retro.training import timing
from megatron_retro.training.matrix_rate import matrix_product, matrix_rate
from megatron_retro.training.timing import COMMUNICATION, DATA, FORWARD_BACKWARD, OPTIMIZER, StepClock


class Hand:
    """A clock that is moved by hand."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(timing, "time", hand)
    monkeypatch.setattr(mcore, "has_gpu", lambda: False)
    return hand


def test_a_phase_inside_another_counts_once(hand: Hand) -> None:
    clock = StepClock()
    for _ in range(2):
        hand.now += 100  # between steps
        with clock.step():
            hand.now += 1
            with clock.phase(FORWARD_BACKWARD):
                hand.now += 2
                with clock.phase(DATA):
                    hand.now += 3
                with clock.phase(COMMUNICATION), clock.phase(COMMUNICATION):
                    hand.now += 4
                hand.now += 5
            with clock.phase(OPTIMIZER):
                hand.now += 6
    expected = {DATA: 6, FORWARD_BACKWARD: 14, COMMUNICATION: 8, OPTIMIZER: 12, "other": 2}
    assert clock.take() == expected
    assert clock.take() == dict.fromkeys(expected, 0)


def test_collectives_and_their_waits_are_communication(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    initialize()
    all_reduce, wait = dist.ProcessGroup.allreduce, dist.Work.wait

    def slow_all_reduce(*arguments: object) -> object:
        hand.now += 1
        return all_reduce(*arguments)

    def slow_wait(*arguments: object) -> object:
        hand.now += 10
        return wait(*arguments)

    monkeypatch.setattr(dist.ProcessGroup, "allreduce", slow_all_reduce)
    monkeypatch.setattr(dist.Work, "wait", slow_wait)
    clock, number = StepClock(), torch.ones(1)
    dist.all_reduce(number)  # in no step
    with clock.step():
        dist.all_reduce(number)
        with clock.phase(OPTIMIZER):
            work = dist.all_reduce(number, async_op=True)
            hand.now += 100
            work.wait()
    assert dist.ProcessGroup.allreduce is slow_all_reduce and dist.Work.wait is slow_wait
    seconds = clock.take()
    assert seconds[COMMUNICATION] == 22 and seconds[OPTIMIZER] == 100 and sum(seconds.values()) == 122


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_rate(dtype: torch.dtype) -> None:
    _, flop = matrix_product(dtype)
    assert flop > 1e9
    assert 1e8 < matrix_rate(dtype) < 1e16


@pytest.mark.gpu
def test_on_a_gpu_the_stream_is_timed() -> None:
    multiply, _ = matrix_product(torch.bfloat16)
    clock = StepClock()
    for _ in range(3):
        with clock.step():
            with clock.phase(DATA):
                pass
            with clock.phase(FORWARD_BACKWARD):
                multiply()  # returns long before it is done
    seconds = clock.take()
    assert seconds[FORWARD_BACKWARD] > 10 * seconds[DATA] >= 0
