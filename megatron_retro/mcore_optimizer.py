"""Makes the checkpoints of megatron-core's distributed optimizer right. Used by `mcore.py` alone.

What is wrong in 0.16:

- A buffer of several buckets is padded between them, and saved as if it were not: behind the first bucket each
  parameter's state is that of another place. The first and the last pipeline stage have several buckets where they
  share the embedding, and every large model has with --overlap-grad-reduce.
- Adam of apex and Transformer Engine counts its steps by parameter group, torch's for each parameter, and that breaks
  three things: a fresh optimizer has no step to describe itself by (`begin`); loading looks for a step among the
  tensors it loads; and all parameters get one tensor to count in, which then advances once a parameter
  (`separate_steps`, after each load).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def mend(optimizer: Any) -> None:
    """Have a distributed optimizer save and load its tensors rightly; others stay as they are."""
    for part in _distributed(optimizer):
        part.get_parameter_state_dp_zero = functools.partial(_gather, part)
        if _is_torchs(part):
            part._set_main_param_and_optimizer_states = functools.partial(_set_tensors, part)


def begin(optimizer: Any) -> None:
    """Give each parameter that has none the state before the first step."""
    for part in filter(_is_torchs, _distributed(optimizer)):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    part.optimizer.state[parameter] = {"step": step, **moments}


def separate_steps(optimizer: Any) -> None:
    """Give each parameter a count of its own."""
    for part in filter(_is_torchs, _distributed(optimizer)):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _distributed(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part, "gbuf_ranges"):
            yield part


def _is_torchs(part: Any) -> bool:
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _gather(part: Any, **settings: Any) -> dict | None:
    """`DistributedOptimizer.get_parameter_state_dp_zero`, with the padding that its caller expects between buckets."""
    state = type(part).get_parameter_state_dp_zero(part, **settings)
    for number, buffer in enumerate(part.buffers if state else ()):
        for tensors in state[number].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                tensors[name] = _padded(tensors[name], buffer)
    return state


def _padded(joined: Tensor, buffer: Any) -> Tensor:
    """The buckets' contents [sum of lengths] where they lie in the buffer [its length]."""
    padded, done = joined.new_zeros(buffer.numel), 0
    for bucket, (start, _) in zip(buffer.buckets, buffer.bucket_indices, strict=True):
        padded[start : start + bucket.numel_unpadded] = joined[done : done + bucket.numel_unpadded]
        done += bucket.numel_unpadded
    return padded


@torch.no_grad()
def _set_tensors(part: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    """`DistributedOptimizer._set_main_param_and_optimizer_states`, but for the step."""
    group, index = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][index]
    main_param.copy_(tensors["param"])
    for name in ("exp_avg", "exp_avg_sq"):
        part.optimizer.state[main_param][name].copy_(tensors[name])
