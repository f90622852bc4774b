"""The programs that begin with a foreign model: conversion, training, generation, resuming; and what they refuse."""

import json
import pathlib
import shutil

import foreign
import pytest
import torch
from launch import run_forked
from torch.distributed.checkpoint import FileSystemReader

from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.interop.own import OwnCheckpoint
from megatron_retro.interop.source import open_source
from megatron_retro.training import checkpoint_files
from megatron_retro.training.fit import BY_TOKEN, is_retrieval

RUN = (
    "--retro-add-retriever --retro-layers 2,4 --seq-length 256 --train-iters 4 --log-interval 1 --eval-iters 0".split()
)
RUN += "--micro-batch-size 2 --lr 1e-2".split()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory of a Llama that knows as many tokens as the small work dir's tokenizer, and some more."""
    foreign.MODELS["large"] = (
        "Llama",
        {**foreign.MODELS["llama"][1], "vocab_size": 1003, "max_position_embeddings": 512},
    )
    path = tmp_path_factory.mktemp("large")
    foreign.make("large").save_pretrained(path / "llama")
    return path / "llama"


@pytest.fixture(scope="module")
def converted(llama: pathlib.Path, small_work: pathlib.Path) -> pathlib.Path:
    save, tokenizer = llama.parent / "converted", small_work / "tokenizer" / "tokenizer.model"
    told = run_forked("tools/convert_checkpoint.py", "--load", llama, "--save", save, "--tokenizer-model", tokenizer)
    assert "from Hugging Face model" in told and "iter_0000000" in told
    return save


def losses(save: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["lm_loss"] for line in lines}


def test_a_converted_model_writes_as_the_original(
    llama: pathlib.Path, converted: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    import transformers

    prompt, output = "import os\n\ndef main(", tmp_path / "text.jsonl"
    flags = ["--load", converted, "--retro-work-dir", small_work, "--prompt", prompt, "--max-new-tokens", "8"]
    run_forked("tools/generate_retro_text.py", *flags, "--temperature", "0", "--json", "--output", output)
    tokenizer = Tokenizer.open(small_work / "tokenizer" / "tokenizer.model")
    tokens = torch.tensor(tokenizer.encode([prompt]))
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    known = torch.arange(1003) < tokenizer.vocab_size
    known[tokenizer.pad] = False
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1].where(known, -torch.inf).argmax(-1, keepdim=True)], 1)
    assert json.loads(output.read_text())["text"] == tokenizer.decode(tokens.tolist())[0][len(prompt) :]


