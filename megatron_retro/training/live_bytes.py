"""Bytes and arithmetic of tensors, counted while they are made; and tensors that need no memory to be counted so."""

import contextlib
import unittest.mock
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class LiveBytes(TorchDispatchMode):
    """Counts, of the tensors made in a block, the bytes alive, and the multiply-adds that made them as FLOPs.

    Attributes:
        now: bytes alive; tensors that share memory count once.
        peak: the most bytes alive at a time since the last `restart`.
        flops: floating-point operations of matrix products since then, of causal attention the half that is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = 0.0
        self._alive: set[int] = set()

    def restart(self) -> None:
        """Forget peak and FLOPs."""
        self.peak, self.flops = self.now, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.flops += _flops(func, args, kwargs or {}, out)
        return out

    def _count(self, memory: torch.UntypedStorage) -> None:
        key, size = memory._cdata, memory.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(memory, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made in this block have shape and dtype, and no data: a program runs through unless it reads a number."""

    def swap(weight: Tensor, converted: Tensor) -> None:  # what `Module.to` does; torch's own refuses such tensors
        weight.data = converted.data

    with unittest.mock.patch.object(torch.utils, "swap_tensors", swap), FakeTensorMode():
        yield


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> float:
    packet = func.overloadpacket
    if packet in _FUSED_ATTENTION:
        count, first, causal = _FUSED_ATTENTION[packet]
        shapes = [tensor.shape for tensor in args[:first]]
        return count(*shapes) / (2 if len(args) > causal and args[causal] else 1)
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0.0


# The CPU's kernels, which torch does not count -> (count, tensors that it takes the shapes of, place of `is_causal`).
_FUSED_ATTENTION: dict[Any, tuple[Callable[..., int], int, int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3, 4),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4, 7),
}
