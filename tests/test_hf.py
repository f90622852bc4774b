"""RetroForCausalLM computes what RetroModel does, with and without a cache, for any batch."""

import dataclasses
import pathlib

import pytest
import torch
from model_helpers import AS_MEGATRON_LM, B, C, K, L, S, V, make_configs, make_neighbors, make_tokens
from test_generation import Library, lively_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_retro.errors import UserError
from megatron_retro.hf import RetroConfig, RetroForCausalLM
from megatron_retro.hf.configuration import flag_names
from megatron_retro.inference.writer import Choice, Writer
from megatron_retro.model.model import RetroModel

COMBINATIONS = {
    "plain": {},
    "llama": dict(
        normalization="RMSNorm", swiglu=True, disable_bias_linear=True, group_query_attention=True,
        num_query_groups=2, use_rope_scaling=True, rotary_base=500000, untie_embeddings_and_output_weights=True,
    ),
    "qwen": dict(normalization="RMSNorm", swiglu=True, disable_bias_linear=True, add_qkv_bias=True, qk_layernorm=True),
    "neox": dict(use_parallel_residual=True, rotary_percent=0.34, untie_embeddings_and_output_weights=True),
    "Megatron-LM's": AS_MEGATRON_LM,
    "gpt2": dict(position_embedding_type="learned_absolute", openai_gelu=True, qk_layernorm=True),
}  # fmt: skip


def config_of(**flags: object) -> RetroConfig:
    given: dict[str, object] = {}
    for group in make_configs(**flags):
        if group is not None:
            given |= {name: value for name, value in dataclasses.asdict(group).items() if name in flag_names()}
    return RetroConfig(vocab_size=V, retro_chunk_length=C, **given)


def weights_of(model: RetroModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "_extra_state" not in name}


def pair(**flags: object) -> tuple[RetroModel, RetroForCausalLM]:
    """A RetroModel, and the same for transformers; tensors have the same names."""
    ours, theirs = lively_model(**flags), RetroForCausalLM(config_of(**flags))
    weights = weights_of(ours)
    assert set(weights) == {name for name, _ in theirs.named_parameters()}
    theirs.load_state_dict(weights, strict="output_layer.weight" in weights)
    return ours, theirs.eval()


NAMES = ("neighbor_tokens_BxLxKxR", "neighbor_lengths_BxLxK")


@pytest.mark.parametrize("flags", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_logits_loss_and_gradients_equal_retromodels(flags: dict[str, object]) -> None:
    ours, theirs = pair(**flags)
    tokens, neighbors = make_tokens(), make_neighbors()
    expected = ours(tokens, **dict(zip(NAMES, neighbors, strict=True)))
    found = theirs(tokens, neighbor_input_ids=neighbors[0], neighbor_lengths=neighbors[1]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    without = theirs(tokens).logits
    torch.testing.assert_close(without, ours(tokens), rtol=1e-5, atol=1e-5)
    assert (found - without).abs().max() > 0.1

    labels = tokens.clone()
    labels[0, :3] = -100
    mask = (labels[:, 1:] != -100).float()
    loss, _ = ours(
        tokens[:, :-1], tokens[:, 1:], mask, **dict(zip(NAMES, (part[:, : L - 1] for part in neighbors), strict=True))
    )
    (loss / mask.sum()).backward()
    theirs.train()
    given = dict(neighbor_input_ids=neighbors[0], neighbor_lengths=neighbors[1])
    theirs(tokens, labels=labels, **given).loss.backward()
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    for name, weight in theirs.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------------ cache and padding


def neighbors_of(chunks_nxC: Tensor) -> tuple[Tensor, Tensor]:
    """A retriever: neighbors that are a function of the chunk's tokens."""
    reads = Library().read(chunks_nxC.tolist())
    return reads.tokens_nxKxR, reads.lengths_nxK


def all_neighbors(tokens_BxS: Tensor) -> dict[str, Tensor]:
    num_chunks = tokens_BxS.shape[1] // C
    tokens, lengths = neighbors_of(tokens_BxS[:, : num_chunks * C].reshape(-1, C))
    shape = (len(tokens_BxS), num_chunks)
    return dict(neighbor_input_ids=tokens.unflatten(0, shape), neighbor_lengths=lengths.unflatten(0, shape))


@pytest.mark.parametrize("name", ["llama", "gpt2", "Megatron-LM's"])
@pytest.mark.parametrize("cuts", [(3, 1, 1, 7), (C, 1, 2 * C), (2 * C + 1, C - 1, 1, 1)], ids=str)
@torch.no_grad()
def test_with_a_cache_logits_are_the_same(name: str, cuts: tuple[int, ...]) -> None:
    _, model = pair(**COMBINATIONS[name])
    tokens = make_tokens(sum(cuts))
    expected = model(tokens, **all_neighbors(tokens)).logits
    torch.testing.assert_close(model(tokens, retriever=neighbors_of).logits, expected)
    near, begin = all_neighbors(tokens), 0
    kept: dict[str, object] = {"asked": None, "given": None}
    for length in cuts:
        part, chunks = tokens[:, begin : begin + length], slice(begin // C, (begin + length) // C)
        for way in kept:
            given = {name: value[:, chunks] for name, value in near.items()} if chunks.stop > chunks.start else {}
            given = dict(retriever=neighbors_of) if way == "asked" else given
            out = model(part, past_key_values=kept[way], use_cache=True, **given)
            kept[way] = out.past_key_values
            torch.testing.assert_close(out.logits, expected[:, begin : begin + length], rtol=1e-4, atol=1e-5)
        begin += length


def left_padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, texts))
    tokens = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0), value=V - 1) for text in texts])
    mask = torch.stack([torch.arange(width) >= width - len(text) for text in texts])
    return tokens, mask.long()


