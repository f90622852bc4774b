"""The training run, from flags to last checkpoint, read from top to bottom."""

import functools
import pathlib
import signal
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_retro import distributed, mcore
from megatron_retro.config import flags
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data.samples import Samples
from megatron_retro.errors import UserError
from megatron_retro.model.flops import multiply_adds
from megatron_retro.model.model import padded_vocab_size
from megatron_retro.training import checkpoint
from megatron_retro.training.data import TrainingData, check_split
from megatron_retro.training.evaluation import sample_losses
from megatron_retro.training.log import RunLog
from megatron_retro.training.matrix_rate import matrix_rate
from megatron_retro.training.prefetch import BatchSource, Prefetched
from megatron_retro.training.step import make_model_and_optimizer, means, microbatches, train_step
from megatron_retro.training.timing import StepClock, speed_figures
from megatron_retro.workdir import check_writable


def train(config: PretrainConfig) -> None:
    """Train as `config`, finished, says; every rank calls it.

    Raises:
        UserError: flags, work dir or checkpoint do not fit together.
    """
    parallel, run = config.parallel, config.run
    distributed.use_this_ranks_share()
    mcore.initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        virtual_stages=parallel.virtual_stages,
        timeout_minutes=parallel.distributed_timeout_minutes,
    )

    for flag, directory in (("--save", run.save), ("--tensorboard-dir", run.tensorboard_dir)):
        if directory:
            distributed.together(functools.partial(check_writable, flag, pathlib.Path(directory)))

    # ---- data
    assert config.retro.retro_work_dir and config.model.seq_length
    work_dir = config.retro.retro_work_dir
    data = distributed.together(lambda: TrainingData.open(work_dir, retrieve=config.active_retro is not None))
    check_split(config.data.split, data.split_weights)
    if config.active_retro:
        parallel.check_retrieved_length(2 * data.table.chunk_length)
    config.finish_with_data(_samples(config, data, "train", None).epoch_size)
    optimization = config.optimization
    assert optimization.train_iters is not None and optimization.global_batch_size and optimization.lr
    train_samples = _samples(config, data, "train", max(1, optimization.train_iters * optimization.global_batch_size))
    valid_samples = None
    if run.eval_iters and data.num_chunks("valid"):
        valid_samples = _samples(config, data, "valid", None)

    # ---- model, optimizer, schedule
    vocab_size = padded_vocab_size(
        data.vocab_size, config.model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    )
    chunk_length = data.table.chunk_length
    model, optimizer = make_model_and_optimizer(config, vocab_size, chunk_length)
    schedule = _schedule(config, optimizer)

    # ---- resume
    log = RunLog(run.save, run.tensorboard_dir, optimization.train_iters)
    iteration = consumed_samples = 0
    if run.load and (found := distributed.together(lambda: _checkpoint(config))):
        state = checkpoint.read_state(found)
        checkpoint.check_same_run(state, config, vocab_size, chunk_length, data.digest)
        mcore.load_state(model, optimizer, str(found))
        iteration, consumed_samples = state.iteration, state.consumed_samples
        schedule.step(increment=consumed_samples)
        log.say(f"resumed from {found}, {consumed_samples:,} samples read")
    log.say(_description(config, data, model, train_samples))
    if run.eval_iters and valid_samples is None:
        log.say("the valid split is empty: no evaluation")

    def save() -> None:
        state = checkpoint.RunState(
            iteration,
            consumed_samples,
            flags.to_dict(config),
            vocab_size,
            chunk_length,
            data.tokenizer_digest,
            data.digest,
        )
        checkpoint.save(str(run.save), model, optimizer, state)
        log.say(f"saved iteration {iteration} to {run.save}")

    def evaluate() -> None:
        if valid_samples is None:
            return
        assert optimization.global_batch_size
        number = min(len(valid_samples), run.eval_iters * optimization.global_batch_size)
        losses = {
            mode: sample_losses(
                model,
                valid_samples,
                num_samples=number,
                micro_batch_size=optimization.micro_batch_size,
                retrieval=mode,
            ).mean
            for mode in (("on", "off", "random") if config.active_retro else ("off",))
        }
        log.say(f"validation  {'  '.join(f'{mode} {loss:.4f}' for mode, loss in losses.items())}")
        log.write(iteration, {f"valid_loss_{mode}": loss for mode, loss in losses.items()})

    if iteration >= optimization.train_iters:
        log.say(f"nothing to do: --train-iters {optimization.train_iters} are done")

    # ---- the loop
    stop, anyone, clock = _StopSignal(), distributed.AnyRank(), StepClock()
    source = _read_ahead(config, train_samples, iteration, consumed_samples)
    shape = dict(vocab_size=vocab_size, chunk_length=chunk_length)
    best_rate = matrix_rate(torch.bfloat16 if parallel.bf16 else torch.float32)
    started, first_iteration, logged_iteration = time.monotonic(), iteration, iteration
    log.say(f"a matrix product runs at {best_rate / 1e12:.4g} TFLOP/s")
    while iteration < optimization.train_iters:
        mcore.reseed(config.data.seed + iteration)  # so that a resumed run draws what this one would have drawn
        ids = consumed_samples + np.arange(optimization.global_batch_size)
        reports, grad_norm = train_step(model, optimizer, source, ids, optimization.micro_batch_size, clock)
        learning_rate = _learning_rate(optimizer)
        schedule.step(increment=optimization.global_batch_size)
        iteration += 1
        consumed_samples += optimization.global_batch_size

        minutes = (time.monotonic() - started) / 60
        wants_exit = stop.received or (run.exit_duration_in_mins or float("inf")) <= minutes
        wants_exit = anyone.says(wants_exit)
        wants_exit |= run.exit_interval is not None and iteration - first_iteration >= run.exit_interval
        last = iteration == optimization.train_iters
        if iteration % run.log_interval == 0 or last or wants_exit or iteration == first_iteration + 1:
            tokens = (iteration - logged_iteration) * optimization.global_batch_size * config.model.seq_length
            loss, reading = means(reports)
            flops = multiply_adds(config.model, config.active_retro, **shape, reading=reading).training_flops
            speed = speed_figures(clock, tokens, flops, best_rate)
            log.step(
                iteration,
                tokens / speed["tokens_per_second"] / (iteration - logged_iteration),
                {
                    "lm_loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    **speed,
                    "consumed_samples": consumed_samples,
                },
            )
            logged_iteration = iteration
        if (run.eval_interval and iteration % run.eval_interval == 0) or last:
            evaluate()
        if run.save and ((run.save_interval and iteration % run.save_interval == 0) or last or wants_exit):
            save()
        if wants_exit:
            log.say(f"exiting after iteration {iteration} as asked")
            break
    anyone.close()
    log.close()
    mcore.shut_down()


