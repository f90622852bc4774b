"""What a run takes - arithmetic, memory a rank, traffic, time - before any of it is allocated.

Nothing here repeats the model's shapes: each pipeline stage is built and run through its schedule as in training, on
tensors without memory, as one rank of a world without others, while its bytes and matrix products are counted. The
batch is the dearest there is: as if padded (with --sft-data as if each sample held several examples) and as if some
chunk had no neighbors, yet every neighbor present and whole.
"""

import contextlib
import dataclasses
import unittest.mock

import numpy as np
import torch

from megatron_retro import distributed, mcore
from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data.samples import Batch
from megatron_retro.model.flops import MultiplyAdds, multiply_adds
from megatron_retro.model.loss import LOGITS_AT_ONCE
from megatron_retro.model.model import padded_vocab_size
from megatron_retro.training.data import (
    check_num_neighbors,
    check_seq_length,
    check_split,
    open_work_dir,
    split_weights,
)
from megatron_retro.training.evaluation import boundary_bytes, boundary_length, forward_step
from megatron_retro.training.fit import Source
from megatron_retro.training.live_bytes import LiveBytes, without_memory
from megatron_retro.training.matrix_rate import matrix_rate
from megatron_retro.training.step import make_model

MODES = (None, "selective", "full")  # of --recompute-granularity
_REACHED = 0.6  # of the matrix rate, by a good run
_BY_MODE = ("recomputing",)


