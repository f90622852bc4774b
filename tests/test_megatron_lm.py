"""Megatron-LM's checkpoints: their logits, at any layout they were saved at and under any of their names."""

import os
import pathlib

import megatron_lm_helpers as theirs
import pytest
import torch
from launch import run_forked
from megatron_lm_helpers import B, Computed, Old
from model_helpers import initialize

from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.errors import UserError
from megatron_retro.interop.megatron_lm import MegatronCheckpoint
from megatron_retro.model.model import RetroModel
from megatron_retro.training.checkpoint import shape_of
from megatron_retro.training.fit import fit

OLD_GPT = Old("local", retro=False)
CLOSE = dict(rtol=0, atol=1e-5)
MODELS = {
    "core, Transformer Engine": (Old("fused"), dict(tensor=4)),
    "core, local": (Old("local", like_43b=True, activation="swiglu"), dict(tensor=8)),
    "core, later": (Old("fused", like_43b=True, activation="swiglu", final_norm=False), dict()),
    "legacy, as 43B": (Old("legacy", like_43b=True, activation="swiglu"), dict(tensor=8)),
    "legacy, as 8B": (Old("legacy", like_43b=True, activation="squared_relu", gate=0.7), dict(tensor=4)),
    "legacy, stages": (Old("legacy"), dict(tensor=2, pipeline=2)),
    "GPT": (Old("fused", retro=False), dict(tensor=2, pipeline=2)),
    "legacy GPT": (Old("legacy", retro=False, like_43b=True), dict(tensor=2)),
}


def load(source: MegatronCheckpoint) -> RetroModel:
    initialize()
    shape = shape_of({**source.flags, "seq_length": theirs.S})
    retro = shape.retro if shape.retro.retro_add_retriever else None
    parallel = TrainingParallelConfig()
    parallel.finish(1, shape.model, retro)
    model = RetroModel(shape.model, retro, parallel, source.vocab_size, source.chunk_length or 3, seed=1)
    fitted = fit([model], source)
    assert not fitted.new
    assert all(source.shape(name) == tuple(source.tensor(name).shape) for name in source.names())
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_old_model(name, tmp_path):
    old, layout = MODELS[name]
    weights = old.weights()
    theirs.save(tmp_path, old, weights, **layout)
    model = load(MegatronCheckpoint(tmp_path, trust_pickle=True))
    tokens, neighbors = theirs.tokens_and_neighbors()
    lengths = torch.randint(1, theirs.R + 1, neighbors.shape[:3])
    inputs = dict(neighbor_tokens_BxLxKxR=neighbors, neighbor_lengths_BxLxK=lengths) if old.retro else {}
    with torch.no_grad():
        logits = model(tokens, **inputs)
    computed = Computed(old, weights)
    for b in range(B):
        expected = computed.logits(tokens[b], neighbors[b] if old.retro else None)
        torch.testing.assert_close(logits[b].double(), expected, **CLOSE)
        assert expected.std() > 0.3


def test_two_ranks_compute_the_same(tmp_path):
    tokens, neighbors = theirs.tokens_and_neighbors()
    names = {"core": "core, Transformer Engine", "later": "core, later", "legacy": "legacy, as 43B"}
    expected = {}
    for folder, name in names.items():
        old, layout = MODELS[name]
        theirs.save(tmp_path / folder, old, old.weights(), **layout)
        computed = Computed(old, old.weights())
        expected[folder] = torch.stack([computed.logits(tokens[b], neighbors[b]) for b in range(B)])
    layouts = ["core:2x1xSP", "core:1x2", "later:2x1xSP", "legacy:1x2"]
    cases = [f"{tmp_path / folder}:{layout}" for folder, layout in (case.split(":") for case in layouts)]
    run_forked("tests/megatron_lm_worker.py", tmp_path / "out.pt", *cases, ranks=2)
    for case, logits in torch.load(tmp_path / "out.pt").items():
        folder = pathlib.Path(case.rsplit(":", 1)[0]).name
        torch.testing.assert_close(
            logits.double(), expected[folder], **CLOSE, msg=lambda told, case=case: f"{case} {told}"
        )


def test_training_reaches_every_weight(tmp_path):
    old, layout = MODELS["core, Transformer Engine"]
    theirs.save(tmp_path, old, old.weights(), **layout)
    model = load(MegatronCheckpoint(tmp_path, trust_pickle=True)).train()
    tokens, neighbors = theirs.tokens_and_neighbors()
    lengths = torch.ones(neighbors.shape[:3], dtype=torch.int64)
    loss, _ = model(tokens, tokens, neighbor_tokens_BxLxKxR=neighbors, neighbor_lengths_BxLxK=lengths)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


# ------------------------------------------------------------------------------------------------ what it refuses


def test_the_flag_is_needed(tmp_path):
    one_shard(tmp_path)
    flags = ["--retro-fit-from", tmp_path, "--retro-work-dir", tmp_path, "--num-layers", 3]
    refused = run_forked("pretrain_retro.py", *flags, expect=2)
    assert "--trust-pickle" in refused and "Traceback" not in refused
    read = run_forked("pretrain_retro.py", *flags, "--trust-pickle", expect=2)
    assert f"--num-layers is 3, --retro-fit-from {tmp_path / 'iter_0001200'} has 9" in read


class Bomb:
    """Runs a program wherever an ordinary reader of pickles meets it."""

    def __init__(self, mark: pathlib.Path):
        self.command = f"touch {mark}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("hidden_in", ["args", "model", "optimizer"])
