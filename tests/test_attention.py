"""Cross-attentions and encoder equal their loops; the views that chunk a sequence are inverse to each other."""

import pytest
import torch
from model_helpers import (
    B,
    C,
    K,
    L,
    R,
    S,
    frequencies,
    in_double,
    make_model,
    make_neighbors,
    naive_attention,
    naive_cca,
    naive_encoder,
    naive_encoder_cross,
    randn,
)

from megatron_retro.data.samples import text_first
from megatron_retro.model.attention import Order, attend, chunk_queries, rotate, split_chunks, unchunk_queries
from megatron_retro.model.neighbors import Neighbors

CLOSE = dict(rtol=0, atol=1e-11)
GROUPED = dict(group_query_attention=True, num_query_groups=2)


def angles(head_size: int) -> torch.Tensor:
    """Position × frequency for positions 0 … R-1, as the rotary module gives them: [R, 1, 1, E]."""
    positions = torch.arange(R, dtype=torch.float64)
    return torch.outer(positions, frequencies(head_size).repeat(2))[:, None, None, :]


def by_neighbor(encoded_RxKBLxD: torch.Tensor, b: int) -> list[list[torch.Tensor]]:
    """Sample b as [u][k] → [R, D]; row k·B·L + b·L + u of the encoder's batch."""
    return [[encoded_RxKBLxD[:, k * B * L + b * L + u] for k in range(K)] for u in range(L)]


@pytest.mark.parametrize("flags", [{}, GROUPED, dict(disable_bias_linear=True)], ids=["bias", "grouped", "no_bias"])
@pytest.mark.parametrize("num_positions", [S, S + C - 2], ids=["whole_chunks", "part_of_a_chunk"])
def test_chunked_cross_attention_equals_loops(flags, num_positions):
    model = in_double(make_model(**flags))
    cca = model.decoder.layers.get_submodule("1").cross_attention
    tokens_BxLxKxR, lengths_BxLxK = make_neighbors()
    x_SxBxD, encoded_RxKBLxD = randn(num_positions, B, 26), randn(R, K * B * L, 22, seed=8)

    out, bias = cca(x_SxBxD, encoded_RxKBLxD, Neighbors.of(tokens_BxLxKxR, lengths_BxLxK), angles(6))
    out = out if bias is None else out + bias

    assert (bias is None) == flags.get("disable_bias_linear", False)
    for b in range(B):
        expected = naive_cca(cca, x_SxBxD[:, b], by_neighbor(encoded_RxKBLxD, b), lengths_BxLxK[b])
        torch.testing.assert_close(out[:, b], expected, **CLOSE)
        assert torch.equal(out[:, b].abs().sum(-1) == 0, expected.abs().sum(-1) == 0)  # exact zeros, nowhere else
    assert (out[: C - 1] == 0).all()
    assert (out[2 * C + C - 1 : 3 * C + C - 1, 0] == 0).all()  # chunk 2 of sample 0 has no neighbor
    assert (out[2 * C + C - 1 : 3 * C + C - 1, 1] != 0).any(-1).all()


