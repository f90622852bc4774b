"""Time, arithmetic and memory of a training step: a GPT, a RETRO of its shape, and the same RETRO in plain PyTorch.

python benchmarks/train_step.py --preset peer --dtype fp32 bf16 --steps 10
python benchmarks/train_step.py --preset 172m --dtype bf16 --micro-batch-size 8 --normalization LayerNorm

Prints one JSON line a configuration. The steps are those of `pretrain_retro.py` on random tokens, and those of
`plain.py`; the models and a square matrix product take turns in one process, so all see the machine in the same states.
Flags of `pretrain_retro.py` change the preset. Fields of a line that need a word:

    ms_median, ms_min, cpu_seconds      a step; cpu_seconds: median over the steps, all threads
    tflop                               a step's model FLOPs (megatron_retro/model/flops.py)
    matmul_share                        tflop by time ÷ the rate of the matrix product, medians
    peak_gib                            of a fresh process that makes two steps: of its RAM (start_gib of that is taken
                                        once everything is imported), on a GPU of what torch has allocated there
    time_over_gpt, flops_over_gpt       RETRO ÷ GPT; of times, here and below: median of the ratios within a turn
    time_over_plain, cpu_over_plain     RETRO ÷ the plain model; the framework's cost
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from plain import PlainRetro, PlainTraining  # noqa: E402

from megatron_retro import distributed  # noqa: E402
from megatron_retro.config.flags import parse  # noqa: E402
from megatron_retro.config.training import PretrainConfig  # noqa: E402
from megatron_retro.data.samples import Batch, chunks_that_read  # noqa: E402
from megatron_retro.errors import UserError, exit_on_user_error  # noqa: E402
from megatron_retro.model.flops import multiply_adds  # noqa: E402
from megatron_retro.training.matrix_rate import matrix_product, synchronize  # noqa: E402

CHUNK = 64
# name -> (vocabulary, flags of pretrain_retro.py)
PRESETS = {
    "cpu-tiny": (
        4096,
        "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --retro-layers 2,4 --seq-length 256 "
        "--micro-batch-size 4",
    ),
    "peer": (
        32000,
        "--num-layers 6 --hidden-size 512 --num-attention-heads 8 --retro-layers 3,6 --seq-length 512 "
        "--micro-batch-size 2",
    ),
    "172m": (32000, f"--config {ROOT}/examples/configs/retro_172m.yaml --micro-batch-size 8"),
    "425m": (32000, f"--config {ROOT}/examples/configs/retro_425m.yaml --micro-batch-size 8"),
    "1.5b": (32000, f"--config {ROOT}/examples/configs/retro_1.5b.yaml --micro-batch-size 4"),
}
MODELS = ("gpt", "retro", "plain")
WARM_UP = 2  # turns
Step = Callable[[], float | None]  # trains once, returns the loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["cpu-tiny"])
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=10, help="measured, of each model")
    parser.add_argument("--memory-of-one", action="store_true", help=argparse.SUPPRESS)  # what a fresh process runs
    args, flags = parser.parse_known_args()
    distributed.use_this_ranks_share()
    for preset in args.preset:
        for dtype in args.dtype:
            cases = {name: Case.of(preset, dtype, name, flags) for name in args.model}
            if args.memory_of_one:
                print(json.dumps(memory(cases[args.model[0]])))
                continue
            for line in measure(cases, args.steps, flags):
                print(json.dumps(line), flush=True)


@dataclasses.dataclass
class Case:
    """One model at one shape and precision; `config` is finished."""

    preset: str
    dtype: str
    model: str
    config: PretrainConfig
    vocab_size: int

    @classmethod
    def of(cls, preset: str, dtype: str, model: str, flags: list[str]) -> "Case":
        vocab_size, shape = PRESETS[preset]
        config = parse(PretrainConfig, [*shape.split(), *flags, "--retro-work-dir", "none"])
        config.retro.retro_add_retriever = model != "gpt"
        config.parallel.bf16 = dtype == "bf16"
        config.finish(world_size=1)
        config.finish_with_data(num_samples=10**6)
        if config.optimization.global_batch_size != config.optimization.micro_batch_size:
            raise UserError("--global-batch-size has no use here; a step is one micro-batch")
        return cls(preset, dtype, model, config, vocab_size)

    @property
    def tokens(self) -> int:
        """A step's."""
        return self.config.optimization.micro_batch_size * self.config.model.seq_length

    @property
    def flops(self) -> float:
        """A step's."""
        shape = dict(vocab_size=self.vocab_size, chunk_length=CHUNK)
        return self.tokens * multiply_adds(self.config.model, self.config.active_retro, **shape).training_flops