@dataclasses.dataclass(frozen=True)
class Step:
    """What forward and backward take on a rank.

    Attributes:
        activations: bytes beside weights, gradients and optimizer when they are most.
        flops: floating-point operations of matrix products that a micro-batch really costs.
    """

    activations: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """A rank of one pipeline stage.

    Attributes:
        layers: numbers of its decoder layers, from 1.
        has_encoder: whether the neighbor encoder lives here.
        parameters: of this rank.
        weights, gradients, optimizer: bytes.
        boundary: bytes that a rank hands to the next stage a micro-batch; as many come back.
        steps: by recomputation.
    """

    layers: tuple[int, ...]
    has_encoder: bool
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    boundary: int
    steps: dict[str | None, Step]

    def peak(self, mode: str | None) -> int:
        """Bytes of tensors when they are most."""
        return self.weights + self.gradients + self.optimizer + self.steps[mode].activations


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        parameters: of the whole model.
        arithmetic: multiply-adds a token.
        stages: one rank of each pipeline stage.
        data_parallel_size: ranks that each have samples of their own.
        num_microbatches: of an update, a data-parallel rank.
        tokens: of an update.
        virtual_stages: that each rank of a pipeline holds.
    """

    parameters: int
    arithmetic: MultiplyAdds
    stages: tuple[Stage, ...]
    data_parallel_size: int
    num_microbatches: int
    tokens: int
    virtual_stages: int = 1

    @property
    def bubble(self) -> float:
        """Share of an update in which a pipeline stage waits for others."""
        waiting = (len(self.stages) - 1) / self.virtual_stages
        return waiting / (self.num_microbatches + waiting)

    def tokens_per_second(self, mode: str | None, rate: float) -> float:
        """At a matrix rate (FLOP/s) that nothing slows down: the slowest stage works without pause but the bubble."""
        slowest = max(stage.steps[mode].flops for stage in self.stages)
        return self.tokens * rate * (1 - self.bubble) / (slowest * self.num_microbatches)


def dry_run(config: PretrainConfig, num_ranks: int, source: Source | None = None) -> None:
    """Print what a run of `config`, finished, on so many ranks takes; of a work dir only the manifest is read.

    Args:
        source: of the weights to start from, whose vocabulary counts.

    Raises:
        UserError: flags and work dir do not fit together.
    """
    if distributed.rank():
        return
    assert config.retro.retro_work_dir
    work = open_work_dir(config.retro.retro_work_dir)
    chunk_length = work.facts("chunks")["chunk_length"]
    check_split(config.data.split, split_weights(work))
    check_seq_length(config.model.seq_length, chunk_length)
    if config.active_retro:
        config.parallel.check_retrieved_length(2 * chunk_length)
        if work.has("neighbors") and not config.instructions.sft_data:
            check_num_neighbors(config.retro.retro_num_neighbors, work.facts("neighbors")["num_neighbors"])
    vocab_size = padded_vocab_size(
        source.vocab_size if source else work.facts("tokenizer")["vocab_size"],
        config.model.make_vocab_size_divisible_by,
        config.parallel.tensor_model_parallel_size,
    )
    distributed.use_this_ranks_share()
    rate = matrix_rate(torch.bfloat16 if config.parallel.bf16 else torch.float32)
    print(report(config, plan(config, num_ranks, vocab_size, chunk_length), rate))


def plan(config: PretrainConfig, num_ranks: int, vocab_size: int, chunk_length: int) -> Plan:
    """Of `config`, finished, on so many ranks; takes this process's process group.

    Args:
        vocab_size: padded vocabulary.
        chunk_length: C.
    """
    ranks = num_ranks // config.parallel.ranks_of_a_model
    optimization, sizes = config.optimization, (vocab_size, chunk_length)
    assert optimization.global_batch_size
    num_microbatches = optimization.global_batch_size // (optimization.micro_batch_size * ranks)
    return Plan(
        _parameters_of_all(config, *sizes),
        multiply_adds(config.model, config.active_retro, vocab_size=vocab_size, chunk_length=chunk_length),
        tuple(
            _stage(config, number, num_ranks, num_microbatches, *sizes)
            for number in range(config.parallel.pipeline_model_parallel_size)
        ),
        ranks,
        num_microbatches,
        optimization.global_batch_size * config.model.seq_length,
        config.parallel.virtual_stages,
    )


def dearest_batch(config: PretrainConfig, chunk_length: int) -> Batch:
    """A micro-batch that takes as much as any can."""
    num_samples, length = config.optimization.micro_batch_size, config.model.seq_length
    num_chunks, num_neighbors = length // chunk_length, config.retro.retro_num_neighbors
    shape = (num_samples, num_chunks, num_neighbors)
    reads, tunes = config.active_retro is not None, bool(config.instructions.sft_data)
    return Batch(
        tokens_BxS=torch.zeros(num_samples, length, dtype=torch.int64),
        labels_BxS=torch.zeros(num_samples, length, dtype=torch.int64),
        loss_mask_BxS=torch.ones(num_samples, length),
        order_BxS=None if tunes else torch.arange(length).repeat(num_samples, 1),
        neighbor_tokens_BxLxKxR=torch.zeros(*shape, 2 * chunk_length, dtype=torch.int64) if reads else None,
        neighbor_lengths_BxLxK=torch.full(shape, 2 * chunk_length) if reads else None,
        neighbor_chunks_M=torch.arange(num_samples * num_chunks) if reads else None,
        sample_ids=np.arange(num_samples),
        examples_BxS=torch.arange(length).repeat(num_samples, 1) if tunes else None,
    )


def run_step(
    config: PretrainConfig, model: torch.nn.Module, live: LiveBytes, num_microbatches: int, chunk_length: int
) -> Step:
    """Run the dearest micro-batches forward and backward through this rank's model and count what that takes.

    Args:
        live: has counted the model as it was made, and does not count now.
    """
    batch = dearest_batch(config, chunk_length)
    inner_config = mcore.unwrap(model).config
    inner_config.finalize_model_grads_func = None  # adds no memory, but reads a number, which such tensors do not have
    model.train()
    live.restart()
    before = live.now
    with live:
        mcore.run_pipeline(
            forward_step,
            iter([batch] * num_microbatches),
            model,
            num_microbatches=num_microbatches,
            seq_length=boundary_length(model, batch),
            micro_batch_size=config.optimization.micro_batch_size,
            forward_only=False,
        )
    return Step(live.peak - before, live.flops / num_microbatches)


# ------------------------------------------------------------------------------------------------------- simulation


def _parameters_of_all(config: PretrainConfig, vocab_size: int, chunk_length: int) -> int:
    whole = dataclasses.replace(config, parallel=TrainingParallelConfig())
    with mcore.simulated_rank(0, 1), without_memory():
        return _num_parameters(make_model(whole, vocab_size, chunk_length))


def _stage(
    config: PretrainConfig, number: int, num_ranks: int, num_microbatches: int, vocab_size: int, chunk_length: int
) -> Stage:
    parallel = config.parallel
    steps: dict[str | None, Step] = {}
    stages, tensor = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    in_flight_and_one = min(num_microbatches, stages - number + 1)  # with more, the same begins again
    if parallel.virtual_stages > 1:
        in_flight_and_one = min(num_microbatches, 2 * stages)  # of its schedule that many reach the steady state
    sharers = num_ranks // parallel.ranks_of_a_model if parallel.use_distributed_optimizer else 1
    for mode in MODES:
        config = dataclasses.replace(config, parallel=dataclasses.replace(parallel, recompute_granularity=mode))
        rank = number * (num_ranks // stages)
        world = mcore.simulated_rank(rank, num_ranks, tensor, stages, virtual_stages=parallel.virtual_stages)
        with world, without_memory(), _loss_as_on_this_machine():
            with LiveBytes() as live:
                model = make_model(config, vocab_size, chunk_length)
            inner, parameters = mcore.unwrap_all(model), _num_parameters(model)
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            weights = sum(parameter.nbytes for parameter in model.parameters())
            gradients = live.now - weights
            steps[mode] = run_step(config, model, live, in_flight_and_one, chunk_length)
            boundary = boundary_bytes(model, dearest_batch(config, chunk_length))
    return Stage(
        tuple(layer.number for part in inner for layer in part.decoder.layers),
        any(part.decoder.encoder is not None for part in inner),
        parameters,
        weights,
        gradients,
        # Adam's two moments, and the main weights beside those in bf16
        (12 if parallel.bf16 else 8) * -(-trained // sharers),
        boundary // (tensor if parallel.sequence_parallel else 1),
        steps,
    )


def _loss_as_on_this_machine() -> contextlib.AbstractContextManager:
    """A simulated rank computes as on a CPU, where fewer logits exist at a time than on a GPU."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return unittest.mock.patch.dict(LOGITS_AT_ONCE, cpu=LOGITS_AT_ONCE[kind])


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------- report


