"""Measures what the dry run plans, on real tensors.

    dry_run_worker.py tensors FLAGS…    bytes and FLOPs that `LiveBytes` counts, on each of the ranks
    dry_run_worker.py process FLAGS…    memory of this process

Prints a JSON line: of a rank, planned beside found.
"""

import ctypes
import json
import os
import pathlib
import sys

import torch.distributed as dist

from megatron_retro import distributed, mcore
from megatron_retro.config.flags import parse
from megatron_retro.config.training import PretrainConfig
from megatron_retro.training.dry_run import Stage, dearest_batch, plan, run_step
from megatron_retro.training.live_bytes import LiveBytes
from megatron_retro.training.step import make_model, make_model_and_optimizer, train_step

VOCAB, CHUNK = 1024, 32
MMAP_THRESHOLD = -3  # of mallopt
WARM_UP = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --retro-layers 1 --seq-length 64".split()


def finished(flags: list[str]) -> PretrainConfig:
    config = parse(PretrainConfig, [*flags, "--retro-work-dir", "none"])
    config.finish(distributed.world_size())
    config.finish_with_data(10**6)
    return config


def planned(config: PretrainConfig) -> tuple[Stage, ...]:
    """All stages, on rank 0; planning takes a process that has not joined the others."""
    return plan(config, distributed.world_size(), VOCAB, CHUNK).stages if distributed.rank() == 0 else ()


def count_tensors(config: PretrainConfig) -> dict[str, list[float]]:
    stages, parallel = planned(config), config.parallel
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    mcore.initialize(*sizes, virtual_stages=parallel.virtual_stages)
    stages = distributed.all_gather(stages)[0]
    stage = stages[distributed.rank() * len(stages) // distributed.world_size()]
    together = config.optimization.micro_batch_size * distributed.world_size() // parallel.ranks_of_a_model
    microbatches = config.optimization.global_batch_size // together
    of_model, found = stage.weights + stage.gradients, {}
    for mode, planned_step in stage.steps.items():
        parallel.recompute_granularity = mode
        with LiveBytes() as live:
            model = make_model(config, VOCAB, CHUNK)
        found[f"model {mode}"] = [of_model, live.now]
        step = run_step(config, model, live, microbatches, CHUNK)
        found[f"activations {mode}"] = [planned_step.activations, step.activations]
        found[f"flops {mode}"] = [planned_step.flops, step.flops]
    with LiveBytes() as live:
        _, optimizer = make_model_and_optimizer(config, VOCAB, CHUNK)
        mcore.update(optimizer, mcore.gradient_norm(optimizer))
    return found | {"optimizer": [stage.optimizer, live.now - of_model]}


def measure_process(config: PretrainConfig) -> dict[str, list[float]]:
    """Peak of two updates beyond a process that has made two tiny ones."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once
    (stage,) = planned(config)
    mcore.initialize()
    train(finished(WARM_UP))
    start = resident("VmRSS")
    train(config)
    return {"peak": [stage.peak(config.parallel.recompute_granularity), resident("VmHWM") - start]}


def train(config: PretrainConfig) -> None:
    model, optimizer = make_model_and_optimizer(config, VOCAB, CHUNK)
    batch = dearest_batch(config, CHUNK)

    class Samples:
        def batch(self, ids: object) -> object:
            return batch

    for _ in range(2):
        train_step(model, optimizer, Samples(), batch.sample_ids, config.optimization.micro_batch_size)


def resident(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


if __name__ == "__main__":
    what, *flags = sys.argv[1:]
    config = finished(flags)
    line = json.dumps(count_tensors(config) if what == "tensors" else measure_process(config))
    os.write(1, f"{line}\n".encode())  # at once: the ranks write into one file
    if dist.is_initialized():
        dist.barrier()
