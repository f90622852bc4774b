"""benchmarks/: the plain model computes what the product does, and the benchmark of a training step reports both."""

import json
import pathlib
import re
import sys

import pytest
import torch
from launch import run_forked
from model_helpers import C, S, V, make_configs, make_model, make_neighbors, make_tokens

from megatron_retro.config.training import OptimizationConfig
from megatron_retro.model.model import RetroModel

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from plain import PlainRetro, PlainTraining  # noqa: E402

BARE = {"normalization": "RMSNorm", "disable_bias_linear": True}
# The plain model's names in the product's terms, one after the other.
NAMES = (
    (r"^encoder_embedding", "decoder.encoder.embedding.word_embeddings"),
    (r"^embedding", "embedding.word_embeddings"),
    (r"^encoder_layers", "decoder.encoder.layers"),
    (r"^layers", "decoder.layers"),
    (r"^encoder_norm", "decoder.encoder.final_layernorm"),
    (r"^norm", "decoder.final_layernorm"),
    (r"\.attention_norm", ".input_layernorm"),
    (r"\.reads_norm", ".pre_cross_attn_layernorm"),
    (r"\.mlp_norm", ".pre_mlp_layernorm"),
    (r"\.attention\.(\w+)", r".self_attention.linear_\1"),
    (r"\.reads\.(\w+)", r".cross_attention.linear_\1"),
    (r"linear_out", "linear_proj"),
    (r"\.up", ".mlp.linear_fc1"),
    (r"\.down", ".mlp.linear_fc2"),
)


def product_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def make_both(**flags: object) -> tuple[RetroModel, PlainRetro]:
    """The two with the same weights, large enough that each of them matters."""
    product = make_model(**flags)
    model, retro = make_configs(**flags)
    plain = PlainRetro(model, retro, V, C)
    weights, generator = dict(product.named_parameters()), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            source = weights.pop(product_name(name))
            source.add_(torch.randn(source.shape, generator=generator), alpha=0.1)
            weight.copy_(source)
    assert not weights
    return product, plain


@pytest.mark.parametrize("flags", [{}, BARE], ids=["default", "bare"])
def test_plain_model_has_the_losses_and_gradients_of_the_product(flags: dict) -> None:
    product, plain = make_both(**flags)
    tokens, labels, (neighbors, lengths) = make_tokens(), make_tokens(seed=4), make_neighbors()
    loss, expected = product(tokens, labels, neighbor_tokens_BxLxKxR=neighbors, neighbor_lengths_BxLxK=lengths)
    found = plain(tokens, labels, neighbors, lengths)
    assert found.shape == (len(tokens), S)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    loss.backward()
    weights = dict(product.named_parameters())
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(weight.grad, weights[product_name(name)].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_plain_model_learns(bf16: bool) -> None:
    _, plain = make_both()
    training = PlainTraining(plain, OptimizationConfig(lr=1e-2), torch.device("cpu"), bf16)
    batch = (make_tokens(), make_tokens(seed=4), *make_neighbors())
    losses = [training.step(*batch) for _ in range(10)]
    assert losses[-1] < losses[0] - 0.5


# Runs a program whose fresh processes are forks.
IN_FORKS = """
import multiprocessing, runpy, subprocess, sys, types

def answer(command, pipe):
    sys.argv, sys.stdout = command, types.SimpleNamespace(write=pipe.send, flush=lambda: None)
    runpy.run_path(command[0], run_name="__main__")

def run(command, **_):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork").Process(target=answer, args=(command[1:], theirs))
    fork.start()
    told = ours.recv()
    fork.join()
    return types.SimpleNamespace(stdout=told)

subprocess.run = run
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_benchmark_reports_each_model(tmp_path: pathlib.Path) -> None:
    small = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --retro-layers 1 --seq-length 128".split()
    flags = ["--steps", 2, "--dtype", "bf16", *small]
    (tmp_path / "in_forks.py").write_text(IN_FORKS)
    output = run_forked(tmp_path / "in_forks.py", BENCHMARKS / "train_step.py", *flags)
    gpt, retro, plain = lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    alone = json.loads(
        run_forked(BENCHMARKS / "train_step.py", *flags, "--model", "plain")
    )  # its memory in a fresh one
    assert alone["parameters"] == plain["parameters"] and alone["peak_gib"] >= alone["start_gib"] > 0
    assert [line["model"] for line in lines] == ["gpt", "retro", "plain"]
    assert gpt["parameters"] < retro["parameters"] == plain["parameters"]
    assert retro["flops_over_gpt"] == pytest.approx(retro["tflop"] / gpt["tflop"], rel=1e-2)
    assert retro["time_over_gpt"] > 0 and retro["time_over_plain"] > 0 and retro["cpu_over_plain"] > 0
    for line in lines:
        assert line["dtype"] == "bf16" and line["tokens"] == 4 * 128
        assert 0 < line["ms_min"] <= line["ms_median"] and line["cpu_seconds"] > 0
        assert 0 < line["matmul_share"] < 1 and line["tflop"] > 0
        assert line["peak_gib"] >= line["start_gib"] > 0
        assert 0 < line["loss"] < 10