def test_a_pickle_runs_nothing(hidden_in, tmp_path):
    mark, file = tmp_path / "mark", one_shard(tmp_path / "old")
    content = torch.load(file, weights_only=False)
    bomb = Bomb(mark)
    if hidden_in == "args":
        content["args"].spec = [bomb, {bomb: bomb}]
    else:
        content[hidden_in]["bomb"] = bomb
    torch.save(content, file)
    with pytest.raises(UserError, match="--trust-pickle"):
        MegatronCheckpoint(tmp_path / "old", trust_pickle=False)
    source = MegatronCheckpoint(tmp_path / "old", trust_pickle=True)
    assert torch.equal(source.tensor("decoder.final_layernorm.bias"), content["model"]["decoder.final_layernorm.bias"])
    assert not mark.exists()
    torch.load(file, weights_only=False)  # an ordinary reader
    assert mark.exists()


def one_shard(root: pathlib.Path, tensor: int = 1, old: Old = OLD_GPT) -> pathlib.Path:
    return theirs.save(root, old, old.weights(), tensor=tensor) / "mp_rank_00" / "model_optim_rng.pt"


def changed(file: pathlib.Path, change) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


READS = "decoder.layers.8.cross_attention.attn.linear_kv.weight"
NORM, QKV = "decoder.layers.2.pre_mlp_layernorm.weight", "decoder.layers.2.self_attention.linear_qkv.weight"
REFUSED = {
    "no args": (lambda content: content.pop("args"), "mp_rank_00/model_optim_rng.pt has no 'args'"),
    "no shape": (lambda content: delattr(content["args"], "hidden_size"), "its args have no hidden_size"),
    "another iteration": (lambda content: content.update(iteration=1), r"of iteration 1200, .* of 1;"),
    "an old version": (lambda content: content.update(checkpoint_version=1.0), "of checkpoint version 1.0"),
    "another shape": (
        lambda content: content["model"].update({QKV: torch.ones(5, 3)}),
        rf"mp_rank_01/.*: tensor {QKV} is \[96, 26\], in .*mp_rank_00/.* \[5, 3\]",
    ),
    "a tensor less": (lambda content: content["model"].pop(NORM), f"holds a tensor {NORM} that"),
    "a tensor more": (lambda content: content["model"].update(new=torch.ones(3)), r"lacks the tensor new \[3\]"),
    "virtual stages": (lambda content: content.update(model0={}), "virtual pipeline stages"),
    "experts": (lambda content: vars(content["args"]).update(num_experts=8), "num_experts 8"),
    "a model in itself": (lambda content: content["model"].update(more=content["model"]), "its 'model' is nested"),
    "too many ranks": (lambda content: vars(content["args"]).update(tensor_model_parallel_size=10**12), "is missing"),
    "a text for a number": (lambda content: vars(content["args"]).update(num_layers="many"), "num_layers 'many'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shards_that_do_not_fit(name, tmp_path):
    change, message = REFUSED[name]
    changed(one_shard(tmp_path, tensor=2), change)
    with pytest.raises(UserError, match=message):
        MegatronCheckpoint(tmp_path, trust_pickle=True)


def test_a_model_other_than_its_args_say(tmp_path):
    old = MODELS["core, later"][0]
    cases = [
        (QKV, torch.ones(7, theirs.D), rf"tensor {QKV} is \[7, 26\], by the model's flags it is \[192, 26\]"),
        (READS, None, f"has no tensor {READS.replace('attn.', '')}"),
        ("decoder.layers.7.mlp.novel.weight", torch.ones(5, 3), r"novel.weight \[5, 3\] has no place"),
        ("embedding.word_embeddings.weight", None, "holds no word embeddings"),
        ("decoder.layers.2.input_layernorm.bias", torch.tensor(1.0), "layer_norm_bias is a single number"),
    ]
    for number, (name, weight, message) in enumerate(cases):
        weights = old.weights() | ({} if weight is None else {name: weight})
        if weight is None:
            del weights[name]
        theirs.save(tmp_path / str(number), old, weights)
        with pytest.raises(UserError, match=message):
            load(MegatronCheckpoint(tmp_path / str(number), trust_pickle=True))


def test_files_that_do_not_fit(tmp_path):
    file = one_shard(tmp_path, tensor=2)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            MegatronCheckpoint(tmp_path, trust_pickle=True)

    whole = file.read_bytes()
    for damaged in (b"", b"PK", whole[: len(whole) // 2], whole.replace(b"hidden_size", b"hidden_sze!")):
        file.write_bytes(damaged)
        refused("mp_rank_00/model_optim_rng.pt")
    file.write_bytes(whole)
    file.parent.rename(file.parent.with_name("mp_rank_07"))
    refused("holds no mp_rank_00")
    file.parent.with_name("mp_rank_07").rename(file.parent)
    file.parent.with_name("mp_rank_01").rename(tmp_path / "aside")
    refused("shard mp_rank_01 is missing")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("70")
    refused("names 70, but there is no iter_0000070")


def test_the_tracker_may_name_a_release(tmp_path):
    one_shard(tmp_path)
    (tmp_path / "iter_0001200").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    source = MegatronCheckpoint(tmp_path, trust_pickle=True)
    assert source.path == tmp_path / "release"
    assert MegatronCheckpoint(tmp_path / "release", trust_pickle=True).names() == source.names()
