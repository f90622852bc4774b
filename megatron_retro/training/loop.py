"""The training run, from flags to last checkpoint, read from top to bottom."""

import functools
import pathlib
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_retro import distributed, mcore
from megatron_retro.config import flags
from megatron_retro.config.training import PretrainConfig, RunConfig
from megatron_retro.errors import UserError
from megatron_retro.model.flops import multiply_adds
from megatron_retro.model.model import RetroModel, padded_vocab_size
from megatron_retro.storage import check_writable, lock
from megatron_retro.training import bad_steps, checkpoint, checkpoint_files, fit, room
from megatron_retro.training.data import TrainingData, TrainingSamples, check_split
from megatron_retro.training.evaluation import sample_losses
from megatron_retro.training.fit import Source
from megatron_retro.training.instructions import InstructionData
from megatron_retro.training.log import RunLog
from megatron_retro.training.matrix_rate import matrix_rate
from megatron_retro.training.prefetch import BatchSource, Prefetched
from megatron_retro.training.step import Step, make_model_and_optimizer, microbatches, train_step
from megatron_retro.training.stopping import StopRequest, TimeLimit
from megatron_retro.training.stragglers import Stragglers
from megatron_retro.training.timing import StepClock, speed_figures
from megatron_retro.watch import at, doing, expect_progress


