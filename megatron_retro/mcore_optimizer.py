"""Lets checkpoints of megatron-core's distributed optimizer load where Adam is torch's. Used by `mcore.py` alone.

Adam of apex and Transformer Engine counts its steps by parameter group, torch's for each parameter. megatron-core 0.16
takes the second into account in part, and three things break: a fresh optimizer has no step to describe itself by
(`begin`); loading looks for a step among the tensors that it loads (`mend`); and all parameters get one tensor to count
in, which then advances once a parameter (`separate_steps`, after each load).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def mend(optimizer: Any) -> None:
    """Have a distributed optimizer load its tensors; others stay as they are."""
    for part in _broken_parts(optimizer):
        part._set_main_param_and_optimizer_states = functools.partial(_set_tensors, part)


def begin(optimizer: Any) -> None:
    """Give each parameter that has none the state before the first step."""
    for part in _broken_parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    part.optimizer.state[parameter] = {"step": step, **moments}


def separate_steps(optimizer: Any) -> None:
    """Give each parameter a count of its own."""
    for part in _broken_parts(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _broken_parts(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part, "gbuf_ranges") and isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            yield part


@torch.no_grad()
def _set_tensors(part: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    """`DistributedOptimizer._set_main_param_and_optimizer_states`, but for the step."""
    group, index = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][index]
    main_param.copy_(tensors["param"])
    for name in ("exp_avg", "exp_avg_sq"):
        part.optimizer.state[main_param][name].copy_(tensors[name])
