"""One update: a global batch through the model and its optimizer."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_retro import mcore
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data.samples import Batch
from megatron_retro.model.model import make_stages
from megatron_retro.training.evaluation import boundary_length, forward_step
from megatron_retro.training.prefetch import BatchSource
from megatron_retro.training.timing import DATA, FORWARD_BACKWARD, OPTIMIZER, StepClock


def make_model_and_optimizer(
    config: PretrainConfig, vocab_size: int, chunk_length: int
) -> tuple[mcore.ModelChunks, Any]:
    """This rank's part of the model with its initial weights, and what updates it.

    Args:
        config: finished, with data.
        vocab_size: padded vocabulary.
        chunk_length: C.
    """
    optimization = config.optimization
    model = make_model(config, vocab_size, chunk_length)
    optimizer = mcore.build_optimizer(
        model,
        lr=optimization.lr,
        min_lr=optimization.min_lr,
        weight_decay=optimization.weight_decay,
        adam_beta1=optimization.adam_beta1,
        adam_beta2=optimization.adam_beta2,
        adam_eps=optimization.adam_eps,
        clip_grad=optimization.clip_grad,
    )
    return model, optimizer


def make_model(config: PretrainConfig, vocab_size: int, chunk_length: int) -> mcore.ModelChunks:
    """This rank's part of the model, as `make_model_and_optimizer`."""
    parallel = config.parallel
    return mcore.wrap_for_training(
        *make_stages(config.model, config.active_retro, parallel, vocab_size, chunk_length, config.data.seed),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_bf16=parallel.grad_reduce_in_bf16,
    )


def train_step(
    model: mcore.ModelChunks,
    optimizer: Any,
    samples: BatchSource,
    ids: np.ndarray,
    micro_batch_size: int,
    clock: StepClock | None = None,
) -> tuple[list[dict[str, Any]], float]:
    """One update on the samples `ids` of the global batch; returns (reports on the last stage, gradient norm)."""
    mine, clock = microbatches(ids, micro_batch_size), clock or StepClock()
    with clock.step():
        batches = _batches(samples, mine, clock)
        first = next(batches)
        with clock.phase(FORWARD_BACKWARD):
            model.train()
            model.zero_grad_buffer()
            optimizer.zero_grad()
            reports = mcore.run_pipeline(
                forward_step,
                itertools.chain([first], batches),
                model,
                num_microbatches=len(mine),
                seq_length=boundary_length(model, first),
                micro_batch_size=micro_batch_size,
                forward_only=False,
            )
        with clock.phase(OPTIMIZER):
            _, grad_norm = mcore.optimizer_step(optimizer)
    return reports, grad_norm


def microbatches(ids: np.ndarray, micro_batch_size: int) -> np.ndarray:
    """This rank's share [microbatches, B] of the samples of a global batch."""
    ranks = mcore.parallel_state.get_data_parallel_world_size()
    return ids.reshape(-1, ranks, micro_batch_size)[:, mcore.parallel_state.get_data_parallel_rank()]


def _batches(samples: BatchSource, ids_of_each: np.ndarray, clock: StepClock) -> Iterator[Batch]:
    for ids in ids_of_each:
        with clock.phase(DATA):
            batch = samples.batch(ids)
        yield batch


def means(reports: list[dict[str, Any]]) -> tuple[float, float]:
    """(loss in nats a predicted token, share of chunks that read neighbors) of the global batch, on every rank.

    It waits for the device.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=mcore.device())
    if mcore.parallel_state.get_tensor_model_parallel_rank() == 0:
        for report in reports:
            sums[:2] += torch.stack([report["loss"].double().sum(), report["tokens"].double().sum()])
            sums[2] += report["reading"]
            sums[3] += 1
    dist.all_reduce(sums)
    loss, tokens, reading, number = sums.tolist()
    return loss / max(1.0, tokens), reading / number
