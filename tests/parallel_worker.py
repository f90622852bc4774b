"""Trains a tiny model a few steps at several layouts in one launch and stores losses and gradients of each.

    torchrun --nproc-per-node N tests/parallel_worker.py OUT.pt LAYOUT…

LAYOUT = TPxPP[xSP][xbf16][xselective|xfull]:RETRO_LAYERS.

Gradients are stored whole (gathered over tensor-parallel ranks), under names that are the same at every layout.
"""

import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_retro import distributed, mcore
from megatron_retro.config.model import ModelConfig, ParallelConfig, RetroConfig
from megatron_retro.data.chunks import ChunkTable, Corpus
from megatron_retro.data.samples import Samples
from megatron_retro.model.attention import CrossAttention
from megatron_retro.model.model import RetroModel
from megatron_retro.training.loop import means, train_step

CHUNK, CHUNKS_A_SAMPLE, VOCAB, STEPS, GLOBAL_BATCH = 8, 4, 128, 5, 8
SPLIT = (1.0, 0.0, 0.0)


class EveryOther:
    """Neighbors by arithmetic: some near, some of the own document (to be dropped), some missing."""

    num_neighbors = 4

    def __init__(self, num_chunks: int):
        self.num_chunks = num_chunks

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        ids = (chunks[:, None] + np.array([1, 23, 47, 91])) % self.num_chunks
        return np.where((chunks % 5 == 0)[:, None], -1, ids)


def make_samples() -> Samples:
    draw = np.random.default_rng(0)
    length = draw.integers(1, 70, size=60)
    start = np.append(0, np.cumsum(length)[:-1])
    corpus = Corpus("text", draw.integers(0, VOCAB, size=length.sum()).astype(np.uint16), start, length, 1.0)
    table = ChunkTable([corpus], CHUNK)
    return Samples(
        table,
        split="train",
        split_weights=SPLIT,
        corpus_weights=None,
        chunks_a_sample=CHUNKS_A_SAMPLE,
        seed=1,
        pad=0,
        num_samples=STEPS * GLOBAL_BATCH,
        neighbors=EveryOther(table.num_chunks),
        retrieval_dropout=0.2,
        random_neighbor_prob=0.2,
    )


def hear_from_the_start() -> None:
    """Draw the output of chunked cross-attention as other weights: from zero, its other gradients begin as nothing."""
    make = CrossAttention.__init__

    def make_loud(self: CrossAttention, *arguments: Any, starts_silent: bool = False) -> None:
        make(self, *arguments)

    CrossAttention.__init__ = make_loud  # type: ignore[method-assign]


def run(layout: str) -> dict:
    sizes, retro_layers = layout.split(":")
    tensor, stages, *options = sizes.split("x")
    mcore.initialize(int(tensor), int(stages))
    model_config = ModelConfig(
        num_layers=4,
        hidden_size=48,
        num_attention_heads=4,
        seq_length=32,
        group_query_attention=True,
        num_query_groups=2,
        init_method_std=0.1,
    )
    model_config.finish()
    retro = RetroConfig(retro_layers=retro_layers, retro_encoder_hidden_size=24, retro_encoder_num_attention_heads=2)
    retro.finish(model_config)
    parallel = ParallelConfig(
        int(tensor),
        int(stages),
        sequence_parallel="SP" in options,
        bf16="bf16" in options,
        recompute_granularity=next((option for option in options if option in ("selective", "full")), None),
    )
    parallel.finish(dist.get_world_size(), model_config, retro)
    model = mcore.wrap_for_training(RetroModel(model_config, retro, parallel, VOCAB, CHUNK, seed=1))
    optimizer = mcore.build_optimizer(model, lr=1e-3, weight_decay=0.1, clip_grad=1.0, adam_eps=1e-5)
    samples = make_samples()
    result: dict = {"loss": [], "norm": [], "gradients": []}
    for step in range(STEPS):
        ids = step * GLOBAL_BATCH + np.arange(GLOBAL_BATCH)
        reports, norm = train_step(model, optimizer, samples, ids, micro_batch_size=2)
        result["loss"].append(means(reports)[0])
        result["norm"].append(norm)
        result["gradients"].append(whole_gradients(mcore.unwrap(model)))
    mcore.parallel_state.destroy_model_parallel()
    return result


def whole_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> gradient of every parameter of all stages, on every rank; copies of one parameter must agree."""
    mine = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.main_grad.clone()
        if getattr(parameter, "tensor_model_parallel", False):
            group = mcore.parallel_state.get_tensor_model_parallel_group()
            parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, gradient.contiguous(), group=group)
            gradient = torch.cat(parts, parameter.partition_dim)
        mine[name.replace("output_layer", "embedding.word_embeddings")] = gradient
    whole: dict[str, torch.Tensor] = {}
    for part in distributed.all_gather(mine):
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, whole.setdefault(name, gradient), rtol=1e-5, atol=1e-7)
    return whole


if __name__ == "__main__":
    out, *layouts = sys.argv[1:]
    torch.set_num_threads(1)
    hear_from_the_start()
    results = {layout: run(layout) for layout in layouts}
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()
