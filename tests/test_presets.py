"""examples/configs: the sizes of arXiv 2112.04426, Table 2, counted on models without memory."""

import pathlib

import pytest
import torch
from model_helpers import initialize

from megatron_retro import mcore
from megatron_retro.config.flags import parse
from megatron_retro.config.model import default_retro_layers
from megatron_retro.config.training import PretrainConfig
from megatron_retro.model.attention import CrossAttention
from megatron_retro.model.model import RetroModel

CONFIGS = pathlib.Path(__file__).parents[1] / "examples" / "configs"
MILLION = 10**6
# Millions of parameters without embeddings: (GPT, RETRO, learning rate).
PUBLISHED = {"172m": (132, 172, 2e-4), "425m": (368, 425, 2e-4), "1.5b": (1309, 1451, 2e-4), "7.5b": (6982, 7532, 1e-4)}


def load(preset: str) -> PretrainConfig:
    config = parse(PretrainConfig, ["--config", str(CONFIGS / f"retro_{preset}.yaml")])
    config.model.finish()
    config.retro.finish(config.model)
    config.parallel.finish(1, config.model, config.retro)
    return config


def build_without_memory(config: PretrainConfig, *, retro: bool = True) -> RetroModel:
    initialize()
    with torch.device("meta"):
        neighbors = config.retro if retro else None
        return RetroModel(config.model, neighbors, config.parallel, vocab_size=128, chunk_length=64, seed=1)


def count_weights(model: RetroModel) -> int:
    """Entries of weight matrices, embeddings and output layer aside. (Scales of norms are 0.02 % more at most.)"""
    names = ("embedding", "output_layer")
    return sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and not any(part in name for part in names)
    )


def count_position_projections(model: RetroModel) -> int:
    """What DeepMind's relative positions add: one matrix an attention, of the shape of its query projection."""
    attentions = [module for module in model.modules() if isinstance(module, (mcore.SelfAttention, CrossAttention))]
    shapes = [attention.config for attention in attentions]
    return sum(shape.hidden_size * shape.kv_channels * shape.num_attention_heads for shape in shapes)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_retro_has_the_published_number_of_parameters(preset):
    model = build_without_memory(load(preset))
    ours, positions, published = count_weights(model), count_position_projections(model), PUBLISHED[preset][1]
    difference = (ours + positions) / MILLION - published
    print(f"{preset}: {ours / MILLION:.2f} + {positions / MILLION:.2f} M, {difference:+.2f} M from {published} M")
    assert abs(difference) <= 0.5  # all the digits published
    scales = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    assert 0 < scales < 2e-4 * ours


@pytest.mark.parametrize("preset", PUBLISHED)
def test_gpt_has_the_published_number_of_parameters(preset):
    model = build_without_memory(load(preset), retro=False)
    counted, published = count_weights(model) + count_position_projections(model), PUBLISHED[preset][0] * MILLION
    assert abs(counted - published) <= max(0.5 * MILLION, 1e-3 * published)


@pytest.mark.parametrize("preset", ["1.5b", "7.5b"])
def test_the_default_layers_do_not_fit_the_published_number(preset):
    config = load(preset)
    config.retro.retro_layers = ",".join(map(str, default_retro_layers(config.model.num_layers)))
    model = build_without_memory(config)
    counted = count_weights(model) + count_position_projections(model)
    assert counted < (PUBLISHED[preset][1] - 10) * MILLION


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_train_as_published(preset):
    config = load(preset)
    assert config.retro.retro_add_retriever and config.retro.retro_num_neighbors == 2
    assert config.model.seq_length == 2048 and config.retro.layers[:3] == (6, 9, 12)
    assert config.optimization.lr == PUBLISHED[preset][2]
    assert config.optimization.min_lr == pytest.approx(config.optimization.lr / 10)


def test_every_preset_is_counted():
    assert {path.name for path in CONFIGS.glob("retro_*[mb].yaml")} == {f"retro_{preset}.yaml" for preset in PUBLISHED}
