"""Evaluate a checkpoint on a split, with retrieval on, off and random, over the same tokens."""

import json
import pathlib
import sys
from typing import Any

from megatron_retro import distributed, mcore
from megatron_retro.config.evaluation import EvaluateConfig
from megatron_retro.config.model import RETRIEVAL_MODES
from megatron_retro.config.training import DataConfig
from megatron_retro.inference.loading import check_same_tokenizer, load_trained
from megatron_retro.training.data import TrainingData
from megatron_retro.training.evaluation import predicted_bytes, sample_losses, summarize
from megatron_retro.workdir import check_writable, write_atomically


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the evaluation; every rank calls it and gets the figures, rank 0 prints and writes them.

    Raises:
        UserError: flags, checkpoint and work dir do not fit together.
    """
    config.finish()
    flags, parallel = config.evaluation, config.parallel
    assert flags.load and flags.retro_work_dir
    distributed.use_this_ranks_share()
    mcore.initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        timeout_minutes=parallel.distributed_timeout_minutes,
    )
    if flags.output:
        directory = pathlib.Path(flags.output).absolute().parent
        distributed.together(lambda: check_writable("--output", directory))
    trained = load_trained(flags.load, parallel)
    work_dir = flags.retro_work_dir
    data = distributed.together(lambda: TrainingData.open(work_dir, retrieve=trained.retro is not None))
    check_same_tokenizer(trained, data.tokenizer_digest, data.table.chunk_length, work_dir)
    if trained.retro:
        parallel.check_retrieved_length(2 * data.table.chunk_length)
    samples = data.samples(
        flags.split,
        DataConfig(),
        trained.retro,
        seq_length=flags.seq_length or trained.model.seq_length,
        num_samples=None,
        training=False,
    )
    number = min(len(samples), flags.max_samples or len(samples))
    losses = {
        mode: sample_losses(
            trained.module,
            samples,
            num_samples=number,
            micro_batch_size=flags.micro_batch_size,
            retrieval=mode,
            progress=_Progress(f"retrieval {mode}", number),
        )
        for mode in (RETRIEVAL_MODES if trained.retro else ("off",))
    }
    num_bytes = predicted_bytes(samples, number, data.open_tokenizer().decode)
    result = {
        "checkpoint": str(trained.path),
        "iteration": trained.state.iteration,
        "retro_work_dir": work_dir,
        "split": flags.split,
        "bytes": num_bytes,
        "retrieval": summarize(losses, num_bytes),
    }
    if distributed.rank() == 0:
        print(table(result))
        if flags.output:
            text = json.dumps(result, indent=1)
            write_atomically(pathlib.Path(flags.output), lambda file: file.write(text.encode()))
    mcore.shut_down()
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as people read them."""
    modes = result["retrieval"]
    any_mode = next(iter(modes.values()))
    lines = [
        f"{result['split']} split, {any_mode['samples']:,} samples, {any_mode['tokens']:,} predicted tokens, "
        f"{result['bytes']:,} bytes; checkpoint {result['checkpoint']}",
        f"{'retrieval':<10} {'loss':>8}  {'95 % interval':<18} {'perplexity':>10} {'bits/byte':>10}  loss − off",
    ]
    for mode, figures in modes.items():
        low, high = figures["loss_interval"]
        line = (
            f"{mode:<10} {figures['loss']:>8.4f}  {f'{low:.4f} … {high:.4f}':<18} {figures['perplexity']:>10.3f} "
            f"{figures['bits_per_byte']:>10.4f}"
        )
        if "versus_off" in figures:
            low, high = figures["versus_off_interval"]
            line += f"  {figures['versus_off']:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(line)
    return "\n".join(lines)


class _Progress:
    """A line that counts up, on rank 0's terminal."""

    def __init__(self, what: str, total: int):
        self._what, self._total = what, total

    def __call__(self, done: int) -> None:
        if distributed.rank() == 0 and sys.stderr.isatty():
            print(
                f"\r{self._what}: {done:,} of {self._total:,} samples",
                end="\n" if done == self._total else "",
                file=sys.stderr,
                flush=True,
            )