@pytest.mark.parametrize("name", ["gpt2", "neox"])
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    """On the left the chunks begin behind it; elsewhere it takes places of its chunk, as in training."""
    _, model = pair(**COMBINATIONS[name])
    whole = make_tokens()
    texts = [whole[0], whole[1, : 2 * C + 3], whole[1, : C - 2], whole[0, : 3 * C]]
    tokens, mask = left_padded(texts)
    found = model(tokens, attention_mask=mask, retriever=neighbors_of)
    for row, text in enumerate(texts):
        expected = model(text[None], retriever=neighbors_of).logits[0]
        torch.testing.assert_close(found.logits[row, -len(text) :], expected, rtol=1e-4, atol=1e-5)
    more, cache = make_tokens(C, seed=9).repeat(2, 1), found.past_key_values
    for column in range(more.shape[1]):
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.int64)], 1)
        given = dict(retriever=neighbors_of, past_key_values=cache)
        step = model(more[:, column, None], attention_mask=mask, **given).logits
    for row, text in enumerate(texts):
        expected = model(torch.cat([text, more[row]])[None], retriever=neighbors_of).logits[0, -1]
        torch.testing.assert_close(step[row, 0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_short_chunks_in_the_middle_equal_retromodels() -> None:
    ours, theirs = pair()
    tokens, (near, lengths) = make_tokens(), make_neighbors()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, 2 * C + 3 : 3 * C] = valid[1, 5 * C - 1 : 5 * C] = False
    lengths[0, 2] = lengths[1, 4] = 0  # the last chunk of a document reads nothing
    order = torch.argsort(~valid, dim=1, stable=True)
    expected = ours(tokens, order_BxS=order, **dict(zip(NAMES, (near, lengths), strict=True)))
    found = theirs(tokens, attention_mask=valid.long(), neighbor_input_ids=near, neighbor_lengths=lengths).logits
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ generation

WORDY = dict(untie_embeddings_and_output_weights=True)  # tied ones say one word again and again
PROMPTS = [[5, 9, 2], [7] * (2 * C + 3), [4, 3, 2, 8, 6], [11, 12]]


def continued(model: RetroForCausalLM, **given: object) -> list[list[int]]:
    """What is generated for `PROMPTS` as a batch."""
    tokens, mask = left_padded([torch.tensor(prompt) for prompt in PROMPTS])
    given = {
        **dict(max_new_tokens=15, do_sample=False, pad_token_id=1, eos_token_id=0, retriever=neighbors_of),
        **given,
    }
    out = model.generate(tokens, attention_mask=mask, **given)
    count = given.get("num_return_sequences", 1)
    assert len(out) == len(PROMPTS) * count
    return [row[tokens.shape[1] :].tolist() for row in out]


def test_generation_equals_the_writers() -> None:
    ours, theirs = pair(**WORDY)
    writer = Writer(ours, chunk_length=C, context=S, vocab_size=V, eod=0, pad=1, reader=Library(), num_neighbors=K)
    expected: list[list[int]] = [[] for _ in PROMPTS]
    for event in writer.write(PROMPTS, Choice(temperature=0), 15):
        if event.token is not None:
            expected[event.text].append(event.token)
    given = dict(suppress_tokens=[1])
    found = [row[: row.index(0) + 1] if 0 in row else row for row in continued(theirs, **given)]
    assert found == expected
    assert found == [
        row[: row.index(0) + 1] if 0 in row else row for row in continued(theirs, use_cache=False, **given)
    ]


def test_beams_samples_and_chunked_prompts() -> None:
    """A beam takes along what it has read; the cache changes nothing, nor do the other texts of a batch."""
    _, model = pair(**WORDY)
    beams = dict(num_beams=3, num_return_sequences=2)
    found = continued(model, **beams)
    assert found == continued(model, **beams, use_cache=False)
    for number, prompt in enumerate(PROMPTS):
        given = dict(max_new_tokens=15, do_sample=False, pad_token_id=1, eos_token_id=0, retriever=neighbors_of)
        alone = model.generate(torch.tensor([prompt]), **given, **beams)[:, len(prompt) :].tolist()
        for row, expected in zip(found[2 * number :], alone, strict=False):
            assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {1}
    assert continued(model, prefill_chunk_size=4) == continued(model)
    torch.manual_seed(5)
    sampled = continued(model, do_sample=True, num_return_sequences=2, eos_token_id=None)
    torch.manual_seed(5)
    assert sampled == continued(model, do_sample=True, num_return_sequences=2, eos_token_id=None, use_cache=False)
    assert sampled[0] != sampled[1]


def test_given_neighbors_are_those_of_the_prompt() -> None:
    _, model = pair(**WORDY)
    prompt = make_tokens(2 * C + 1)
    ways = (all_neighbors(prompt), {}, dict(retriever=neighbors_of))
    kept = [model.generate(prompt, max_new_tokens=C - 2, do_sample=False, eos_token_id=None, **way) for way in ways]
    assert kept[0].tolist() == kept[2].tolist() != kept[1].tolist()
    given = dict(max_new_tokens=2 * C, do_sample=False, eos_token_id=None, **ways[0])  # chunks without neighbors too
    again, cached = (model.generate(prompt, use_cache=use_cache, **given).tolist() for use_cache in (False, True))
    assert again == cached and [row[: 3 * C - 1] for row in again] == kept[0].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(max_new_tokens=S), "max_position_embeddings is 40; shorten"),
        (dict(retriever=lambda chunks: (chunks, chunks)), r"the retriever returned \[4, 5\]"),
        (dict(retriever=neighbors_of, neighbor_input_ids=make_neighbors()[0]), "leave one out"),
        (dict(neighbor_input_ids=make_neighbors()[0][0]), r"is \[7, 3, 10\]"),
        (dict(neighbor_input_ids=make_neighbors()[0]), "L = 7 chunks; .* these input_ids complete 2"),
        (dict(neighbor_input_ids=make_neighbors()[0][:, :1]), "L = 1 chunks"),
        (dict(neighbor_input_ids=make_neighbors()[0][:, :2, :, 1:]), "R = 9 tokens a neighbor; .* 2C = 10"),
        (dict(retriever=lambda chunks: (torch.zeros(4, 1, 9), torch.zeros(4, 1))), "R = 2C = 10"),
        (dict(cache_implementation="static"), "cache_implementation is 'static'"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_line(given: dict[str, object], message: str) -> None:
    _, model = pair(**WORDY)
    with pytest.raises(UserError, match=message):
        model.generate(make_tokens(2 * C), **{"max_new_tokens": 3, "do_sample": False, **given})
    with pytest.raises(UserError, match="tokenizer 1, the model was trained with 2"):
        model.config.tokenizer_digest, neighbors_of.tokenizer_digest = "2", "1"
        try:
            model(make_tokens(), retriever=neighbors_of)
        finally:
            del neighbors_of.tokenizer_digest
    for tokens, mask in ((make_tokens(0), None), (make_tokens(C), torch.tensor([[1] * C, [0] * C]))):
        with pytest.raises(UserError, match="a text is empty"):
            model.generate(tokens, attention_mask=mask, max_new_tokens=1, pad_token_id=1)
    cache = model(make_tokens(C - 1), use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"L = 2 chunks; .* complete 1,"):
        model(make_tokens(C), past_key_values=cache, neighbor_input_ids=make_neighbors()[0][:, :2])


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_saved_is_loaded_to_the_bit(name: str, tmp_path: pathlib.Path) -> None:
    """From the meta device, which rotary positions must not come from; test_export.py does it in a fresh process."""
    ours, theirs = pair(**COMBINATIONS[name])
    theirs.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name_, tensor in weights_of(ours).items():
        assert torch.equal(found.get_parameter(name_), tensor), name_
    tokens, (near, lengths) = make_tokens(), make_neighbors()
    with torch.no_grad():
        expected = ours(tokens, **dict(zip(NAMES, (near, lengths), strict=True)))
        logits = found(tokens, neighbor_input_ids=near, neighbor_lengths=lengths).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_new_weights_begin_silent() -> None:
    model = RetroForCausalLM(config_of())
    assert model.output_layer.weight is model.embedding.word_embeddings.weight
    tokens, (near, lengths) = make_tokens(), make_neighbors()
    reading = model(tokens, neighbor_input_ids=near, neighbor_lengths=lengths).logits
    assert torch.equal(reading, model(tokens).logits) and reading.std() > 0
