"""The model: equal to plain loops, causal by gradients, indifferent to what is masked, missing or padded."""

import pytest
import torch
import torch.nn.functional as F
from model_helpers import B, C, K, L, R, S, V, in_double, make_model, make_neighbors, make_tokens, naive_logits, randn

from megatron_retro import mcore
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.data.samples import text_first
from megatron_retro.errors import UserError
from megatron_retro.model.model import RetroModel

CLOSE = dict(rtol=0, atol=1e-11)
VARIANTS = {
    "gpt": {},
    "llama": dict(
        normalization="RMSNorm",
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
        group_query_attention=True,
        num_query_groups=2,
    ),
    "learned": dict(position_embedding_type="learned_absolute"),
    "dropout": dict(hidden_dropout=0.1, attention_dropout=0.1),
}


def run(model: RetroModel, tokens: torch.Tensor, found: tuple | None, **inputs: object) -> torch.Tensor:
    neighbors, lengths = found or (None, None)
    return model(tokens, neighbor_tokens_BxLxKxR=neighbors, neighbor_lengths_BxLxK=lengths, **inputs)


def capture_output(module: torch.nn.Module) -> list[torch.Tensor]:
    """The outputs of a module, as its forwards come."""
    outputs: list[torch.Tensor] = []
    module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


def is_encoder_or_reads(name: str) -> bool:
    return "encoder" in name or "cross_att" in name


# ------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("variant", ["gpt", "llama", "learned"])
def test_logits_equal_loops(variant):
    model = in_double(make_model(**VARIANTS[variant]))
    tokens_BxS, found = make_tokens(S + 2), make_neighbors()
    logits = run(model, tokens_BxS, found)
    for b in range(B):
        torch.testing.assert_close(logits[b], naive_logits(model, tokens_BxS[b], found[0][b], found[1][b]), **CLOSE)


def test_flags_reach_the_weights():
    shapes = {}
    for variant in ("gpt", "llama", "learned"):
        weights = make_model(**VARIANTS[variant]).named_parameters()
        shapes[variant] = {name: tuple(weight.shape) for name, weight in weights}
    gpt, llama = shapes["gpt"], shapes["llama"]
    layer = "decoder.layers.1."
    assert set(shapes["learned"]) - set(gpt) == {"embedding.position_embeddings.weight"}
    assert set(llama) - set(gpt) == {"output_layer.weight"}
    assert set(gpt) - set(llama) == {name for name in gpt if name.endswith(".bias")}
    assert gpt[layer + "mlp.linear_fc1.weight"] == (46, 26) and llama[layer + "mlp.linear_fc1.weight"] == (2 * 46, 26)
    for part, width in (("self_attention.linear_qkv", 26), ("cross_attention.linear_kv", 22)):
        queries = 4 if "qkv" in part else 0
        assert gpt[f"{layer}{part}.weight"] == ((queries + 2 * 4) * 6, width)
        assert llama[f"{layer}{part}.weight"] == ((queries + 2 * 2) * 6, width)


def test_loss_is_cross_entropy_of_the_logits():
    model, tokens, found = make_model(), make_tokens(), make_neighbors()
    labels = make_tokens(seed=4)
    loss_mask = (make_tokens(seed=5) % 3 > 0).float()
    total, loss = run(model, tokens, found, labels_BxS=labels, loss_mask_BxS=loss_mask)
    logits = run(model, tokens, found)
    assert total.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"))
    torch.testing.assert_close(total, (loss * loss_mask).sum())


def test_encoder_runs_once_a_forward():
    model = make_model()
    encoded = capture_output(model.decoder.encoder)
    run(model, make_tokens(), make_neighbors())
    assert len(encoded) == 1 and encoded[0].shape == (R, K * B * L, 22)


# ---------------------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize("variant", ["gpt", "llama", "learned"])
def test_logits_do_not_depend_on_later_tokens(variant):
    model = in_double(make_model(**VARIANTS[variant]))
    embedded = capture_output(model.embedding)
    logits = run(model, make_tokens(), make_neighbors())
    for t in range(S):
        (gradient_SxBxD,) = torch.autograd.grad(logits[:, t] @ randn(V), embedded[0], torch.ones(B), retain_graph=True)
        reached_SxB = (gradient_SxBxD != 0).any(-1)
        assert reached_SxB[: t + 1].all() and not reached_SxB[t + 1 :].any()


def test_logits_depend_on_neighbors_of_completed_chunks_alone():
    model = in_double(make_model())
    embedded = capture_output(model.decoder.encoder.embedding)
    tokens, lengths = make_neighbors()
    logits = run(model, make_tokens(S + 2), (tokens, lengths))
    present_BxLxKxR = torch.arange(R) < lengths[..., None]
    for t in range(S + 2):
        (gradient,) = torch.autograd.grad(logits[:, t] @ randn(V), embedded[0], torch.ones(B), retain_graph=True)
        reached_BxLxKxR = (gradient != 0).any(-1).view(R, K, B, L).permute(2, 3, 1, 0)
        completed_L = (torch.arange(L) + 1) * C - 1 <= t
        assert torch.equal(reached_BxLxKxR, present_BxLxKxR & completed_L[:, None, None])