def test_training_starts_from_either_form_and_resumes(
    llama: pathlib.Path, converted: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A frozen decoder keeps its weights to the bit, over a resume at another layout too."""
    run = ["pretrain_retro.py", "--retro-work-dir", small_work, *RUN, "--retro-freeze-decoder"]
    one, two = tmp_path / "one", tmp_path / "two"
    told = run_forked(*run, "--retro-fit-from", llama, "--save", one)
    assert "from Hugging Face model" in told and "new, not in it" in told
    again = [*run, "--retro-fit-from", converted, "--save", two, "--load", two]
    run_forked(*again, "--exit-interval", "2")
    again = [*again[:-5], tmp_path / "moved away", *again[-4:]]  # what the run began with is not needed any more
    told = run_forked(*again, "--tensor-model-parallel-size", "2", "--use-distributed-optimizer", ranks=2, expect=2)
    assert "--use-distributed-optimizer" in told
    told = run_forked(*again, "--tensor-model-parallel-size", "2", ranks=2)
    assert "from checkpoint" not in told and "resumed from" in told
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    source = open_source("--load", str(llama))
    ends = [OwnCheckpoint(checkpoint_files.complete(save)[0]) for save in (one, two)]
    for end in ends:
        for name in end.names():
            if not is_retrieval(name):
                kept, came = end.tensor(name), source.tensor(name)
                assert torch.equal(kept[: len(came)], came), name
    stored = FileSystemReader(str(ends[0].path)).read_metadata().state_dict_metadata
    moments = {name.split("exp_avg.")[1] for name in stored if "exp_avg." in name}
    assert moments == {name for name in ends[0].names() if is_retrieval(name)}


def test_a_model_of_here_is_a_beginning_too(trained: pathlib.Path, small_work: pathlib.Path) -> None:
    """A RETRO goes on as one without naming its shape; as a GPT it would lose what reads."""
    run = ["pretrain_retro.py", "--retro-work-dir", small_work, "--retro-fit-from", trained]
    shorter = "--seq-length 128 --micro-batch-size 2 --eval-iters 0 --train-iters 1".split()
    told = run_forked(*run, *shorter)
    assert "RETRO (layers 2,4)" in told and "new, not in it" not in told
    told = run_forked(*run, "--no-retro-add-retriever", *shorter, expect=2)
    assert "--retro-add-retriever is False" in told
    told = run_forked(*run, "--retro-layers", "2", *shorter, expect=2)
    assert "--retro-layers is 2, --retro-fit-from" in told and "has 2,4" in told


def test_a_round_trip_comes_back_to_its_work_dir(trained: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The exported tokenizer has another form, and the same ids."""
    convert = "tools/convert_checkpoint.py"
    run_forked(convert, "--load", trained, "--save", tmp_path / "half", "--bf16")
    run_forked(convert, "--load", trained, "--save", tmp_path / "exported")
    run_forked(convert, "--load", tmp_path / "exported", "--save", tmp_path / "back")
    source, back = (OwnCheckpoint(checkpoint_files.complete(save)[0]) for save in (trained, tmp_path / "back"))
    assert back.state.tokenizer_digest == source.state.tokenizer_digest and back.flags == source.flags
    for name in source.names():
        before, after = source.tensor(name), back.tensor(name)
        known = Tokenizer.open(tmp_path / "exported" / "tokenizer.json").vocab_size if name in BY_TOKEN else None
        assert torch.equal(before[:known], after[:known]), name
    half = open_source("--load", str(tmp_path / "half"))
    assert {half.tensor(name).dtype for name in half.names()} == {torch.bfloat16}


def test_what_does_not_fit_is_told_by_every_program(
    llama: pathlib.Path, converted: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken, save = shutil.copytree(llama, tmp_path / "broken"), tmp_path / "save"
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, broken / "model.safetensors")
    run = ["pretrain_retro.py", "--retro-work-dir", small_work, *RUN, "--save", save]
    convert = ["tools/convert_checkpoint.py", "--tokenizer-model", small_work / "tokenizer" / "tokenizer.model"]
    wrong = "tensor model.norm.weight is [31], by the model's flags it is [32]"
    damaged = shutil.copytree(converted, tmp_path / "damaged")
    file = next((damaged / "iter_0000000").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for command, told, ranks in (
        ([*run, "--retro-fit-from", damaged], f"checkpoint file {file} was", 2),
        ([*run, "--retro-fit-from", broken], f"--retro-fit-from {broken}: {wrong}", 2),
        ([*convert, "--load", broken, "--save", save], f"--load {broken}: {wrong}", 1),
        ([*convert, "--load", llama, "--save", save], "WORLD_SIZE is 2; a conversion is the work of one process", 2),
        ([*run, "--retro-fit-from", tmp_path], "holds no model", 1),
        ([*convert, "--load", converted / "iter_0000000", "--save", save], "give the directory above it", 1),
        ([*run, "--retro-fit-from", tmp_path / "none"], "no such directory", 1),
        ([*run, "--retro-freeze-decoder"], "--retro-freeze-decoder needs", 1),
        (["tools/convert_checkpoint.py", "--load", llama, "--save", save], "holds no tokenizer.json", 1),
        ([*convert, "--load", llama, "--save", converted], "holds checkpoints already", 1),
        ([*convert, "--load", llama, "--save", llama], "holds a Hugging Face model", 1),
    ):
        output = run_forked(*command, ranks=ranks, expect=2)
        assert told in output and "Traceback" not in output, output
    assert not list(save.glob("iter_*"))


def test_another_tokenizer_is_noticed(llama: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """By what it makes of a few texts, not by the bytes of its file."""
    import tokenizers

    path = shutil.copytree(llama, tmp_path / "other")
    other = tokenizers.Tokenizer(tokenizers.models.BPE({"<eos>": 0, "a": 1}, [], unk_token="<eos>"))
    other.save(str(path / "tokenizer.json"))
    own = path / "tokenizer.json"
    told = run_forked("pretrain_retro.py", "--retro-work-dir", small_work, *RUN, "--retro-fit-from", path, expect=2)
    assert f"the model's tokenizer {own}" in told and f"take --tokenizer-model {own}" in told
    given = ("--tokenizer-model", small_work / "tokenizer" / "tokenizer.model", "--save", tmp_path / "save")
    told = run_forked("tools/convert_checkpoint.py", "--load", path, *given, expect=2)
    assert f"take --tokenizer-model {own}" in told and not (tmp_path / "save").exists()
