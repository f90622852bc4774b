"""The MLP of a layer: megatron-core's, with activation functions that keep one tensor for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_retro.mcore import MLP, ColumnParallelLinear, MLPSubmodules, RowParallelLinear, TransformerConfig
from megatron_retro.model.recompute import Recompute


class FeedForward(MLP):
    """GELU, or SwiGLU (arXiv 2002.05202, eq. 6), between two linear layers.

    Args:
        recompute: what the backward pass makes again.
    """

    def __init__(self, config: TransformerConfig, recompute: Recompute):
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size)
        self._recompute = recompute
        self._activate = swiglu if config.gated_linear_unit else F.gelu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, N, D] → (output [S, N, D], its bias [D] or None)."""
        inner, bias = self.linear_fc1(x)
        inner = inner if bias is None else inner + bias
        activated = self._activate(inner)
        with self._recompute.kept_as_recipe(activated, lambda: self._activate(inner)):
            return self.linear_fc2(activated)


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) · second half of the last axis."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone; autograd would also keep silu(first half)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        gate, linear = x.chunk(2, -1)
        return F.silu(gate) * linear

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, -1)
        of_x = torch.empty_like(x)
        of_gate, of_linear = of_x.chunk(2, -1)
        torch.mul(gradient, F.silu(gate), out=of_linear)
        of_gate.copy_(torch.ops.aten.silu_backward(gradient * linear, gate))
        return of_x
