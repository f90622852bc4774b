"""Recomputation changes what is kept, and not one bit of what comes out."""

import pytest
import torch
from model_helpers import make_model, make_neighbors, make_tokens

from megatron_retro import mcore
from megatron_retro.model.model import RetroModel
from megatron_retro.model.recompute import Recompute
from megatron_retro.training.live_bytes import LiveBytes

DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.1)
LLAMA = dict(normalization="RMSNorm", swiglu=True, disable_bias_linear=True)


def run(granularity: str | None, **flags: object) -> tuple[int, list[torch.Tensor]]:
    """(bytes kept for the backward pass, loss and gradients)."""
    model = make_model(recompute_granularity=granularity, **flags)
    neighbors, lengths = make_neighbors()
    mcore.reseed(1)
    with LiveBytes() as live:
        loss, _ = model(
            make_tokens(), make_tokens(seed=4), neighbor_tokens_BxLxKxR=neighbors, neighbor_lengths_BxLxK=lengths
        )
    kept = live.now
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
