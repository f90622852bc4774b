"""The loader alone: how fast it reads samples, beside what a training step takes.

python benchmarks/data_path.py --retro-work-dir retrieval_data --preset 172m
python benchmarks/data_path.py --retro-work-dir retrieval_data --preset 425m --samples 4000 --retro-max-overlap 0.5

Reads training samples in order, as `pretrain_retro.py` does with the same flags, in one process on one thread, and
prints one JSON line. No step is run: its time is bounded from below by its arithmetic at the rate of a matrix product,
so a real step takes longer and the ratio is larger. Fields that need a word:

    cpu_ms_a_sample             of the loader
    tokens_per_cpu_second       of the decoder
    opened_files                by Python while samples were read; to be 0
    step_tflop                  a step's model FLOPs (megatron_retro/model/flops.py)
    matmul_tflops_per_second    of --dtype, the best seen by CPU time of one thread, or this process's GPU's
    step_ms                     the bound, of the whole --micro-batch-size
    loader_over_step            samples that the loader reads by the time the step has taken one
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from train_step import PRESETS, Case  # noqa: E402

from megatron_retro.errors import exit_on_user_error  # noqa: E402
from megatron_retro.training.data import TrainingData  # noqa: E402
from megatron_retro.training.matrix_rate import matrix_product, matrix_rate  # noqa: E402

WARM_UP = 4  # batches


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--retro-work-dir", required=True)
    parser.add_argument("--preset", choices=PRESETS, default="172m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--samples", type=int, default=1000)
    args, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    case = Case.of(args.preset, args.dtype, "retro", flags)
    config, opened = case.config, OpenedFiles()
    data = TrainingData.open(args.retro_work_dir, retrieve=True)
    size, length = config.optimization.micro_batch_size, config.model.seq_length
    batches = -(-args.samples // size)
    samples = data.samples(
        "train",
        config.data,
        config.active_retro,
        seq_length=length,
        num_samples=(WARM_UP + batches) * size,
        training=True,
    )
    for number in range(WARM_UP + batches):
        if number == WARM_UP:
            opened.count, begin = 0, time.process_time()
        samples.batch(number * size + np.arange(size))
    seconds, num_opened = (time.process_time() - begin) / (batches * size), opened.count
    rate = best_rate(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    line = {
        "preset": args.preset,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "samples": batches * size,
        "cpu_ms_a_sample": round(1e3 * seconds, 4),
        "samples_per_cpu_second": round(1 / seconds, 1),
        "tokens_per_cpu_second": round(length / seconds),
        "opened_files": num_opened,
        "step_tflop": round(case.flops / 1e12, 5),
        "matmul_tflops_per_second": round(rate / 1e12, 4),
        "step_ms": round(1e3 * case.flops / rate, 2),
        "loader_over_step": round(case.flops / rate / (size * seconds), 1),
    }
    print(json.dumps(line))


def best_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product; on a CPU by CPU time, as the loader is measured, whatever else runs."""
    if torch.cuda.is_available():
        return matrix_rate(dtype)
    multiply, flop = matrix_product(dtype)
    seconds = []
    for _ in range(10):
        begin = time.process_time()
        multiply()
        seconds.append(time.process_time() - begin)
    return flop / min(seconds)


class OpenedFiles:
    """Counts the files that Python opens, to the end of the process."""

    def __init__(self) -> None:
        self.count = 0
        sys.addaudithook(self._note)

    def _note(self, event: str, _: object) -> None:
        self.count += event == "open"


if __name__ == "__main__":
    exit_on_user_error(main)