def measure(cases: dict[str, Case], steps: int, flags: list[str]) -> list[dict]:
    """The lines of the models of one preset and precision."""
    memories = {name: memory_in_fresh_process(case, flags) for name, case in cases.items()}
    makers = {name: make(case) for name, case in cases.items()}
    sizes = {name: size for name, (_, size) in makers.items()}
    assert not {"retro", "plain"} <= sizes.keys() or sizes["retro"] == sizes["plain"], sizes
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[next(iter(cases.values())).dtype]
    multiply, flop = matrix_product(dtype)
    turns = take_turns({**{name: step for name, (step, _) in makers.items()}, "matmul": multiply}, steps)
    rate = flop / statistics.median(turns.pop("matmul").seconds) / 1e12
    lines = []
    for name, turn in turns.items():
        case, median = cases[name], statistics.median(turn.seconds)
        line = {
            "preset": case.preset,
            "dtype": case.dtype,
            "model": name,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "parameters": sizes[name],
            "tokens": case.tokens,
            "steps": steps,
            "ms_median": round(1e3 * median, 2),
            "ms_min": round(1e3 * min(turn.seconds), 2),
            "tokens_per_second": round(case.tokens / median, 1),
            "cpu_seconds": round(statistics.median(turn.cpu_seconds), 4),
            "tflop": round(case.flops / 1e12, 5),
            "matmul_tflops_per_second": round(rate, 4),
            "matmul_share": round(case.flops / median / 1e12 / rate, 4),
            **memories[name],
            "loss": round(turn.loss or 0.0, 4),
        }
        if name == "retro" and "gpt" in turns:
            line["time_over_gpt"] = ratio(turn.seconds, turns["gpt"].seconds)
            line["flops_over_gpt"] = round(case.flops / cases["gpt"].flops, 4)
        if name == "retro" and "plain" in turns:
            line["time_over_plain"] = ratio(turn.seconds, turns["plain"].seconds)
            line["cpu_over_plain"] = ratio(turn.cpu_seconds, turns["plain"].cpu_seconds)
        lines.append(line)
    return lines


