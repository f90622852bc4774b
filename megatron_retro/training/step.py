"""One update: a global batch through the model and its optimizer."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_retro import mcore
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data.samples import Batch
from megatron_retro.model.model import RetroModel, make_stages
from megatron_retro.training.evaluation import boundary_length, forward_step
from megatron_retro.training.fit import freeze
from megatron_retro.training.prefetch import BatchSource
from megatron_retro.training.timing import DATA, FORWARD_BACKWARD, OPTIMIZER, StepClock


def make_model_and_optimizer(
    config: PretrainConfig,
    vocab_size: int,
    chunk_length: int,
    prepare: Callable[[list[RetroModel]], object] = lambda stages: None,
) -> tuple[mcore.ModelChunks, Any]:
    """This rank's part of the model with its initial weights, and what updates it.

    Args:
        config: finished, with data.
        vocab_size: padded vocabulary.
        chunk_length: C.
        prepare: may change the initial weights.
    """
    optimization = config.optimization
    model = make_model(config, vocab_size, chunk_length, prepare)
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


def make_model(
    config: PretrainConfig,
    vocab_size: int,
    chunk_length: int,
    prepare: Callable[[list[RetroModel]], object] = lambda stages: None,
) -> mcore.ModelChunks:
    """This rank's part of the model, as `make_model_and_optimizer`."""
    parallel = config.parallel
    stages = make_stages(config.model, config.active_retro, parallel, vocab_size, chunk_length, config.data.seed)
    prepare(stages)
    if config.retro.retro_freeze_decoder:
        freeze(stages)
    return mcore.wrap_for_training(
        *stages,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_bf16=parallel.grad_reduce_in_bf16,
    )


@dataclasses.dataclass
class Step:
    """What all ranks agreed on between the backward pass and the update.

    Attributes:
        loss: nats a predicted token, of the global batch.
        grad_norm: of the whole model, before clipping.
        is_finite: whether loss and gradient norm are, on every rank.
        reading: share of chunks that read neighbors, of the global batch.
        asked_to_stop, out_of_time: whether any rank is.
        bad: why there was no update; None where there was one.
        reports: of this rank's micro-batches, on the last pipeline stage; stay on the device.
    """

    loss: float
    grad_norm: float
    is_finite: bool
    reading: float
    asked_to_stop: bool
    out_of_time: bool
    reports: list[dict[str, Any]]
    bad: str | None = None


def train_step(
    model: mcore.ModelChunks,
    optimizer: Any,
    samples: BatchSource,
    ids: np.ndarray,
    micro_batch_size: int,
    clock: StepClock | None = None,
    *,
    judge: Callable[[Step], str | None] = lambda step: None,
    wishes: Callable[[], tuple[bool, bool]] = lambda: (False, False),
) -> Step:
    """One update on the samples `ids` of the global batch, unless it is judged bad.

    Args:
        judge: told what all ranks know, says why there shall be no update: the same on every rank.
        wishes: whether this rank (is asked to stop, is out of time).
    """
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
            step = _agree(reports, mcore.gradient_norm(optimizer), *wishes())
            step.bad = judge(step)
            if step.bad is None:
                mcore.update(optimizer, step.grad_norm)
    return step


def microbatches(ids: np.ndarray, micro_batch_size: int) -> np.ndarray:
    """This rank's share [microbatches, B] of the samples of a global batch."""
    ranks = mcore.parallel_state.get_data_parallel_world_size()
    return ids.reshape(-1, ranks, micro_batch_size)[:, mcore.parallel_state.get_data_parallel_rank()]


def _batches(samples: BatchSource, ids_of_each: np.ndarray, clock: StepClock) -> Iterator[Batch]:
    for ids in ids_of_each:
        with clock.phase(DATA):
            batch = samples.batch(ids)
        yield batch


def _agree(reports: list[dict[str, Any]], grad_norm: float, asked_to_stop: bool, out_of_time: bool) -> Step:
    """The one exchange of a step: what any rank saw, all know. It waits for the device."""
    counted = reports if mcore.parallel_state.get_tensor_model_parallel_rank() == 0 else []
    reading = sum(report["reading"] for report in counted)
    known = [not math.isfinite(grad_norm), asked_to_stop, out_of_time, reading, len(counted), 0.0, 0.0]
    sums = torch.tensor(known, dtype=torch.float64).to(mcore.device())
    for report in counted:
        sums[-2:] += torch.stack([report["loss"].double().sum(), report["tokens"].double().sum()])
    dist.all_reduce(sums)
    bad, stop, late, reading, number, loss, tokens = sums.tolist()
    loss /= max(1.0, tokens)
    is_finite = not bad and math.isfinite(loss)
    return Step(loss, grad_norm, is_finite, reading / number, stop > 0, late > 0, reports)
