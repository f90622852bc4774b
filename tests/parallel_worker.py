"""Trains a tiny model a few steps at several layouts in one launch and stores losses and gradients of each.

    torchrun --nproc-per-node N tests/parallel_worker.py OUT.pt LAYOUT…     LAYOUT = TPxPP[xOPTION…]:RETRO_LAYERS

An option is a name of OPTIONS, VP2 (virtual stages), a --pipeline-model-parallel-layout, or `hidden`: retrieval dropout
leaves no sample any neighbor. Gradients are stored whole (gathered over tensor-parallel ranks and the shards of the
distributed optimizer), under names that are the same at every layout.
"""

import functools
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_retro import distributed, mcore
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.data.chunks import ChunkTable, Corpus
from megatron_retro.data.samples import Samples
from megatron_retro.model.attention import CrossAttention
from megatron_retro.model.model import make_stages
from megatron_retro.training.evaluation import sample_losses
from megatron_retro.training.step import train_step

CHUNK, CHUNKS_A_SAMPLE, VOCAB, STEPS, GLOBAL_BATCH = 8, 4, 128, 2, 8
NUM_SAMPLES = 40  # which those of the updates are drawn from
SPLIT = (1.0, 0.0, 0.0)
CLIP = 1.0
OPTIONS = {
    "SP": "sequence_parallel",
    "bf16": "bf16",
    "sharded": "use_distributed_optimizer",
    "reduce": "overlap_grad_reduce",
    "gather": "overlap_param_gather",
    "reduce16": "grad_reduce_in_bf16",
}


class EveryOther:
    """Neighbors by arithmetic: some near, some of the own document (to be dropped), some missing."""

    num_neighbors = 4

    def __init__(self, num_chunks: int):
        self.num_chunks = num_chunks

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        ids = (chunks[:, None] + np.array([1, 23, 47, 91])) % self.num_chunks
        return np.where((chunks % 5 == 0)[:, None], -1, ids)


def make_samples(*, hidden: bool) -> Samples:
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
        num_samples=NUM_SAMPLES,
        neighbors=EveryOther(table.num_chunks),
        retrieval_dropout=1.0 if hidden else 0.2,
        random_neighbor_prob=0.0 if hidden else 0.2,
    )


def hear_from_the_start() -> None:
    """Draw the output of chunked cross-attention as other weights: from zero, its other gradients begin as nothing."""
    make = CrossAttention.__init__

    def make_loud(self: CrossAttention, *arguments: Any, starts_silent: bool = False) -> None:
        make(self, *arguments)

    CrossAttention.__init__ = make_loud  # type: ignore[method-assign]


def parallel_of(sizes: str) -> TrainingParallelConfig:
    tensor, stages, *options = sizes.split("x")
    parallel = TrainingParallelConfig(int(tensor), int(stages))
    for option in options:
        if option.startswith("VP"):
            parallel.num_virtual_stages_per_pipeline_rank = int(option[2:])
        elif option.startswith("E"):
            parallel.pipeline_model_parallel_layout = option
        elif option in ("selective", "full"):
            parallel.recompute_granularity = option
        elif option != "hidden":
            setattr(parallel, OPTIONS[option], True)
    return parallel


def small_buckets() -> None:
    """Have gradients and weights travel in several parts, as those of a large model do."""
    mcore.DistributedDataParallelConfig = functools.partial(mcore.DistributedDataParallelConfig, bucket_size=20000)


def run(layout: str) -> dict:
    sizes, retro_layers = layout.split(":")
    parallel = parallel_of(sizes)
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
    parallel.finish(distributed.world_size(), model_config, retro)
    mcore.initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        virtual_stages=parallel.virtual_stages,
    )
    model = mcore.wrap_for_training(
        *make_stages(model_config, retro, parallel, VOCAB, CHUNK, seed=1),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_bf16=parallel.grad_reduce_in_bf16,
    )
    optimizer = mcore.build_optimizer(model, lr=1e-3, weight_decay=0.1, clip_grad=CLIP, adam_eps=1e-5)
    samples = make_samples(hidden="hidden" in sizes)
    result: dict = {"loss": [], "norm": [], "gradients": []}
    for step in range(STEPS):
        ids = step * GLOBAL_BATCH + np.arange(GLOBAL_BATCH)
        update = train_step(model, optimizer, samples, ids, micro_batch_size=2)
        result["loss"].append(update.loss)
        result["norm"].append(update.grad_norm)
        result["gradients"].append(whole_gradients(model, update.grad_norm))
    evaluated = sample_losses(model, samples, num_samples=7, micro_batch_size=2, retrieval="on")
    result["evaluated"] = evaluated.loss.sum(1).tolist()
    mcore.parallel_state.destroy_model_parallel()
    return result


def whole_gradients(model: mcore.ModelChunks, norm: float) -> dict[str, torch.Tensor]:
    """Name -> gradient of every parameter of all stages, on rank 0, clipped; copies of one parameter must agree."""
    gather_shards(model)
    mine = {}
    parameters = [pair for stage in mcore.unwrap_all(model) for pair in stage.named_parameters()]
    for name, parameter in parameters:
        gradient = parameter.main_grad.clone()
        if gradient.dtype == torch.bfloat16:  # what was clipped is a copy
            gradient = gradient.float() * min(1.0, CLIP / norm)
        if getattr(parameter, "tensor_model_parallel", False):
            group = mcore.parallel_state.get_tensor_model_parallel_group()
            parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, gradient.contiguous(), group=group)
            gradient = torch.cat(parts, parameter.partition_dim)
        mine[name.replace("output_layer", "embedding.word_embeddings")] = (
            gradient.numpy()
        )  # pickled quicker than torch's
    parts = [None] * distributed.world_size() if distributed.rank() == 0 else None
    dist.gather_object(mine, parts)
    whole: dict[str, np.ndarray] = {}
    for name, gradient in (pair for part in parts or () for pair in part.items()):
        np.testing.assert_allclose(gradient, whole.setdefault(name, gradient), rtol=1e-5, atol=1e-7, err_msg=name)
    return {name: torch.from_numpy(gradient) for name, gradient in whole.items()}


def gather_shards(model: mcore.ModelChunks) -> None:
    """A distributed optimizer's gradients are summed on the rank that updates with them; put all on every rank."""
    for chunk in model:
        group = chunk.dp_group
        for bucket in [bucket for buffer in chunk.buffers for bucket in buffer.buckets]:
            if chunk.ddp_config.use_distributed_optimizer:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


if __name__ == "__main__":
    out, *layouts = sys.argv[1:]
    torch.set_num_threads(1)
    hear_from_the_start()
    small_buckets()
    results = {layout: run(layout) for layout in layouts}
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()
