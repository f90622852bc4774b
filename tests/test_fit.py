"""A RETRO that starts from a GPT is that GPT at first: of each family, at any layout; and what does not fit."""

import itertools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign import MODELS, V, save
from launch import run_forked
from model_helpers import initialize

from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.errors import UserError
from megatron_retro.interop.source import open_source
from megatron_retro.model.model import make_stages
from megatron_retro.training import fit
from megatron_retro.training.checkpoint import shape_of

WORKER = pathlib.Path(__file__).with_name("fit_worker.py")

SERIAL = [f"{name}:1x1" for name in MODELS] + ["llama3:1x1xfrozen"]
TWO_RANKS = ["llama:2x1xSP", "llama3:1x2", "qwen3:2x1xSP", "gpt2:2x1", "gpt2-exact:1x2", "pythia:1x2xVP2"]
TWO_RANKS += ["llama3:2x1xSPxfrozen", "llama3:1x2xfrozen", "llama3:1x1xshardedxfrozen"]
FOUR_RANKS = ["llama3:2x2xSP", "qwen2:2x2", "gpt2:2x2xSP", "pythia:2x2xSP"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("foreign")
    for name in MODELS:
        save(name, folder)
    return folder


def fitted(models: pathlib.Path, ranks: int, cases: list[str]) -> dict:
    out = models / f"{ranks}.pt"
    run_forked(WORKER, out, models, *cases, ranks=ranks)
    return torch.load(out)


@pytest.fixture(scope="module")
def serial(models: pathlib.Path) -> dict:
    return fitted(models, 1, SERIAL)


def assert_is_the_model(models: pathlib.Path, case: str, result: dict) -> None:
    expected = torch.load(models / f"{case.split(':')[0]}.logits")
    torch.testing.assert_close(
        result["logits"][..., :V], expected, rtol=0, atol=1e-5, msg=lambda told: f"{case} {told}"
    )


def test_the_first_logits_are_the_models(models: pathlib.Path, serial: dict) -> None:
    for case, result in serial.items():
        assert_is_the_model(models, case, result)
        assert result["logits"].abs().max() > 1  # so that 1e-5 says something


def test_padded_rows_hardly_count(models: pathlib.Path, serial: dict) -> None:
    for case, result in serial.items():
        padded, known = result["logits"][..., V:].exp().sum(-1), result["logits"][..., :V].exp().sum(-1)
        assert (padded <= known * (128 - V) / V * (1 + 1e-5)).all(), case


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_every_layout_is_the_model_and_trains_as_one_process(
    models: pathlib.Path, serial: dict, ranks: int, cases: list[str]
) -> None:
    for case, result in fitted(models, ranks, cases).items():
        name, layout = case.split(":")
        assert_is_the_model(models, case, result)
        alone = serial[f"{name}:1x1{'xfrozen' if layout.endswith('frozen') else ''}"]
        assert result["loss"] == pytest.approx(alone["loss"], rel=2e-4), case
        for key in ("copied", "new", "changed"):
            assert result[key] == alone[key], case


def test_a_frozen_decoder_stays_and_takes_no_optimizer_state(serial: dict) -> None:
    frozen, free = serial["llama3:1x1xfrozen"], serial["llama3:1x1"]
    assert frozen["changed"] == frozen["new"] and frozen["copied"]
    assert set(free["changed"]) >= set(free["copied"])
    assert frozen["optimizer_bytes"] < free["optimizer_bytes"]


# ------------------------------------------------------------------------------------------------ what does not fit


def broken(models: pathlib.Path, folder: pathlib.Path, name: str, change: Callable[[dict, dict], None]) -> pathlib.Path:
    """A copy of a model's directory with other tensors or another config."""
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(models / name, folder / "broken")
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def take(tensors: dict, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[name] = change(tensors[name]).contiguous()


DAMAGE: dict[str, tuple[str, Callable[[dict, dict], Any], str]] = {
    "missing": (
        "llama",
        lambda tensors, config: tensors.pop("model.layers.1.mlp.up_proj.weight"),
        "tensor model.layers.1.mlp.up_proj.weight is missing",
    ),
    "unexpected": (
        "llama",
        lambda tensors, config: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
        r"tensor model.layers.0.self_attn.q_proj.bias \[32\] has no place",
    ),
    "shape": (
        "gpt2",
        lambda tensors, config: take(tensors, "transformer.h.2.mlp.c_fc.weight", lambda x: x[:, :96]),
        r"tensor transformer.h.2.mlp.c_fc.weight is \[96, 32\], by the model's flags it is \[128, 32\]",
    ),
    "rows of no head": (
        "llama",
        lambda tensors, config: take(tensors, "model.layers.0.self_attn.k_proj.weight", lambda x: x[:15]),
        r"k_proj.weight.*of \[\[32, 32\], \[15, 32\], \[16, 32\]\] do not fit",
    ),
    "width": (
        "pythia",
        lambda tensors, config: config.update(hidden_size=64),
        r"tensor gpt_neox.embed_in.weight is \[97, 32\], by the model's flags it is \[97, 64\]",
    ),
    "no numbers": (
        "llama",
        lambda tensors, config: take(tensors, "model.norm.weight", lambda x: x.log() - torch.inf),
        "tensor model.norm.weight of float32 holds what is no finite number",
    ),
    "quantized": (
        "llama",
        lambda tensors, config: take(tensors, "model.norm.weight", lambda x: x.to(torch.int8)),
        "tensor model.norm.weight of int8 holds what is no finite number, or none without a scale",
    ),
    "family": ("llama", lambda tensors, config: config.update(model_type="mamba"), "model_type 'mamba' is none of"),
    "activation": (
        "llama",
        lambda tensors, config: config.update(hidden_act="relu"),
        "hidden_act is 'relu'; only 'silu'",
    ),
    "rotary": (
        "llama",
        lambda tensors, config: config.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rotary positions are of the kind .*yarn",
    ),
    "no number": ("qwen2", lambda tensors, config: config.update(num_hidden_layers="4"), "num_hidden_layers is '4'"),
    "no value": ("qwen2", lambda tensors, config: config.pop("intermediate_size"), "no 'intermediate_size'"),
    "biases": ("llama", lambda tensors, config: config.update(attention_bias=True), "attention_bias is True"),
}


def start_from(path: pathlib.Path, **flags: Any) -> fit.Fitted:
    """As `pretrain_retro.py` does."""
    initialize()
    source = open_source("--retro-fit-from", str(path))
    shape = shape_of(fit.adopt({"seq_length": 32, **flags}, source))
    fit.check(source, seq_length=shape.model.seq_length, chunk_length=8, vocab_size=V)
    retro = shape.retro if shape.retro.retro_add_retriever else None
    return fit.fit(make_stages(shape.model, retro, TrainingParallelConfig(), 128, 8, 1), source)


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_refused(models: pathlib.Path, tmp_path: pathlib.Path, kind: str) -> None:
    name, change, told = DAMAGE[kind]
    with pytest.raises(UserError, match=told):
        start_from(broken(models, tmp_path, name, change))


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3", "gpt2", "pythia"])
def test_any_value_of_a_config_is_read_or_refused(models: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    values = json.loads((models / name / "config.json").read_text())
    names = {*values, "rope_scaling", "sliding_window", "use_sliding_window", "rotary_pct", "head_dim"}
    wrong: list[Any] = ["x", [], {}, -1, 0, None, 0.3, True, {"rope_theta": "x"}, {"rope_type": []}]
    refused = 0
    for key, value in itertools.product(sorted(names), wrong):
        (tmp_path / "config.json").write_text(json.dumps({**values, key: value}))
        try:
            source = open_source("--retro-fit-from", str(tmp_path))
            fit.check(source, seq_length=32, chunk_length=8, vocab_size=V)
        except UserError:
            refused += 1
    assert refused > 20


def test_files_cut_short_are_refused(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = shutil.copytree(models / "gpt2", tmp_path / "cut")
    whole = (path / "model.safetensors").read_bytes()
    for part in (b"", whole[:100], whole[: len(whole) // 2], b"{}" + whole):
        (path / "model.safetensors").write_bytes(part)
        with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
            start_from(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        start_from(path)
    for text in ("", "[]", '{"model_type": ', "{}"):
        (path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            start_from(path)


def test_flags_that_are_not_the_models_are_refused(models: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"--hidden-size is 48, --retro-fit-from \S+ has 32; leave the flag out"):
        start_from(models / "llama", hidden_size=48)
    start_from(models / "llama", hidden_size=32)
    with pytest.raises(UserError, match="--max-position-embeddings 64 is less than --seq-length 72"):
        start_from(models / "gpt2", seq_length=72)
    with pytest.raises(UserError, match="--seq-length 56 is more than the 48 positions"):
        start_from(models / "mistral", seq_length=56)
    start_from(models / "llama", seq_length=4096)


def test_older_directories_are_read_too(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Several files with an index; `.bin` files; names without their prefix; buffers among the weights."""
    from safetensors.torch import load_file, save_file

    expected = start_from(models / "gpt2")
    path = shutil.copytree(models / "gpt2", tmp_path / "gpt2")
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    (path / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    for number, half in enumerate(halves):
        save_file(half, path / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert start_from(path) == expected
    source = open_source("--retro-fit-from", str(path))
    assert source.left_out() == ["transformer.h.0.attn.bias"]
    assert "no weights (1): transformer.h.0.attn.bias" in expected.lines(source)[-1]

    (path / "model.safetensors.index.json").unlink()
    for is_archive in (True, False):
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=is_archive)
        assert start_from(path) == expected
    for content in ([], {"state_dict": tensors}):
        torch.save(content, path / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read \(it is no dictionary of tensors"):
            start_from(path)


def test_names_are_told_in_groups() -> None:
    names = [f"decoder.layers.{number}.mlp.linear_fc1.weight" for number in (0, 1, 2, 5)]
    assert fit.grouped([*names, "embedding.word_embeddings.weight"]) == (
        "decoder.layers.{0-2,5}.mlp.linear_fc1.weight, embedding.word_embeddings.weight"
    )