def _read_ahead(config: PretrainConfig, samples: Samples, iteration: int, consumed_samples: int) -> BatchSource:
    """`samples`, or where --num-workers asks for it, by default on a GPU, what is left of them read ahead."""
    optimization, num_workers = config.optimization, config.data.num_workers
    assert optimization.train_iters and optimization.global_batch_size
    if num_workers is None:
        num_workers = 2 if mcore.has_gpu() else 0
    if not num_workers:
        return samples
    size, left = optimization.global_batch_size, optimization.train_iters - iteration
    order = (
        ids
        for step in range(left)
        for ids in microbatches(consumed_samples + step * size + np.arange(size), optimization.micro_batch_size)
    )
    return Prefetched(samples, order, num_workers)


def _samples(config: PretrainConfig, data: TrainingData, split: str, num_samples: int | None) -> Samples:
    return data.samples(
        split,
        config.data,
        config.active_retro,
        seq_length=config.model.seq_length,
        num_samples=num_samples,
        training=split == "train",
    )


def _schedule(config: PretrainConfig, optimizer: Any) -> Any:
    """Learning rate by consumed samples: linear warm-up, then the decay asked for."""
    optimization = config.optimization
    batch = optimization.global_batch_size
    assert batch and optimization.lr_warmup_iters is not None and optimization.lr_decay_iters
    return mcore.OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optimization.lr,
        min_lr=optimization.min_lr,
        lr_warmup_steps=optimization.lr_warmup_iters * batch,
        lr_decay_steps=optimization.lr_decay_iters * batch,
        lr_decay_style=optimization.lr_decay_style,
        start_wd=optimization.weight_decay,
        end_wd=optimization.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _learning_rate(optimizer: Any) -> float:
    return float(optimizer.param_groups[0]["lr"])


def _checkpoint(config: PretrainConfig) -> Any:
    """The checkpoint to resume from; None for a run that starts in its own empty --save directory."""
    assert config.run.load
    found = checkpoint.find(config.run.load)
    if found is None and config.run.load != config.run.save:
        raise UserError(
            f"--load {config.run.load} holds no checkpoint (no latest_checkpointed_iteration.txt); "
            "leave --load out to start a new run"
        )
    return found


def _description(config: PretrainConfig, data: TrainingData, model: mcore.ModelChunks, samples: Samples) -> str:
    parallel, optimization = config.parallel, config.optimization
    ranks = mcore.parallel_state.get_data_parallel_world_size()
    parameters = torch.tensor(float(sum(p.numel() for p in model.parameters())), device=mcore.device())
    dist.all_reduce(parameters, group=mcore.parallel_state.get_model_parallel_group())
    kind = f"RETRO (layers {config.retro.retro_layers})" if config.active_retro else "GPT"
    return (
        f"{kind}, {parameters.item() / 1e6:.1f}M parameters; TP {parallel.tensor_model_parallel_size} × "
        f"PP {parallel.pipeline_model_parallel_size} × DP {ranks}; {_stages(config, data, model)}"
        f"{optimization.train_iters} iterations of "
        f"{optimization.global_batch_size} × {config.model.seq_length} tokens; "
        f"{samples.epoch_size:,} samples an epoch, {data.table.num_chunks:,} chunks"
    )


def _stages(config: PretrainConfig, data: TrainingData, model: mcore.ModelChunks) -> str:
    """How the layers are shared out, and what a micro-batch sends from one stage to the next."""
    if config.parallel.pipeline_model_parallel_size == 1:
        return ""
    inner, retro, length = mcore.unwrap(model), config.active_retro, config.model.seq_length
    size = inner.boundary_bytes(
        length,
        config.optimization.micro_batch_size,
        length // data.table.chunk_length if retro else 0,
        retro.retro_num_neighbors if retro else 0,
    )
    layers, dearest = "+".join(map(str, inner.plan.layers)), inner.plan.dearest_over_mean
    return f"stages of {layers} layers, the dearest rank {dearest:.2f} × the mean, {size / 1e6:.3g} MB between stages; "


class _StopSignal:
    """Remembers SIGTERM and SIGUSR1 (what SLURM sends before the time is up), to save and exit between steps."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, *_: Any) -> None:
        self.received = True
