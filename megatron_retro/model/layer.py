"""One transformer layer in three steps - attend, read, feed forward - and its normalization."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_retro.mcore import (
    AttnMaskType,
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    add_residual,
    sharded_dropout,
)
from megatron_retro.model.attention import CoreAttention, CrossAttention, Pattern
from megatron_retro.model.feed_forward import FeedForward
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.model.recompute import Recompute


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm. Under sequence parallelism its gradient is summed over the tensor-parallel ranks.

    Args:
        hidden_size: what is normalized; of the model where not given.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int | None = None, **_: Any):
        super().__init__()
        self.epsilon, width = config.layernorm_epsilon, hidden_size or config.hidden_size
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(width, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class Layer(MegatronModule):
    """Pre-norm layer: x + self-attention, x + cross-attention (where there is one), x + MLP.

    The steps are separate so that the decoder can run the encoder between the first two. In a parallel layer the MLP
    reads what self-attention reads, and both are added in the first step (GPT-NeoX, arXiv 2204.06745, §2.1).

    Args:
        number: of the layer, from 1.
        causal: whether self-attention looks back only.
        parallel: whether the MLP lies beside self-attention.
        normed_residual: whether cross-attention is added to x normalized.
        recompute: what the backward pass makes again.
        cross_attention: what `read` runs; None in layers that read nothing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        number: int,
        *,
        causal: bool,
        parallel: bool = False,
        normed_residual: bool = False,
        recompute: Recompute,
        cross_attention: CrossAttention | None = None,
    ):
        super().__init__(config)
        self._recompute, self._parallel, self._normed_residual = recompute, parallel, normed_residual
        head_norm = Norm if config.qk_layernorm else None
        submodules = SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        )
        mask_type = AttnMaskType.causal if causal else AttnMaskType.padding
        self.number = number
        self.input_layernorm = Norm(config)
        self.self_attention = SelfAttention(config, submodules, number, attn_mask_type=mask_type)
        self.pre_cross_attn_layernorm = Norm(config) if cross_attention else None
        self.cross_attention = cross_attention
        self.pre_mlp_layernorm = Norm(config)
        self.mlp = FeedForward(config, recompute)

    def attend(self, x: Tensor, pattern: Pattern) -> Tensor:
        """x [S, N, D] + self-attention, and in a parallel layer + MLP."""
        attention = functools.partial(self.self_attention, attention_mask=pattern)
        attended = self._recompute.step(functools.partial(self._branch, self.input_layernorm, attention), x)
        if not self._parallel:
            return attended
        return self._recompute.step(functools.partial(self._add, self.pre_mlp_layernorm, self.mlp), attended, x)

    def read(self, x: Tensor, source: Tensor, neighbors: Neighbors, angles: Tensor) -> Tensor:
        """x [S, N, D] + cross-attention to `source`: the encoded neighbors, or in the encoder the decoder's states."""
        assert callable(self.cross_attention) and self.pre_cross_attn_layernorm is not None
        reads = functools.partial(self.cross_attention, neighbors=neighbors, angles=angles)
        add = self._add_to_normed if self._normed_residual else self._branch
        return self._recompute.step(functools.partial(add, self.pre_cross_attn_layernorm, reads), x, source)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x [S, N, D] + MLP, where that is still to do."""
        if self._parallel:
            return x
        return self._recompute.step(functools.partial(self._branch, self.pre_mlp_layernorm, self.mlp), x)

    def _branch(self, norm: Norm, function: Callable[..., tuple], x: Tensor, *inputs: Tensor) -> Tensor:
        """x + function of x normalized."""
        return self._add(norm, function, x, x, *inputs)

    def _add_to_normed(self, norm: Norm, function: Callable[..., tuple], x: Tensor, *inputs: Tensor) -> Tensor:
        """x normalized + function of it."""
        return self._add(norm, function, norm(x), x, *inputs)

    def _add(self, norm: Norm, function: Callable[..., tuple], sum_: Tensor, x: Tensor, *inputs: Tensor) -> Tensor:
        """sum + function of x normalized."""
        normed = norm(x)
        with self._recompute.kept_as_recipe(normed, lambda: norm(x)):
            out_and_bias = function(normed, *inputs)
        with sharded_dropout(self.config):
            return add_residual(out_and_bias, sum_, self.config.hidden_dropout, self.training)


class LayerStack(MegatronModule):
    """Layers named by their number in the whole model, counted from 0 as Megatron's checkpoints do.

    Names are then the same on every pipeline stage and at every layout.
    """

    def append(self, layer: Layer) -> None:
        self.add_module(str(layer.number - 1), layer)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.children())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._modules)
