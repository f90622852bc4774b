"""Recomputation changes what is kept, and not one bit of what comes out."""

import weakref

import pytest
import torch
from model_helpers import make_model, make_neighbors, make_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro import mcore
from megatron_retro.model.model import RetroModel
from megatron_retro.model.recompute import Recompute

DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.1)
LLAMA = dict(normalization="RMSNorm", swiglu=True, disable_bias_linear=True)


class Alive(TorchDispatchMode):
    """Counts the bytes of what was made under it and is still there."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple) else (result,):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self._storages.values() if storage() is not None)


def run(granularity: str | None, **flags: object) -> tuple[int, list[torch.Tensor]]:
    """(bytes kept for the backward pass, loss and gradients)."""
    model = make_model(recompute_granularity=granularity, **flags)
    neighbors, lengths = make_neighbors()
    mcore.reseed(1)
    with Alive() as alive:
        loss, _ = model(
            make_tokens(), make_tokens(seed=4), neighbor_tokens_BxLxKxR=neighbors, neighbor_lengths_BxLxK=lengths
        )
    kept = alive.bytes()
    loss.backward()
    return kept, [loss, *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("flags", [{}, DROPOUT, LLAMA], ids=["gpt", "dropout", "llama"])
def test_keeps_less_and_computes_the_same(flags: dict) -> None:
    everything, expected = run(None, **flags)
    selective, found = run("selective", **flags)
    assert all(map(torch.equal, found, expected))
    full, found = run("full", **flags)
    assert all(map(torch.equal, found, expected))
    assert full < 0.5 * everything and full < selective < 0.9 * everything


def test_evaluation_runs_each_step_once() -> None:
    model: RetroModel = make_model(recompute_granularity="full").eval()
    calls: list[int] = []
    model.decoder.layers.get_submodule("0").mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(make_tokens())
    assert len(calls) == 1


def test_a_recipe_stands_for_one_tensor_only() -> None:
    x = torch.rand(3, 5, requires_grad=True)
    made, made_again = x.exp(), []
    with Recompute("selective").kept_as_recipe(made, lambda: made_again.append(1) or x.exp()):
        out = made * x  # keeps both, which are of one size
    out.sum().backward()
    assert len(made_again) == 1
    assert torch.equal(x.grad, torch.autograd.grad((x.exp() * x).sum(), x)[0])
