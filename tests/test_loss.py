"""The loss in chunks: cross-entropy and its gradients, without the logits of a whole batch."""

import pytest
import torch
import torch.nn.functional as F
from model_helpers import initialize
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.model import loss

T, D, V = 13, 7, 31


@pytest.fixture(autouse=True, scope="module")
def one_process() -> None:
    initialize()


@pytest.fixture(params=[1, 5, 13], ids="{} at once".format)
def positions_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", request.param * V)
    return request.param


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, D, generator=draw).to(dtype).requires_grad_() for size in (T, V))
    return x, weight, torch.randint(V, (T,), generator=draw), torch.randint(2, (T,), generator=draw).float()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_cross_entropy(positions_at_once: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weight, labels, mask = make_inputs(dtype)
    total, by_position = loss.cross_entropy(x, weight, labels, mask)
    (total * 3).backward()
    wide_x, wide_weight = (given.detach().float().requires_grad_() for given in (x, weight))
    expected = F.cross_entropy(wide_x @ wide_weight.t(), labels, reduction="none")
    ((expected * mask).sum() * 3).backward()
    assert not by_position.requires_grad
    torch.testing.assert_close(by_position, expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total, (by_position * mask).sum())
    for given, wide in ((x, wide_x), (weight, wide_weight)):
        assert given.grad.dtype == dtype
        assert (given.grad.float() - wide.grad).norm() <= tolerance * wide.grad.norm()


def test_makes_only_the_gradients_that_are_asked_for(positions_at_once: int) -> None:
    x, weight, labels, mask = make_inputs()
    frozen, _ = loss.cross_entropy(x, weight.detach(), labels, mask)
    frozen.backward()
    assert x.grad is not None and weight.grad is None
    with torch.no_grad():
        alone, _ = loss.cross_entropy(x, weight, labels, mask)
    assert torch.equal(alone, frozen) and not alone.requires_grad


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made under it."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_never_holds_the_logits_of_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", 5 * V)
    with Largest() as largest:
        total, _ = loss.cross_entropy(*make_inputs())
        total.backward()
    assert largest.elements <= max(5 * V, V * D) < T * V