def report(config: PretrainConfig, plan: Plan, rate: float) -> str:
    """The plan for a terminal, and the speed on ranks with a matrix rate (FLOP/s) like this machine's."""
    parts = [_run(config, plan), "", *_memory(plan), "", *_speed(config, plan, rate)]
    return "\n".join(parts)


def _run(config: PretrainConfig, plan: Plan) -> str:
    parallel, retro, cost = config.parallel, config.active_retro, plan.arithmetic
    kind = f"RETRO (layers {retro.retro_layers})" if retro else "GPT"
    per_token = f"{cost.training_flops / 1e9:.3g} GFLOP a token"
    if retro:
        of_gpt = cost.total / (cost.decoder + cost.logits)
        per_token += f", {of_gpt:.2f} × its GPT's: " + ", ".join(
            f"{getattr(cost, field.name) / cost.total:.0%} {field.name.replace('_', '-')}"
            for field in dataclasses.fields(cost)
        )
    lines = [
        f"{kind}, {plan.parameters / 1e6:,.1f}M parameters; TP {parallel.tensor_model_parallel_size} × "
        f"PP {len(plan.stages)} × DP {plan.data_parallel_size}; {'bf16' if parallel.bf16 else 'fp32'}; an update reads "
        f"{plan.tokens:,} tokens in {_number(plan.num_microbatches, 'micro-batch', 'es')}",
        per_token,
    ]
    if len(plan.stages) > 1:
        sent = plan.stages[0].boundary
        lines.append(
            f"{sent / 2**20:,.1f} MiB a micro-batch from a rank of one stage to the next, and as much back; "
            f"stages wait for others {plan.bubble:.0%} of the time"
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    rows = [["stage", "layers", "parameters", "weights", "gradients", "optimizer", *_BY_MODE, "activations", "peak"]]
    for number, stage in enumerate(plan.stages):
        layers = _ranges(stage.layers) + (" + encoder" if stage.has_encoder else "")
        sizes = (_gib(size) for size in (stage.weights, stage.gradients, stage.optimizer))
        row = [str(number), layers, f"{stage.parameters / 1e6:,.1f}M", *sizes]
        for mode, step in stage.steps.items():
            rows.append([*row, mode or "none", _gib(step.activations), _gib(stage.peak(mode))])
            row = [""] * len(row)
    return ["GiB of tensors a rank; the process and what its allocator holds back come on top", *_aligned(rows)]


def _speed(config: PretrainConfig, plan: Plan, rate: float) -> list[str]:
    ranks = plan.data_parallel_size * config.parallel.ranks_of_a_model
    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else f"CPU, {_number(torch.get_num_threads(), 'thread')}"
    rows = [[*_BY_MODE, "at the matrix rate (upper bound)", f"at {_REACHED:.0%} of it"]]
    for mode in MODES:
        bound = plan.tokens_per_second(mode, rate)
        rows.append([mode or "none", f"{bound:,.0f}", f"{bound * _REACHED:,.0f}"])
    rate_here = f"{where}: {rate / 1e12:,.3g} TFLOP/s in a matrix product"
    return [f"tokens/s on {_number(ranks, 'rank')} like this ({rate_here})", *_aligned(rows)]


def _ranges(numbers: tuple[int, ...]) -> str:
    """(1, 2, 5, 6) as "1-2,5-6"."""
    first = [number for number in numbers if number - 1 not in numbers]
    last = [number for number in numbers if number + 1 not in numbers]
    return ",".join(f"{begin}-{end}" for begin, end in zip(first, last, strict=True))


def _number(count: int, what: str, plural: str = "s") -> str:
    return f"{count:,} {what}" + plural * (count > 1)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3f}" if size < 10 * 2**30 else f"{size / 2**30:,.1f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
