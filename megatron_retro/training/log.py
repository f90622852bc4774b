"""Where a run's figures go: a line on the terminal, a JSON line in metrics.jsonl, TensorBoard."""

import dataclasses
import json
import math
import os
import pathlib
import time
from typing import Any

from megatron_retro import distributed, storage
from megatron_retro.training.stragglers import STEPS, Straggler

_LONGEST_LINE = 1 << 16  # bytes of metrics.jsonl


class RunLog:
    """Writes on rank 0; does nothing on the others.

    Args:
        save: directory of metrics.jsonl, or None.
        tensorboard_dir: directory of TensorBoard's files, or None.
        last_iteration: to tell the time left.
    """

    def __init__(self, save: str | None, tensorboard_dir: str | None, last_iteration: int):
        self._last_iteration = last_iteration
        self._active = distributed.rank() == 0
        self._file = self._board = None
        if self._active and save:
            storage.make_directory(pathlib.Path(save))
            path = pathlib.Path(save) / "metrics.jsonl"
            _cut_torn_line(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if self._active and tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard_dir)

    def say(self, text: str) -> None:
        if self._active:
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def step(self, iteration: int, seconds_a_step: float, figures: dict[str, Any]) -> None:
        """Report training figures; `figures` become the JSON line's keys beside `iteration`."""
        left = (self._last_iteration - iteration) * seconds_a_step
        self.say(
            f"iteration {iteration}/{self._last_iteration}  lm_loss {figures['lm_loss']:.4f}  "
            f"grad_norm {figures['grad_norm']:.3f}  lr {figures['learning_rate']:.2e}  "
            f"{figures['tokens_per_second']:,.0f} tokens/s  {figures['model_tflops_per_second']:.3g} TFLOP/s a rank "
            f"({_percent(figures['matmul_share'])} of a matrix product's)  {_shares(figures)}  "
            f"{seconds_a_step:.2f} s/iteration  left {_clock(left)}"
        )
        self.write(iteration, figures)

    def straggler(self, iteration: int, found: Straggler) -> None:
        self.say(
            f"rank {found.rank} is slow: {found.factor:.1f} × the median of its peers in the last {STEPS} steps, "
            f"most of it in {found.phase}"
        )
        figures = {f"straggler_{name}": value for name, value in dataclasses.asdict(found).items()}
        self.write(iteration, figures)

    def write(self, iteration: int, figures: dict[str, Any]) -> None:
        """A line of figures; a number that is not finite becomes null there, for JSON has none.

        Raises:
            UserError: the disk is full, or cannot be written to.
        """
        if self._file:
            numbers = {name: None if _is_bad(value) else value for name, value in figures.items()}
            with storage.explained(pathlib.Path(self._file.name)):
                self._file.write(json.dumps({"iteration": iteration, **numbers}) + "\n")
                self._file.flush()
        for name, value in figures.items():
            if self._board and not isinstance(value, str):
                with storage.explained(pathlib.Path(self._board.log_dir)):
                    self._board.add_scalar(name, value, iteration)

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def _cut_torn_line(path: pathlib.Path) -> None:
    """What a killed run left of a line is none."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST_LINE))
        tail = file.read()
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def _is_bad(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _shares(figures: dict[str, Any]) -> str:
    """Where the time went; phases under half a percent are left out."""
    names = {"data": "data", "forward_backward": "fwd-bwd", "communication": "comm", "optimizer": "optimizer"}
    shares = {short: figures[f"{phase}_share"] for phase, short in names.items()}
    return " ".join(f"{name} {_percent(share)}" for name, share in shares.items() if share >= 0.005)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
