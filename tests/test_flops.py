"""The formula of arithmetic against what torch counts."""

import pytest
import torch
from model_helpers import SHAPE, B, C, L, S, V, make_configs, make_model, make_neighbors, make_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_retro.model.flops import multiply_adds

GROUPED = {"group_query_attention": True, "num_query_groups": 2}


@pytest.mark.parametrize("flags", [{}, {"swiglu": True}, GROUPED], ids=["gelu", "swiglu", "grouped"])
@pytest.mark.parametrize("reading", [None, 1.0, 0.5], ids=["gpt", "retro", "half of the chunks read"])
def test_formula_counts_what_a_forward_pass_does(reading: float | None, flags: dict) -> None:
    reads = reading is not None
    model = make_model(retro=reads, **flags)
    tokens, (neighbors, lengths) = make_tokens(), make_neighbors()
    read = {"neighbor_tokens_BxLxKxR": neighbors, "neighbor_lengths_BxLxK": lengths} if reads else {}
    if reading == 0.5:
        read["neighbor_chunks_M"] = torch.arange(B * L)[::2]
    # The plain kernel is made of matrix products that torch counts; it computes what the causal mask hides too.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, **read)
    formula = multiply_adds(
        *make_configs(retro=reads, **flags), vocab_size=V, chunk_length=C, reading=reading or 0.0, context=S
    )
    assert counter.get_total_flops() == pytest.approx(2 * formula.total * tokens.numel(), rel=0.02)


def test_parts_follow_the_shape() -> None:
    model, retro = make_configs()
    found = multiply_adds(model, retro, vocab_size=V, chunk_length=C)
    assert found.logits == SHAPE["hidden_size"] * V
    assert multiply_adds(model, retro, vocab_size=2 * V, chunk_length=C).logits == 2 * found.logits
    assert found.training_flops == 6 * (found.decoder + found.logits + found.cross_attention + found.encoder)
    assert multiply_adds(model, None, vocab_size=V, chunk_length=C).total == found.decoder + found.logits