@pytest.mark.parametrize("num_chunks", [1, L - 1])
def test_chunks_behind_the_last_retrieved_one_read_nothing(num_chunks):
    """Generation may be ahead of retrieval: positions whose chunk has no column in the neighbors get zero."""
    model = in_double(make_model())
    cca = model.decoder.layers.get_submodule("1").cross_attention
    tokens, lengths = make_neighbors()
    x, encoded = randn(S, B, 26), randn(R, K, B, L, 22, seed=8)
    read = [cca(x, encoded.flatten(1, 3), Neighbors.of(tokens, lengths), angles(6))]
    few = Neighbors.of(tokens[:, :num_chunks], lengths[:, :num_chunks])
    read.append(cca(x, encoded[:, :, :, :num_chunks].flatten(1, 3), few, angles(6)))
    full, part = (out + bias for out, bias in read)
    end = num_chunks * C + C - 1
    torch.testing.assert_close(part[:end], full[:end], **CLOSE)
    assert part.shape == full.shape and (part[end:] == 0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_encoder_cross_attention_equals_loops(bias):
    encoder = in_double(make_model(disable_bias_linear=not bias)).decoder.encoder
    cross = encoder.layers.get_submodule("0").cross_attention
    x_RxKBLxD, decoder_SxBxD = randn(R, K * B * L, 22), randn(S + 2, B, 26, seed=8)
    out, projection_bias = cross(x_RxKBLxD, decoder_SxBxD, Neighbors.of(*make_neighbors()), angles(6))
    out = out if projection_bias is None else out + projection_bias
    for b in range(B):
        for u, found in enumerate(by_neighbor(out, b)):
            for k, out_RxD in enumerate(found):
                x_RxD, chunk_CxD = by_neighbor(x_RxKBLxD, b)[u][k], decoder_SxBxD[u * C : (u + 1) * C, b]
                torch.testing.assert_close(out_RxD, naive_encoder_cross(cross, x_RxD, chunk_CxD), **CLOSE)


@pytest.mark.parametrize("flags", [{}, dict(normalization="RMSNorm", swiglu=True)], ids=["gpt", "llama"])
def test_encoder_equals_loops(flags):
    encoder = in_double(make_model(**flags)).decoder.encoder
    tokens_BxLxKxR, lengths_BxLxK = make_neighbors()
    decoder_SxBxD = randn(S, B, 26)
    encoded = encoder(Neighbors.of(tokens_BxLxKxR, lengths_BxLxK), decoder_SxBxD)
    assert encoded.shape == (R, K * B * L, 22) and encoded.isfinite().all()
    for b in range(B):
        for u, found in enumerate(by_neighbor(encoded, b)):
            for k, encoded_RxD in enumerate(found):
                length, chunk_CxD = int(lengths_BxLxK[b, u, k]), decoder_SxBxD[u * C : (u + 1) * C, b]
                expected = naive_encoder(encoder, tokens_BxLxKxR[b, u, k], length, chunk_CxD)
                if length:
                    torch.testing.assert_close(encoded_RxD[:length], expected, **CLOSE)


def test_no_softmax_is_empty():
    """torch's kernels differ in what they make of a query that may look nowhere; some make NaN."""
    neighbors = Neighbors.of(*make_neighbors())
    assert neighbors.key_mask.shape == (B * L, 1, 1, R * K) and neighbors.token_mask.shape == (K * B * L, 1, 1, R)
    assert neighbors.key_mask.any(-1).all() and neighbors.token_mask.any(-1).all()
    assert not neighbors.key_mask.all() and not neighbors.token_mask.all()


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attend_equals_loops(groups):
    q_SxNxHxE, k_TxNxGxE, v_TxNxGxE = randn(11, B, 4, 6), randn(13, B, groups, 6, seed=8), randn(13, B, groups, 6)
    mask_NxSxT = randn(B, 11, 13, seed=9) > 0
    mask_NxSxT[..., 0] = True
    masked = attend(q_SxNxHxE, k_TxNxGxE, v_TxNxGxE, mask=mask_NxSxT[:, None])
    causal = attend(q_SxNxHxE, k_TxNxGxE[:11], v_TxNxGxE[:11], causal=True)
    alike = attend(q_SxNxHxE, k_TxNxGxE, v_TxNxGxE, mask=mask_NxSxT[:, None, :1])  # for all queries
    for n in range(B):
        q, k, v = q_SxNxHxE[:, n], k_TxNxGxE[:, n], v_TxNxGxE[:, n]
        torch.testing.assert_close(masked[:, n].flatten(1), naive_attention(q, k, v, mask_NxSxT[n]), **CLOSE)
        expected = naive_attention(q, k, v, mask_NxSxT[n, :1].expand(11, -1))
        torch.testing.assert_close(alike[:, n].flatten(1), expected, **CLOSE)
        seen = torch.ones(11, 11).tril().bool()
        torch.testing.assert_close(causal[:, n].flatten(1), naive_attention(q, k[:11], v[:11], seen), **CLOSE)


def test_text_attends_in_order_as_under_a_mask_that_hides_padding():
    valid_BxS = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < 0.7
    assert not valid_BxS.all(1).any()
    order = Order.of(text_first(valid_BxS))
    qkv = [randn(S, B, 4, 6, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    causal = torch.ones(S, S).tril().bool()
    mask = (causal & (valid_BxS[:, None] | torch.eye(S).bool()))[:, None]
    valid_SxBx1x1 = valid_BxS.t()[..., None, None]
    outputs = attend(*qkv, mask=mask), order.undo(attend(*map(order.apply, qkv), causal=True))
    masked, ordered = (
        [out * valid_SxBx1x1, *torch.autograd.grad((out * valid_SxBx1x1).pow(2).sum(), qkv)] for out in outputs
    )
    for found, expected in zip(ordered, masked, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_rotation_equals_complex_numbers_turned():
    x_SxBxHxE, angles_SxBx1xE = randn(11, B, 4, 6), randn(11, B, 1, 3, seed=8).repeat(1, 1, 1, 2)
    half = torch.complex(*x_SxBxHxE.chunk(2, -1)) * torch.polar(torch.ones(()).double(), angles_SxBx1xE[..., :3])
    turned = rotate(x_SxBxHxE.requires_grad_(), angles_SxBx1xE)
    torch.testing.assert_close(turned, torch.cat((half.real, half.imag), -1), **CLOSE)
    assert torch.autograd.gradcheck(rotate, (x_SxBxHxE[:2], angles_SxBx1xE[:2]))


@pytest.mark.parametrize("num_positions", [S, S + 2])
def test_unchunk_is_the_inverse_of_chunk(num_positions):
    x_SxBxE = randn(num_positions, B, 11)
    chunked_CxBLxE = chunk_queries(x_SxBxE, C, L)
    for b in range(B):
        for u in range(L):
            for i in range(C):
                position = u * C + C - 1 + i
                expected = x_SxBxE[position, b] if position < num_positions else torch.zeros(11)
                assert torch.equal(chunked_CxBLxE[i, b * L + u], expected.double())
    back_SxBxE = unchunk_queries(chunked_CxBLxE, B, num_positions)
    assert torch.equal(back_SxBxE[C - 1 :], x_SxBxE[C - 1 :]) and (back_SxBxE[: C - 1] == 0).all()


def test_split_chunks_keeps_each_chunk_together():
    x_SxBxE = randn(S + 2, B, 11)
    chunks_CxBLxE = split_chunks(x_SxBxE, C, L)
    for b in range(B):
        for u in range(L):
            assert torch.equal(chunks_CxBLxE[:, b * L + u], x_SxBxE[u * C : (u + 1) * C, b])
