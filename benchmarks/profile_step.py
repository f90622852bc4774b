"""Where the time of a training step goes, by class of kernel.

python benchmarks/profile_step.py --preset peer --dtype fp32 bf16
python benchmarks/profile_step.py --preset 172m --dtype bf16 --model retro

Prints one JSON line a configuration: a step's milliseconds of kernels (on a CPU, of torch's operators) and each class's
share of them, and the kernels that match no class, dearest first. Flags of `pretrain_retro.py` change the preset.
"""

import argparse
import collections
import json
import re

import torch
from torch.profiler import ProfilerActivity, profile
from train_step import MODELS, PRESETS, Case, make, synchronize

from megatron_retro import distributed
from megatron_retro.errors import exit_on_user_error

STEPS = 3
# The first class that a kernel's name matches; names as torch, cuBLAS, Triton and NCCL give them.
CLASSES = {
    "communication": r"nccl|c10d|allreduce",
    "attention": r"attention|flash|fmha|softmax_warp",
    "matrix products": r"gemm|cutlass|nvjet|xmma|aten::(add)?b?mm",
    "optimizer": r"adam|multi_tensor|_foreach|linalg_vector_norm",
    "norms": r"layer_norm|rms_norm|layernorm|GammaBeta",
    "element-wise": r"triton|aten::(add|mul|sub|gelu|silu|sum|neg|bitwise|where)",
    "embedding": r"embedding|index|vectorized_gather",
    "loss": r"softmax|scatter|gather|MaxNan|amax",
    "copies": r"copy|memcpy|memset|fill|zero|CatArray|aten::cat",
    "other element-wise": r"elementwise|reduce_kernel",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["cpu-tiny"])
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["retro"])
    args, flags = parser.parse_known_args()
    distributed.use_this_ranks_share()
    for preset in args.preset:
        for dtype in args.dtype:
            for model in args.model:
                print(json.dumps(profiled(Case.of(preset, dtype, model, flags))), flush=True)


def profiled(case: Case) -> dict:
    """The line of one model."""
    step, _ = make(case)
    step(), step()
    synchronize()
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
        synchronize()
    milliseconds: collections.Counter[str] = collections.Counter()
    for event in profiler.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        milliseconds[event.key] += spent / 1e3 / STEPS
    by_class: collections.Counter[str] = collections.Counter()
    for name, spent in milliseconds.items():
        by_class[class_of(name)] += spent
    total = by_class.total()
    others = [name for name, _ in milliseconds.most_common() if class_of(name) == "others"][:5]
    return {
        "preset": case.preset,
        "dtype": case.dtype,
        "model": case.model,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "ms_of_kernels": round(total, 2),
        "shares": {name: round(spent / total, 4) for name, spent in by_class.most_common()},
        "others": others,
    }


def class_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "others")


if __name__ == "__main__":
    exit_on_user_error(main)