@dataclasses.dataclass
class Turns:
    """What one model took in each turn, and the loss of its last step."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    loss: float | None = None


def take_turns(steps: dict[str, Step], turns: int) -> dict[str, Turns]:
    found = {name: Turns() for name in steps}
    for turn in range(-WARM_UP, turns):
        for name, step in steps.items():
            synchronize()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            found[name].loss = step()
            synchronize()
            if turn >= 0:
                found[name].seconds.append(time.perf_counter() - begin)
                found[name].cpu_seconds.append(time.process_time() - cpu_begin)
    return found


def ratio(these: list[float], those: list[float]) -> float:
    return round(statistics.median(this / that for this, that in zip(these, those, strict=True)), 4)


# -------------------------------------------------------------------------------------------------- what is measured


def make(case: Case) -> tuple[Step, int]:
    """(a training step of the case's model, its number of parameters)."""
    return make_plain(case) if case.model == "plain" else make_product(case)


def make_product(case: Case) -> tuple[Step, int]:
    """What the loop of `megatron_retro.training.loop.train` does once, learning rate and log aside."""
    from megatron_retro import mcore  # here: the plain model's process shall not import it
    from megatron_retro.training.step import make_model_and_optimizer, train_step

    if not mcore.parallel_state.model_parallel_is_initialized():
        mcore.initialize()
    model, optimizer = make_model_and_optimizer(case.config, case.vocab_size, CHUNK)
    micro_batch_size = case.config.optimization.micro_batch_size
    samples, ids = RandomSamples(random_batch(case)), np.arange(micro_batch_size)

    def step() -> float:
        mcore.reseed(case.config.data.seed)
        return train_step(model, optimizer, samples, ids, micro_batch_size).loss  # type: ignore[arg-type]

    return step, sum(weight.numel() for weight in model.parameters())


def make_plain(case: Case) -> tuple[Step, int]:
    torch.manual_seed(case.config.data.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PlainRetro(case.config.model, case.config.retro, case.vocab_size, CHUNK)
    training = PlainTraining(model, case.config.optimization, device, case.config.parallel.bf16)
    batch = random_batch(case)
    read = (batch.neighbor_tokens_BxLxKxR, batch.neighbor_lengths_BxLxK)

    def step() -> float:
        return training.step(batch.tokens_BxS, batch.labels_BxS, *read)  # type: ignore[arg-type]

    return step, sum(weight.numel() for weight in model.parameters())


@dataclasses.dataclass
class RandomSamples:
    """Stands for `Samples`: the same random batch again and again."""

    of_every_step: Batch

    def batch(self, ids: np.ndarray) -> Batch:
        return self.of_every_step


def random_batch(case: Case) -> Batch:
    """Random tokens; of the neighbors some are short or missing, as in a work dir."""
    draw = torch.Generator().manual_seed(1)
    num_samples, length = case.config.optimization.micro_batch_size, case.config.model.seq_length
    tokens = torch.randint(case.vocab_size, (num_samples, length + 1), generator=draw)
    shape = (num_samples, length // CHUNK, case.config.retro.retro_num_neighbors)
    neighbors = torch.randint(case.vocab_size, (*shape, 2 * CHUNK), generator=draw)
    lengths = torch.randint(2 * CHUNK, shape, generator=draw)
    lengths = torch.where(torch.rand(shape, generator=draw) < 0.1, lengths, 2 * CHUNK)
    reads = case.config.active_retro is not None
    return Batch(
        tokens_BxS=tokens[:, :-1].contiguous(),
        labels_BxS=tokens[:, 1:].contiguous(),
        loss_mask_BxS=torch.ones(num_samples, length),
        order_BxS=None,
        neighbor_tokens_BxLxKxR=neighbors if reads else None,
        neighbor_lengths_BxLxK=lengths if reads else None,
        neighbor_chunks_M=chunks_that_read(np.where(lengths > 0, 0, -1)) if reads else None,
        sample_ids=np.arange(num_samples),
    )


# ------------------------------------------------------------------------------------------------------------ memory


def memory_in_fresh_process(case: Case, flags: list[str]) -> dict[str, float]:
    choice = ["--preset", case.preset, "--dtype", case.dtype, "--model", case.model, "--memory-of-one"]
    done = subprocess.run([sys.executable, __file__, *choice, *flags], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(case: Case) -> dict[str, float]:
    """Peak of two steps: the first makes the optimizer's state, the second uses it."""
    if torch.cuda.is_available():
        step, _ = make(case)
        step(), step()
        return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}
    if case.model != "plain":
        import megatron_retro.training.step  # noqa: F401
    start = resident("VmRSS")
    step, _ = make(case)
    step(), step()
    return {"peak_gib": resident("VmHWM"), "start_gib": start}


def resident(field: str) -> float:
    """GiB of this process, as Linux tells it; unlike getrusage's it forgets what a parent had."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:"))
    return round(int(kib) / 2**20, 3)


if __name__ == "__main__":
    exit_on_user_error(main)
