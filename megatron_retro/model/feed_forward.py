"""The MLP of a layer: megatron-core's, with activation functions that keep one tensor for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_retro.mcore import (
    MLP,
    ColumnParallelLinear,
    MLPSubmodules,
    RowParallelLinear,
    TransformerConfig,
    one_kernel,
)
from megatron_retro.model.recompute import Recompute


class FeedForward(MLP):
    """Two linear layers, with GELU in either form, squared ReLU or SwiGLU (arXiv 2002.05202, eq. 6) between them.

    Args:
        recompute: what the backward pass makes again.
    """

    def __init__(self, config: TransformerConfig, recompute: Recompute):
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size)
        self._recompute = recompute
        self._activate = swiglu if config.gated_linear_unit else config.activation_func

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, N, D] → (output [S, N, D], its bias [D] or None)."""
        inner, bias = self.linear_fc1(x)
        inner = inner if bias is None else inner.add_(bias)
        activated = self._activate(inner)
        with self._recompute.kept_as_recipe(activated, lambda: self._activate(inner)):
            return self.linear_fc2(activated)


def gelu_by_tanh(x: Tensor) -> Tensor:
    """GELU's approximation (Hendrycks and Gimpel, arXiv 1606.08415, §2)."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al., arXiv 2109.08668, §3)."""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) · second half of the last axis."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone; autograd would also keep silu(first half)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _swiglu_backward(gradient, *ctx.saved_tensors)


@one_kernel
def _swiglu(x: Tensor) -> Tensor:
    gate, linear = x.chunk(2, -1)
    return F.silu(gate) * linear


@one_kernel
def _swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate, linear = x.chunk(2, -1)
    return torch.cat((torch.ops.aten.silu_backward(gradient * linear, gate), gradient * F.silu(gate)), -1)