def train(config: PretrainConfig, started: float, source: Source | None = None) -> None:
    """Train as `config`, finished, says; every rank calls it.

    Args:
        source: weights to start from, where there is no checkpoint to resume from.
        started: when the program was, by `time.monotonic`.

    Raises:
        UserError: flags, work dir or checkpoint do not fit together; or a bad step ends the run.
    """
    parallel, run = config.parallel, config.run
    stop = StopRequest(run.save)
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
    distributed.together(functools.partial(_check_checkpoints, run))

    # ---- data
    assert config.retro.retro_work_dir and config.model.seq_length
    work_dir = config.retro.retro_work_dir
    tunes = bool(config.instructions.sft_data)
    retrieve = config.active_retro is not None and not tunes
    data = TrainingData.open(work_dir, retrieve=retrieve, verify=config.data.verify_data)
    check_split(config.data.split, data.split_weights)
    if config.active_retro:
        parallel.check_retrieved_length(2 * data.table.chunk_length)
    tuning = InstructionData.open(config, data) if tunes else None
    digest = tuning.digest if tuning else data.digest
    samples_of = functools.partial(_samples, config, data, tuning)
    config.finish_with_data(samples_of("train", None).epoch_size)
    optimization = config.optimization
    assert optimization.train_iters is not None and optimization.global_batch_size and optimization.lr
    valid_samples = None
    if run.eval_iters and (tuning.valid if tuning else data.num_chunks("valid")):
        valid_samples = samples_of("valid", None)

    # ---- where to begin
    save_directory = pathlib.Path(run.save) if run.save and distributed.rank() == 0 else None
    held = distributed.together(lambda: lock("--save", save_directory) if save_directory else None)
    if save_directory:
        checkpoint_files.remove_partial(save_directory)
    found = _checkpoint(config) if run.load else None
    chunk_length, known = data.table.chunk_length, data.vocab_size
    if source:
        flag = "--load" if found else "--retro-fit-from"
        fit.check(source, flag, seq_length=config.model.seq_length, chunk_length=chunk_length, vocab_size=known)
        distributed.together(functools.partial(source.check_tokenizer, data.tokenizer_digest, data.tokenizer_path))
        known = source.vocab_size

    # ---- model, optimizer, schedule
    vocab_size = padded_vocab_size(
        known, config.model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    )
    fitted: list[str] = []

    def prepare(stages: list[RetroModel]) -> None:
        if source and not found:
            fitted.extend(fit.fit(stages, source).lines(source))

    model, optimizer = make_model_and_optimizer(config, vocab_size, chunk_length, prepare)
    schedule = _schedule(config, optimizer)

    # ---- resume
    log = RunLog(run.save, run.tensorboard_dir, optimization.train_iters)
    iteration = consumed_samples = 0
    newest, saved_iteration = None, -1  # the checkpoint loaded or saved last; what --save holds
    watch = bad_steps.LossWatch([], 0)
    for line in fitted:
        log.say(line)
    if found:
        state = checkpoint.read_state(found)
        checkpoint.check_same_run(state, config, vocab_size, chunk_length, digest)
        mcore.load_state(model, optimizer, str(found))
        _use_learning_rates(optimizer, config)
        if run.load == run.save:
            distributed.together(functools.partial(checkpoint_files.set_newer_aside, found))
        iteration, consumed_samples = state.iteration, state.consumed_samples
        newest, saved_iteration = found, iteration if run.load == run.save else -1
        losses = state.losses if checkpoint.trains_alike(state, config) else []
        watch = bad_steps.LossWatch(losses, state.bad_in_a_row)
        schedule.step(increment=consumed_samples)
        log.say(f"resumed from {found}, {consumed_samples:,} samples read")
    num_updates = max(0, optimization.train_iters - iteration)
    num_samples = consumed_samples + num_updates * optimization.global_batch_size
    train_samples = samples_of("train", max(1, num_samples))
    log.say(_description(config, data, model, train_samples))
    for line in tuning.lines if tuning else []:
        log.say(line)
    if run.save:
        every = run.save_interval or optimization.train_iters
        num_saves = optimization.train_iters // every - iteration // every + (optimization.train_iters % every > 0)
        log.say(room.check(run.save, mcore.checkpoint_bytes(model, optimizer), num_saves if num_updates else 0))
    if run.eval_iters and valid_samples is None:
        log.say(f"{'there is no --sft-valid-data' if tuning else 'the valid split is empty'}: no evaluation")

    @doing("the save")
    def save() -> None:
        nonlocal newest, saved_iteration
        began = time.monotonic()
        if not mcore.all_finite(model, optimizer):
            raise UserError(
                f"iteration {iteration}: weights or Adam's moments are not finite numbers, so they are not saved; "
                f"--load {run.save} goes on from the newest checkpoint there"
            )
        state = checkpoint.RunState(
            iteration,
            consumed_samples,
            flags.to_dict(config),
            vocab_size,
            chunk_length,
            data.tokenizer_digest,
            digest,
            list(watch.losses),
            watch.in_a_row,
        )
        newest, saved_iteration = checkpoint.save(str(run.save), model, optimizer, state), iteration
        time_limit.saved(time.monotonic() - began)
        log.say(f"saved iteration {iteration} to {run.save}")

    @doing("the validation")
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

    def answer_bad_step(step: Step, ids: np.ndarray) -> None:
        """As --on-bad-step says. The weights are still those before the step."""
        nonlocal watch
        bad = f"iteration {iteration + 1}: {step.bad}"
        written = bad_steps.report(run.save, iteration + 1, step, train_samples, ids)
        log.say(f"{bad}; no update; what it read: {written}")
        log.write(iteration + 1, {"bad_step": step.bad})
        too_many = watch.in_a_row >= bad_steps.MOST_IN_A_ROW
        if run.on_bad_step == "stop" or too_many or (run.on_bad_step == "rewind" and newest is None):
            last_words = bad_steps.last_words(bad, run.on_bad_step, watch.in_a_row, run.save)
            watch.in_a_row = 0  # the next run begins to count
            if run.save and saved_iteration != iteration:
                save()
            raise UserError(last_words)
        if run.on_bad_step == "rewind":
            assert newest
            checkpoint_files.verify(newest)
            state = checkpoint.read_state(newest)
            mcore.load_state(model, optimizer, str(newest))
            _use_learning_rates(optimizer, config)
            watch = bad_steps.LossWatch(state.losses, watch.in_a_row)
            log.say(f"weights and optimizer are those of {newest} again")

    if iteration >= optimization.train_iters:
        log.say(f"nothing to do: --train-iters {optimization.train_iters} are done")

    # ---- the loop
    clock, time_limit = StepClock(), TimeLimit(run.exit_duration_in_mins, started)
    batches = _read_ahead(config, train_samples, iteration, consumed_samples)
    shape = dict(vocab_size=vocab_size, chunk_length=chunk_length)
    best_rate = matrix_rate(torch.bfloat16 if parallel.bf16 else torch.float32)
    first_iteration = logged_iteration = iteration
    log.say(f"a matrix product runs at {best_rate / 1e12:.4g} TFLOP/s")
    stragglers = Stragglers(clock, *_work_of_this_rank(model))
    expect_progress()
    while iteration < optimization.train_iters:
        at(f"iteration {iteration + 1}")
        mcore.reseed(config.data.seed + iteration)  # so that a resumed run draws what this one would have drawn
        ids = consumed_samples + np.arange(optimization.global_batch_size)
        step = train_step(
            model,
            optimizer,
            batches,
            ids,
            optimization.micro_batch_size,
            clock,
            judge=watch.judge,
            wishes=lambda: (stop.is_made(), time_limit.is_near()),
        )
        if step.bad:
            answer_bad_step(step, ids)
        learning_rate = _learning_rate(optimizer)
        schedule.step(increment=optimization.global_batch_size)
        iteration += 1
        consumed_samples += optimization.global_batch_size
        if slow := stragglers.after_step():
            log.straggler(iteration, slow)

        why_exit = _why_exit(step, run.exit_interval, iteration - first_iteration)
        last = iteration == optimization.train_iters
        is_logged = iteration % run.log_interval == 0 or last or why_exit or iteration == first_iteration + 1
        if is_logged and not step.bad:
            tokens = (iteration - logged_iteration) * optimization.global_batch_size * config.model.seq_length
            flops = multiply_adds(config.model, config.active_retro, **shape, reading=step.reading).training_flops
            speed = speed_figures(clock, tokens, flops, best_rate)
            log.step(
                iteration,
                tokens / speed["tokens_per_second"] / (iteration - logged_iteration),
                {
                    "lm_loss": step.loss,
                    "grad_norm": step.grad_norm,
                    "learning_rate": learning_rate,
                    **speed,
                    "consumed_samples": consumed_samples,
                },
            )
            logged_iteration = iteration
        if (run.eval_interval and iteration % run.eval_interval == 0) or last:
            evaluate()
        is_saved = run.save_interval and iteration % run.save_interval == 0 and not watch.in_a_row
        if run.save and (is_saved or last or why_exit):
            save()
        if why_exit:
            log.say(f"exiting after iteration {iteration} as asked by {why_exit}")
            stop.obeyed()
            break
    log.close()
    if held:
        held.close()
    mcore.shut_down()


