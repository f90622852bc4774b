"""Recomputation: what the backward pass makes again instead of keeping it from the forward pass.

`selective` makes outputs of norms and activation functions again, which costs a pass over memory; `full` keeps the
input of each step of a layer only, and runs the step's forward pass again (Chen et al., arXiv 1604.06174).
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_retro.mcore import checkpoint


class Recompute:
    """How a layer saves memory.

    Args:
        granularity: "selective", "full", or None to keep everything.
    """

    def __init__(self, granularity: str | None):
        self.granularity = granularity

    def step(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), run again in the backward pass under `full`."""
        if self.granularity == "full" and torch.is_grad_enabled():
            return checkpoint(function, False, *inputs)
        return function(*inputs)

    @contextlib.contextmanager
    def kept_as_recipe(self, made: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
        """Under `selective`, what the functions called inside keep of `made` is how to make it."""
        if self.granularity != "selective":
            yield
            return
        place = _place(made)  # nothing else can lie there while `made` is alive

        def pack(saved: Tensor) -> Tensor | torch.Size:
            return saved.shape if _place(saved) == place else saved

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad():
                return make().view(kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def _place(x: Tensor) -> tuple[int, int, int, bool]:
    """Where a tensor lies, also one without data: (memory, offset, number of elements, whether in their order)."""
    return x.untyped_storage()._cdata, int(x.storage_offset()), x.numel(), x.is_contiguous()
