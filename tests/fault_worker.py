"""Runs pretrain_retro.py with faults at given updates, and writes down what its weights were.

fault_worker.py TRACE FAULTS …   FAULTS: JSON, update -> what happens on the last rank (STOP: on rank 0) in it:
    nan_loss, nan_norm, spike, nan_moment, stop_file, or the name of a signal
"""

import hashlib
import json
import math
import os
import pathlib
import signal
import sys
from typing import Any

import torch

import pretrain_retro
from megatron_retro import distributed, mcore
from megatron_retro.errors import exit_on_user_error
from megatron_retro.training import bad_steps, loop, step

bad_steps._LEAST = 3  # good losses before a spike is called one


def state_of(model: Any, optimizer: Any) -> str:
    """A hash of all weights and moments of this rank."""
    model.gather_weights()
    tensors = [*model.state_dict().values()]
    for part in optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            tensors += [parameter, *(state[name] for name in ("exp_avg", "exp_avg_sq"))]
    digest = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().view(torch.uint8).numpy() if tensor.dim() else b"")
    return digest.hexdigest()


class Faults:
    def __init__(self, trace: pathlib.Path, faults: dict[str, str]):
        self._trace, self._faults, self._now = trace, faults, ""
        self._is_last = distributed.rank() == distributed.world_size() - 1
        self._forward, self._norm, self._step = step.forward_step, mcore.gradient_norm, step.train_step
        step.forward_step, mcore.gradient_norm, loop.train_step = self.forward, self.norm, self.train_step

    def forward(self, batches: Any, model: Any) -> Any:
        output, loss_of = self._forward(batches, model)

        def loss(losses: Any) -> Any:
            total, tokens, report = loss_of(losses)
            factor = {"nan_loss": math.nan, "spike": 9.0}.get(self._now, 1.0)
            return total * factor, tokens, {**report, "loss": report["loss"] * factor}

        return output, loss

    def norm(self, optimizer: Any) -> float:
        return math.nan if self._now == "nan_norm" else self._norm(optimizer)

    def train_step(self, model: Any, optimizer: Any, source: Any, ids: Any, *args: Any, **more: Any) -> Any:
        number = str(ids[0] // len(ids) + 1)
        fault = self._faults.get(number, "")
        self._now = fault if self._is_last else ""
        if self._now.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
        if fault == "stop_file" and distributed.rank() == 0:
            pathlib.Path(sys.argv[sys.argv.index("--save") + 1], "STOP").touch()
        before = state_of(model, optimizer)
        done = self._step(model, optimizer, source, ids, *args, **more)
        line = {"update": int(number), "before": before, "after": state_of(model, optimizer)}
        line |= {"bad": done.bad, "stop": done.asked_to_stop}
        with open(self._trace / f"{distributed.rank()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._now == "nan_moment":
            part = optimizer.chained_optimizers[0]
            part.optimizer.state[part.get_parameters()[0]]["exp_avg"].view(-1)[0] = math.nan
        return done


if __name__ == "__main__":
    trace, faults, *sys.argv[1:] = sys.argv[1:]
    Faults(pathlib.Path(trace), json.loads(faults))
    exit_on_user_error(pretrain_retro.main)
