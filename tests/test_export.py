"""Checkpoints as Hugging Face directories: weights to the bit, the same logits, the same token ids."""

import io
import json
import pathlib
import subprocess
import sys

import pytest
import sentencepiece
import torch
from conftest import stdlib_texts, write_jsonl
from launch import ROOT, environment, run_forked
from model_helpers import initialize
from test_tokenizer import hugging_face

from megatron_retro.config import flags as flags_
from megatron_retro.config.conversion import ConversionConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data.tokenizer import Tokenizer, train
from megatron_retro.errors import UserError
from megatron_retro.hf.export import export
from megatron_retro.hf.tokenizer import save_tokenizer
from megatron_retro.interop.own import OwnCheckpoint
from megatron_retro.interop.source import open_source
from megatron_retro.model.model import RetroModel, make_stages, padded_vocab_size
from megatron_retro.retrieval.corpora import describe_tokenizer
from megatron_retro.training import checkpoint
from megatron_retro.training.fit import BY_TOKEN
from megatron_retro.workdir import digest_of_tokenizer

C = 8
SHAPE = dict(num_layers=4, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, seq_length=64, norm_epsilon=1e-6)
LLAMA = dict(normalization="RMSNorm", swiglu=True, disable_bias_linear=True)
STOCK = {
    "llama": dict(**LLAMA, group_query_attention=True, num_query_groups=2, use_rope_scaling=True, rotary_base=500000),
    "llama-biases": dict(normalization="RMSNorm", swiglu=True, untie_embeddings_and_output_weights=True, kv_channels=6),
    "qwen2": dict(**LLAMA, add_qkv_bias=True),
    "qwen3": dict(**LLAMA, qk_layernorm=True, kv_channels=12, untie_embeddings_and_output_weights=True),
    "gpt_neox": dict(rotary_percent=0.5, untie_embeddings_and_output_weights=True),
    "gpt_neox-parallel": dict(use_parallel_residual=True, openai_gelu=True),
    "gpt2": dict(position_embedding_type="learned_absolute", openai_gelu=True),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train(stdlib_texts(20), 500))
    return path


def saved(save: pathlib.Path, tokenizer: pathlib.Path, *, retro: bool = False, **flags: object) -> RetroModel:
    """A model of random weights, and its checkpoint."""
    initialize()
    run = PretrainConfig(model=ModelConfig(**{**SHAPE, **flags}), retro=RetroConfig(retro_add_retriever=retro))
    run.retro.retro_layers = "2,4" if retro else None
    run.model.finish()
    run.retro.finish(run.model)
    facts = describe_tokenizer(tokenizer)
    vocab_size = padded_vocab_size(facts["vocab_size"], 128, 1)
    (model,) = make_stages(run.model, run.active_retro, run.parallel, vocab_size, C, 1)
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        noise = 0.2 * torch.randn(weight.shape, generator=generator)
        weight.data = noise + (weight.dim() == 1 and name.endswith("weight"))
    digest = digest_of_tokenizer(facts, tokenizer)
    state = checkpoint.RunState(0, 0, flags_.to_dict(run), vocab_size, C, digest, "")
    checkpoint.save(str(save), model, None, state)
    return model.eval()


def exported(folder: pathlib.Path, tokenizer: pathlib.Path, **flags: object) -> tuple[RetroModel, pathlib.Path]:
    model = saved(folder / "checkpoint", tokenizer, **flags)
    export(ConversionConfig(str(folder / "checkpoint"), str(folder / "there"), str(tokenizer)))
    return model, folder / "there"