def _work_of_this_rank(model: mcore.ModelChunks) -> tuple[float, int]:
    """(multiply-adds a token, parameters)."""
    costs = mcore.unwrap(model).plan.costs
    return costs[mcore.parallel_state.get_pipeline_model_parallel_rank()], sum(p.numel() for p in model.parameters())


def _read_ahead(config: PretrainConfig, samples: TrainingSamples, iteration: int, consumed_samples: int) -> BatchSource:
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


def _samples(
    config: PretrainConfig, data: TrainingData, tuning: InstructionData | None, split: str, num_samples: int | None
) -> TrainingSamples:
    if tuning:
        return tuning.samples(config, split, num_samples)
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


def _why_exit(step: Step, exit_interval: int | None, steps_done: int) -> str | None:
    if step.asked_to_stop:
        return "a signal or the file STOP"
    if step.out_of_time:
        return "--exit-duration-in-mins"
    return "--exit-interval" if exit_interval is not None and steps_done >= exit_interval else None


def _check_checkpoints(run: RunConfig) -> None:
    """Refuse what is wrong with --load and --save, before anything is written.

    Raises:
        UserError: names the flag and the ways out.
    """
    if run.load:
        checkpoint_files.find(run.load, run.ckpt_step)
    if run.save and run.load != run.save and (there := checkpoint_files.complete(pathlib.Path(run.save))):
        raise UserError(
            f"--save {run.save} holds checkpoints of another run, up to {there[0].name}; give --load {run.save} as "
            "well to go on from there, or another directory"
        )


def _use_learning_rates(optimizer: Any, config: PretrainConfig) -> None:
    """Those of the flags, in place of those of a checkpoint that was loaded."""
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = config.optimization.lr, config.optimization.min_lr


def _checkpoint(config: PretrainConfig) -> Any:
    """The checkpoint to resume from; None for a run that starts in its own empty --save directory."""
    run = config.run
    assert run.load
    found = checkpoint_files.find_sound(run.load, run.ckpt_step, own=run.load == run.save)
    if found is None and run.load != run.save:
        raise UserError(f"--load {run.load} holds no checkpoint; leave --load out to start a new run")
    return found


def _description(config: PretrainConfig, data: TrainingData, model: mcore.ModelChunks, samples: TrainingSamples) -> str:
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