@pytest.mark.parametrize("num_positions", [C - 1, C, 4 * C, 4 * C + 1, 5 * C - 1])
def test_prefix_has_the_logits_of_the_whole(num_positions):
    model = in_double(make_model())
    tokens, lengths = make_neighbors()
    whole = run(model, make_tokens(), (tokens, lengths))
    num_chunks = num_positions // C
    found = tokens[:, :num_chunks], lengths[:, :num_chunks]
    torch.testing.assert_close(run(model, make_tokens(num_positions), found), whole[:, :num_positions], **CLOSE)


# ----------------------------------------------------------------------------------- missing, masked and padded


def test_order_of_neighbors_does_not_matter():
    model, text = make_model(), make_tokens()
    tokens, lengths = make_neighbors()
    turned = tokens[:, :, [1, 2, 0]], lengths[:, :, [1, 2, 0]]
    torch.testing.assert_close(run(model, text, turned), run(model, text, (tokens, lengths)), rtol=0, atol=1e-6)
    in_double(model)
    torch.testing.assert_close(run(model, text, turned), run(model, text, (tokens, lengths)), **CLOSE)


def test_missing_neighbor_equals_one_neighbor_less():
    model, text = in_double(make_model()), make_tokens()
    tokens, lengths = make_neighbors()
    lengths[:, :, 1] = 0
    fewer = tokens[:, :, [0, 2]], lengths[:, :, [0, 2]]
    torch.testing.assert_close(run(model, text, (tokens, lengths)), run(model, text, fewer), **CLOSE)


@pytest.mark.parametrize("variant", ["gpt", "llama"])
def test_no_neighbors_equals_retrieval_off(variant):
    model, text = in_double(make_model(**VARIANTS[variant])), make_tokens()
    tokens, lengths = make_neighbors()
    off = run(model, text, None)
    assert torch.equal(run(model, text, (tokens, torch.zeros_like(lengths))), off)
    assert not torch.equal(run(model, text, (tokens, lengths)), off)


def test_retrieval_off_equals_the_gpt():
    retro, gpt = in_double(make_model()), make_model(retro=False).double()
    gpt.load_state_dict({name: value for name, value in retro.state_dict().items() if name in gpt.state_dict()})
    in_double(gpt)  # rotary positions too
    gpt.load_state_dict({name: value for name, value in retro.state_dict().items() if name in gpt.state_dict()})
    assert torch.equal(run(retro, make_tokens(), None), run(gpt, make_tokens(), None))
    assert torch.equal(run(gpt, make_tokens(), make_neighbors()), run(gpt, make_tokens(), None))


def test_no_neighbors_send_no_gradient_into_retrieval():
    model = in_double(make_model())
    tokens, lengths = make_neighbors()
    loss, _ = run(model, make_tokens(), (tokens, torch.zeros_like(lengths)), labels_BxS=make_tokens(seed=4))
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert (weight.grad != 0).any() != is_encoder_or_reads(name), name


