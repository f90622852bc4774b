"""Megatron-LM's checkpoints: their logits, at any layout they were saved at and under any of their names."""

import megatron_lm_helpers as theirs
import pytest
import torch
from megatron_lm_helpers import B, Computed, Old
from model_helpers import initialize

from megatron_retro.config.flags import from_dict
from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.interop.megatron_lm import MegatronCheckpoint
from megatron_retro.model.model import RetroModel
from megatron_retro.training.checkpoint import _Shape

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
    shape = from_dict(_Shape, {**source.flags, "seq_length": theirs.S})
    shape.model.finish()
    shape.retro.finish(shape.model)
    retro = shape.retro if shape.retro.retro_add_retriever else None
    parallel = TrainingParallelConfig()
    parallel.finish(1, shape.model, retro)
    model = RetroModel(shape.model, retro, parallel, source.vocab_size, source.chunk_length or 3, seed=1)
    weights = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    assert set(weights) == set(source.names())
    for name, weight in weights.items():
        assert tuple(weight.shape) == source.shape(name) == tuple(source.tensor(name).shape), name
        weight.copy_(source.tensor(name))
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