def some_tokens() -> torch.Tensor:
    return torch.randint(500, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", [name for name in STOCK if name != "llama"])  # that one loads in a fresh process below
def test_a_gpt_is_a_stock_model(
    name: str, tmp_path: pathlib.Path, tokenizer: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    import transformers

    model, there = exported(tmp_path, tokenizer, **STOCK[name])
    stock = transformers.AutoModelForCausalLM.from_pretrained(there)
    assert stock.config.model_type == name.split("-")[0] and not type(stock).__module__.startswith("megatron_retro")
    with torch.no_grad():
        expected = model(some_tokens())[..., :500]
        torch.testing.assert_close(stock(some_tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    insists = name == "qwen2"  # on a tokenizer like Qwen2's own
    assert ("PreTrainedTokenizerFast" in capsys.readouterr().out) == insists
    loader = transformers.PreTrainedTokenizerFast if insists else transformers.AutoTokenizer
    (text,) = stdlib_texts(1, 300)
    assert loader.from_pretrained(there)(text).input_ids == Tokenizer.open(tokenizer).encode([text])[0]


FRESH = """
import json, sys, torch, transformers
folder = sys.argv[1]
saved = torch.load(folder + "/expected.pt")
stock = transformers.AutoModelForCausalLM.from_pretrained(folder + "/gpt/there")
assert torch.allclose(stock(saved["tokens"]).logits, saved["gpt"], rtol=1e-5, atol=1e-5)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder + "/gpt/there")
batch = tokenizer(saved["texts"], padding=True, return_tensors="pt")
assert batch["attention_mask"][0, 0] == 0 and [tokenizer(text).input_ids for text in saved["texts"]] == saved["ids"]
assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == saved["texts"]
stock.generate(**batch, max_new_tokens=2)
assert "megatron_retro" not in sys.modules
import megatron_retro
assert not [name for name in sys.modules if name.startswith("megatron.")]
import megatron_retro.hf
for dtype, limit in ((None, 1e-5), (torch.bfloat16, 1)):
    precision = {"dtype": dtype} if dtype else {}
    retro = transformers.AutoModelForCausalLM.from_pretrained(folder + "/retro/there", **precision)
    given = dict(neighbor_input_ids=saved["near"], neighbor_lengths=saved["lengths"])
    assert (retro(saved["tokens"], **given).logits - saved["retro"]).abs().max() < limit
tokenizer = transformers.AutoTokenizer.from_pretrained(folder + "/retro/there")
assert [tokenizer(text).input_ids for text in saved["texts"]] == saved["ids"]
assert retro.generation_config.eos_token_id == tokenizer.eos_token_id == saved["eod"]
assert not torch.distributed.is_initialized()
print("equal")
"""  # fmt: skip


def test_fresh_processes_load_what_was_exported(tmp_path: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """A stock model where this package is not imported; a RETRO where it is. Weights are the same to the bit."""
    gpt, _ = exported(tmp_path / "gpt", tokenizer, **STOCK["llama"])
    retro, there = exported(tmp_path / "retro", tokenizer, retro=True, **STOCK["llama"], hidden_dropout=0.1)
    generator = torch.Generator().manual_seed(7)
    near = torch.randint(500, (2, 5, 2, 2 * C), generator=generator)
    lengths = torch.randint(0, 2 * C + 1, (2, 5, 2), generator=generator)
    texts = stdlib_texts(2, 300)
    texts[0] = texts[0][:50] + "<eod> <unk> <0x41>"
    ours = Tokenizer.open(tokenizer)
    known = dict(tokens=some_tokens(), near=near, lengths=lengths, texts=texts, ids=ours.encode(texts), eod=ours.eod)
    with torch.no_grad():
        known["gpt"] = gpt(some_tokens())[..., :500]
        given = dict(neighbor_tokens_BxLxKxR=near, neighbor_lengths_BxLxK=lengths)
        known["retro"] = retro(some_tokens(), **given)[..., :500]
    torch.save(known, tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stdout + done.stderr

    source = open_source("--load", str(there))
    weights = {name: weight for name, weight in retro.state_dict().items() if "_extra_state" not in name}
    assert set(source.names()) == set(weights) and source.chunk_length == C
    for name, weight in weights.items():
        assert torch.equal(source.tensor(name), weight[:500] if name in BY_TOKEN else weight), name
    assert source.flags == OwnCheckpoint(next((tmp_path / "retro" / "checkpoint").glob("iter_*"))).flags


NONE = {
    "--use-parallel-residual is True; transformers' llama": dict(**LLAMA, use_parallel_residual=True),
    "--rotary-percent is 0.5; transformers' llama": dict(**LLAMA, rotary_percent=0.5),
    "--swiglu is False; transformers' llama": dict(normalization="RMSNorm"),
    "--disable-bias-linear is True; transformers' gpt_neox": dict(disable_bias_linear=True),
    "--kv-channels is 12; transformers' gpt2": dict(position_embedding_type="learned_absolute", kv_channels=12),
}


def test_what_cannot_be_exported_is_told_in_a_line(tmp_path: pathlib.Path, tokenizer: pathlib.Path) -> None:
    for number, (told, flags) in enumerate(NONE.items()):
        with pytest.raises(UserError, match=told):
            exported(tmp_path / str(number), tokenizer, **flags)
        assert not list((tmp_path / str(number)).glob("there*"))
    load = str(tmp_path / "0" / "checkpoint")
    other = tmp_path / "other.model"
    other.write_bytes(train(stdlib_texts(10), 400))
    for save, file, told in (
        (tmp_path, str(tokenizer), "is there already"),
        (tmp_path / "new", str(other), "was trained with the tokenizer"),
        (tmp_path / "new", None, "names no work dir; give its tokenizer"),
    ):
        with pytest.raises(UserError, match=told):
            export(ConversionConfig(load, str(save), file))
    assert not list(tmp_path.glob("new*"))


def test_generation_equals_the_tools(trained: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Greedy, with the work dir's tokenizer and database, prompts of several lengths as one batch."""
    import transformers

    import megatron_retro.hf

    run_forked("tools/convert_checkpoint.py", "--load", trained, "--save", tmp_path / "there")
    prompts = [text[:length] for text, length in zip(stdlib_texts(3), (30, 400, 150), strict=True)]
    given = write_jsonl(tmp_path / "prompts.jsonl", [])
    given.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    command = ["tools/generate_retro_text.py", "--load", trained, "--retro-work-dir", small_work, "--temperature", "0"]
    command += ["--prompt-file", given, "--max-new-tokens", "40", "--json", "--output", tmp_path / "written.jsonl"]
    run_forked(*command)
    written = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text(encoding="utf-8").splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    retriever = megatron_retro.hf.Retriever(small_work, 2)
    asked: list[int] = []

    def counting(chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(chunks))
        return retriever(chunks)

    out = model.generate(**batch, max_new_tokens=40, do_sample=False, retriever=counting)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert texts == [prompt + line["text"] for prompt, line in zip(prompts, written, strict=True)]
    assert sum(asked) >= sum(len(line["read"]) for line in written) > 3
    without = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=40, do_sample=False))
    assert without != texts
    with pytest.raises(UserError, match="--retro-num-neighbors"):
        megatron_retro.hf.Retriever(small_work, 1000)
    with pytest.raises(UserError, match="num_neighbors is 0"):
        megatron_retro.hf.Retriever(small_work, 0)


# ------------------------------------------------------------------------------------------------ tokenizers


def trained_by_others(**settings: object) -> bytes:
    model = io.BytesIO()
    lines = [line for text in stdlib_texts(30) for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, num_threads=1, **settings
    )
    return model.getvalue()


KINDS = {
    "ours": lambda: train(stdlib_texts(30), 800),
    "llama's": lambda: trained_by_others(
        model_type="bpe", vocab_size=1000, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    ),
    "normalized": lambda: trained_by_others(model_type="unigram", vocab_size=500),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_keeps_its_ids(kind: str, tmp_path: pathlib.Path) -> None:
    import transformers

    file = tmp_path / "a.model"
    file.write_bytes(KINDS[kind]())
    save_tokenizer(file, tmp_path, 64)
    ours, theirs = Tokenizer.open(file), transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*stdlib_texts(60), "", " ", "  two  spaces  ", "a\n\n\tb\r\n", "x" * 500]
    if kind == "ours":
        texts += ["<eod> </s> <s> <0x41> <unk>", "▁", "a ▁▁ b▁", "👩‍👩‍👧 😀 ﬁ e\u0301", "\ufeff\uffff\U0010ffff"]
    rows = ours.encode(texts)
    differing = [(text, row) for text, row in zip(texts, rows, strict=True) if theirs(text).input_ids != row]
    assert len(differing) <= (kind == "ours")  # two ways to cut may be as likely, to the digits that each sums in
    for text, row in differing:
        assert len(theirs(text).input_ids) == len(row) and theirs.decode(theirs(text).input_ids) == text
    known = [row for row in rows if 0 not in row]
    assert len(known) > 20 and theirs.batch_decode(known, skip_special_tokens=True) == ours.decode(known)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eod, ours.pad)


def test_a_tokenizer_json_stays_but_for_what_it_adds(tmp_path: pathlib.Path) -> None:
    import transformers

    file = hugging_face(tmp_path / "tokenizer.json")
    values = json.loads(file.read_text(encoding="utf-8"))
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    for name in ("framed", "bare"):
        (tmp_path / name).mkdir()
    framed = tmp_path / "framed" / "tokenizer.json"
    framed.write_text(json.dumps(values), encoding="utf-8")
    save_tokenizer(framed, tmp_path / "bare", 64)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "bare")
    text = stdlib_texts(1)[0]
    assert loaded(text).input_ids == Tokenizer.open(file).encode([text])[0] == Tokenizer.open(framed).encode([text])[0]