@pytest.mark.parametrize("flags", [{}, dict(disable_bias_linear=True)], ids=["bias", "no_bias"])
def test_leaving_out_chunks_without_neighbors_changes_nothing(flags):
    model, (neighbors, lengths) = in_double(make_model(**flags)), make_neighbors()
    lengths[1, 3:] = 0
    reads = (lengths > 0).any(-1).flatten()
    assert 0 < reads.sum() < B * L - 2
    gradients = []
    for chunks in (None, reads.nonzero()[:, 0]):
        logits = run(model, make_tokens(), (neighbors, lengths), neighbor_chunks_M=chunks)
        model.zero_grad()
        logits.logsumexp(-1).sum().backward()
        gradients.append([logits, *(weight.grad for weight in model.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_token_ids_behind_a_neighbors_length_do_not_matter():
    model, text = make_model(), make_tokens()
    tokens, lengths = make_neighbors()
    padding = torch.arange(R) >= lengths[..., None]
    other = torch.where(padding, (tokens + 1) % V, tokens)
    assert not torch.equal(other, tokens)
    assert torch.equal(run(model, text, (other, lengths)), run(model, text, (tokens, lengths)))
    inside = torch.where(padding, tokens, (tokens + 1) % V)
    assert not torch.equal(run(model, text, (inside, lengths)), run(model, text, (tokens, lengths)))


@pytest.mark.parametrize("retro", [False, True])
def test_padding_changes_nothing_elsewhere(retro):
    """The end of chunk 2 of sample 0 is padding. As in real samples, a chunk with padding has no neighbors."""
    model, text = make_model(retro=retro), make_tokens()
    padding_BxS = torch.zeros(B, S, dtype=torch.bool)
    padding_BxS[0, 3 * C - 2 : 3 * C] = True
    order = text_first(~padding_BxS)
    other = torch.where(padding_BxS, (text + 1) % V, text)

    before, after = (run(model, tokens, make_neighbors(), order_BxS=order) for tokens in (text, other))
    assert torch.equal(before[~padding_BxS], after[~padding_BxS])
    assert (before[padding_BxS] != after[padding_BxS]).any(-1).all()
    assert not torch.equal(
        run(model, text, make_neighbors())[0, 3 * C :], before[0, 3 * C :]
    )  # the order hides something


def test_the_order_as_it_is_equals_none():
    model, order = in_double(make_model()), torch.arange(S).expand(B, -1)
    masked = run(model, make_tokens(), make_neighbors(), order_BxS=order)
    torch.testing.assert_close(masked, run(model, make_tokens(), make_neighbors()), **CLOSE)


# ---------------------------------------------------------------------------------------------- weights, training


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("retro", [False, True], ids=["plain", "retro"])
def test_one_step_reaches_every_weight_and_lowers_the_loss(variant, retro, bf16):
    model = make_model(retro=retro, bf16=bf16, **VARIANTS[variant])
    model = model.bfloat16() if bf16 else model  # as Float16Module does
    tokens, labels, found = make_tokens(), make_tokens(seed=4), make_neighbors()
    mcore.reseed(1)
    before, _ = run(model, tokens, found, labels_BxS=labels)
    (before / labels.numel()).backward()
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.bfloat16 if bf16 else torch.float32), name
        assert weight.grad is not None and weight.grad.isfinite().all() and (weight.grad != 0).any(), name
        weight.data -= 0.5 * weight.grad
    mcore.reseed(1)
    assert run(model, tokens, found, labels_BxS=labels)[0] < before


@pytest.mark.parametrize("variant", ["gpt", "llama", "learned"])
def test_weights_of_the_gpt_are_those_of_retro(variant):
    gpt = make_model(retro=False, **VARIANTS[variant]).state_dict()
    retro = make_model(**VARIANTS[variant]).state_dict()
    assert set(gpt) <= set(retro)
    assert all(is_encoder_or_reads(name) for name in set(retro) - set(gpt))
    for name, value in gpt.items():
        assert value is None or torch.equal(value, retro[name]), name


def test_training_begins_as_the_gpt_of_the_same_seed():
    retro, gpt = make_model(silent=True), make_model(retro=False)
    logits = run(retro, make_tokens(), make_neighbors())
    assert torch.equal(logits, run(gpt, make_tokens(), None))
    logits.logsumexp(-1).sum().backward()
    outputs = [weight for name, weight in retro.named_parameters() if "cross_attention.linear_proj.weight" in name]
    heard = [weight for weight in outputs if not weight.any() and weight.grad.any()]
    assert len(outputs) == 3 and len(heard) == 2  # the decoder's two; the encoder's reads from the start


def test_initial_weights_do_not_depend_on_the_random_stream():
    first = dict(make_model().named_parameters())
    torch.manual_seed(99)
    again = dict(make_model().named_parameters())
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())


def test_initial_weights_depend_on_the_seed():
    first, other = dict(make_model().named_parameters()), dict(make_model(seed=2).named_parameters())
    for name, weight in first.items():
        assert torch.equal(weight, other[name]) == (weight.dim() == 1), name  # biases and norms start constant


def test_no_two_initial_weights_are_alike():
    named = {name: weight for name, weight in make_model().named_parameters() if weight.dim() == 2}
    del named["decoder.encoder.embedding.word_embeddings.weight"]  # begins as the decoder's, see below
    drawn = [weight.flatten()[:7] for weight in named.values()]
    alike = {
        tuple((values / values[0]).mul(1000).round().tolist()) for values in drawn
    }  # whatever their standard deviation
    assert len(alike) == len(drawn)


def test_the_encoders_embedding_starts_as_the_decoders_of_equal_width():
    model = make_model(hidden_size=22)
    assert torch.equal(model.embedding.word_embeddings.weight, model.decoder.encoder.embedding.word_embeddings.weight)
    assert model.embedding.word_embeddings.weight is not model.decoder.encoder.embedding.word_embeddings.weight


def test_making_a_model_leaves_the_random_stream_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    make_model()
    assert torch.equal(torch.rand(3), expected)


# -------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "flags, named",
    [
        (dict(num_query_groups=4), "--group-query-attention"),  # would be ignored without it
        (dict(kv_channels=0), "--kv-channels is 0"),
        (dict(ffn_hidden_size=0), "--ffn-hidden-size is 0"),
    ],
)
def test_impossible_decoder_shapes_are_refused(flags, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**flags).finish()


@pytest.mark.parametrize(
    "name", ["retro_encoder_layers", "retro_encoder_ffn_hidden_size", "retro_encoder_num_attention_heads"]
)
def test_impossible_encoder_shapes_are_refused(name):
    model = ModelConfig()
    model.finish()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is 0"):
        RetroConfig(**{name: 0}).finish(model)


def test_finishing_a_configuration_again_changes_nothing():
    model, retro, seen = ModelConfig(swiglu=True), RetroConfig(), set()
    for _ in range(2):
        model.finish()
        retro.finish(model)
        seen.add((repr(model), repr(retro)))
    assert len(seen) == 1
