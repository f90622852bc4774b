"""Attention: self-attention's kernel, and the two cross-attentions of RETRO.

Letters: S positions, B samples, C chunk length, L chunks a sample, M chunks that read neighbors, K neighbors,
R retrieved tokens, H heads of this rank, G key/value groups of this rank, E width of a head, D hidden size.

Project first, chunk after: q, k and v are projected on the sequence as it lies, so tensor and sequence parallelism
work as in any layer; shifting and chunking are views (or one copy) of the projected heads.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_retro.mcore import (
    AttnMaskType,
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    TransformerConfig,
    device,
    fused_attention,
    get_cuda_rng_tracker,
    one_kernel,
    parallel_state,
)
from megatron_retro.model.neighbors import Neighbors


def attend(
    q_SxNxHxE: Tensor,
    k_TxNxGxE: Tensor,
    v_TxNxGxE: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ / √E) v over the first axis, through torch's fused kernels; [S, N, H, E].

    Args:
        mask: bool, True where a query may look; broadcast to [N, H, S, T].
        causal: query s looks at keys ≤ s; with a mask given, the mask must say so itself.
        dropout: of the attention weights; heads are sharded, so each tensor-parallel rank draws its own.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SxNxHxE, k_TxNxGxE, v_TxNxGxE))
    tracker = get_cuda_rng_tracker()  # empty where no group was formed; dropout then draws as anywhere in torch
    with tracker.fork() if dropout and tracker.is_initialized() else contextlib.nullcontext():
        out = fused_attention(q, k, v, mask=mask, causal=causal and mask is None, dropout=dropout)
    return out.permute(2, 0, 1, 3)


def rotate(x_TxNxHxE: Tensor, angles_TxNx1xE: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864, eq. 34, halves in place of pairs); angles may have N = 1.

    Where the angles are fewer than E, the heads' last numbers stay as they are.
    """
    if not angles_TxNx1xE.shape[-1]:
        return x_TxNxHxE
    width, angles = angles_TxNx1xE.shape[-1], angles_TxNx1xE[..., : angles_TxNx1xE.shape[-1] // 2]
    if width == x_TxNxHxE.shape[-1]:
        return _Rotation.apply(x_TxNxHxE, angles)
    turned, rest = x_TxNxHxE.split([width, x_TxNxHxE.shape[-1] - width], -1)
    return torch.cat((_Rotation.apply(turned, angles), rest), -1)


class NoAngles(torch.nn.Module):
    """In the place of angles, where nothing has rotary positions."""

    def forward(self, num_positions: int) -> Tensor:
        return torch.empty(num_positions, 1, 1, 0, device=device())


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angle: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(angle)
        return _rotated(x, angle)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (angle,) = ctx.saved_tensors
        return _rotated(gradient, -angle), None


@one_kernel
def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


@dataclasses.dataclass(frozen=True)
class Order:
    """Positions of each sample rearranged, those with text before those with padding.

    Causal attention in this order hides padding from text by itself; a mask would cost the causal kernel.

    Attributes:
        there: [S·B] int64, which row of [S·B, …] comes to stand in this one.
        back: the inverse.
    """

    there: Tensor
    back: Tensor

    @classmethod
    def of(cls, order_BxS: Tensor) -> "Order":
        num_samples, num_positions = order_BxS.shape
        sample_B = torch.arange(num_samples, device=order_BxS.device)
        back_BxS = torch.empty_like(order_BxS).scatter_(
            1, order_BxS, torch.arange(num_positions, device=order_BxS.device).expand(num_samples, -1)
        )
        there, back = ((by_sample.t() * num_samples + sample_B).flatten() for by_sample in (order_BxS, back_BxS))
        return cls(there, back)

    def apply(self, x_SxBx: Tensor) -> Tensor:
        return _Rearranged.apply(x_SxBx, self.there, self.back)

    def undo(self, x_SxBx: Tensor) -> Tensor:
        return _Rearranged.apply(x_SxBx, self.back, self.there)


class _Rearranged(torch.autograd.Function):
    """Rows taken from elsewhere; autograd's own backward would add them up one by one."""

    @staticmethod
    def forward(ctx: Any, x_SxBx: Tensor, there: Tensor, back: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(back)
        return x_SxBx.flatten(0, 1).index_select(0, there).view(x_SxBx.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return gradient.flatten(0, 1).index_select(0, back).view(gradient.shape), None, None


def causal_within(examples_BxS: Tensor) -> Tensor:
    """The mask [B, 1, S, S] under which positions look back, but not beyond their own example (numbers, ascending)."""
    same_BxSxS = examples_BxS[:, :, None] == examples_BxS[:, None, :]
    return same_BxSxS.tril()[:, None]


def first_positions(examples_BxS: Tensor) -> Tensor:
    """Where the example of each position begins, [B, S] int64."""
    position = torch.arange(examples_BxS.shape[1], device=examples_BxS.device)
    is_first = F.pad(examples_BxS[:, 1:] != examples_BxS[:, :-1], (1, 0), value=True)
    return torch.where(is_first, position, 0).cummax(1).values


@dataclasses.dataclass(frozen=True)
class Pattern:
    """How a self-attention looks at its positions.

    Attributes:
        angles: rotary, [S, 1 or N, 1, E]; None without.
        mask: as in `attend`.
        order: of the positions; None as they lie.
    """

    angles: Tensor | None
    mask: Tensor | None = None
    order: Order | None = None


class CoreAttention(torch.nn.Module):
    """The kernel inside megatron-core's `SelfAttention`; it gets a `Pattern` in place of a mask.

    Attributes:
        remember: called with new keys and values, returns those to look at; generation sets it.
    """

    remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **_: Any):
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Pattern, **_: Any) -> Tensor:
        pattern, dropout = attention_mask, self.dropout if self.training else 0.0
        if pattern.angles is not None:
            # The three lie in one tensor; with copies of all of them that tensor is not kept for the backward pass.
            query, key, value = rotate(query, pattern.angles), rotate(key, pattern.angles), value.contiguous()
        if self.remember is not None:
            key, value = self.remember(key, value)
        if pattern.order is not None:
            query, key, value = (pattern.order.apply(x) for x in (query, key, value))
        out = attend(query, key, value, mask=pattern.mask, causal=self.causal, dropout=dropout)
        if pattern.order is not None:
            out = pattern.order.undo(out)
        return out.flatten(2)


class CrossAttention(MegatronModule):
    """Projections of a cross-attention whose keys and values may be of another width than its queries.

    Args:
        config: shape of queries, heads and output.
        key_value_size: width of what is read.
        starts_silent: the output projection starts at zero.
    """

    def __init__(self, config: TransformerConfig, key_value_size: int, *, starts_silent: bool = False):
        super().__init__(config)
        world = parallel_state.get_tensor_model_parallel_world_size()
        self.head_size = config.kv_channels
        self.num_heads = config.num_attention_heads // world
        self.num_groups = config.num_query_groups // world
        column = dict(config=config, init_method=config.init_method, bias=config.add_bias_linear, gather_output=False)
        query_size = config.kv_channels * config.num_attention_heads
        kv_size = config.kv_channels * config.num_query_groups
        self.linear_q = ColumnParallelLinear(config.hidden_size, query_size, **column)
        self.linear_kv = ColumnParallelLinear(key_value_size, 2 * kv_size, **column)
        self.linear_proj = RowParallelLinear(
            query_size,
            config.hidden_size,
            config=config,
            init_method=torch.nn.init.zeros_ if starts_silent else config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def queries(self, x_SxBxD: Tensor) -> Tensor:
        q, _ = self.linear_q(x_SxBxD)
        return q.unflatten(-1, (self.num_heads, self.head_size))

    def keys_values(self, x_TxNxD: Tensor) -> tuple[Tensor, Tensor]:
        # Each group's key and value lie side by side, so a tensor-parallel shard holds whole groups.
        kv, _ = self.linear_kv(x_TxNxD)
        key, value = kv.unflatten(-1, (self.num_groups, 2 * self.head_size)).chunk(2, dim=-1)
        return key, value

    @property
    def active_dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0


class ChunkedCrossAttention(CrossAttention):
    """The decoder reads encoded neighbors (CCA, arXiv 2112.04426, eq. 3 and listing 1).

    Positions u·C+C-1 … (u+1)·C+C-2, counted from 0, attend to all K·R encoded positions of the neighbors of chunk u,
    softmax jointly over K·R. The first C-1 positions and those of chunks without neighbors get exactly zero.
    Query offset i in [0, C) has rotary position C-1+i, retrieved token j position j, for all K alike.

    The output projection starts at zero, so training begins as the GPT of the same seed and neighbors add no noise
    before they are of use (as Flamingo's gates do, arXiv 2204.14198, §2.2).
    """

    def __init__(self, config: TransformerConfig, encoder_hidden_size: int, chunk_length: int):
        super().__init__(config, encoder_hidden_size, starts_silent=True)
        self.chunk_length = chunk_length

    def forward(
        self, x_SxBxD: Tensor, encoded_RxKMxD: Tensor, neighbors: Neighbors, angles: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [S, B, D], its bias, zero where nothing is read, [S, B, D] or None)."""
        q_SxBxHxE = self.queries(x_SxBxD)
        num_positions, num_samples = q_SxBxHxE.shape[:2]
        k_RKxMxGxE, v_RKxMxGxE = self.neighbor_keys_values(encoded_RxKMxD, len(neighbors.readable_M), angles)

        position = torch.arange(num_positions, device=angles.device)
        q_SxBxHxE = rotate(q_SxBxHxE, self.query_angles(position, angles))
        q_CxMxHxE = neighbors.take(chunk_queries(q_SxBxHxE, self.chunk_length, neighbors.num_chunks))
        out_CxMxHxE = attend(q_CxMxHxE, k_RKxMxGxE, v_RKxMxGxE, mask=neighbors.key_mask, dropout=self.active_dropout)
        out_CxBLxHxE = neighbors.put_back(out_CxMxHxE * neighbors.readable_M[:, None, None])
        out_SxBxHxE = unchunk_queries(out_CxBLxHxE, num_samples, num_positions)

        out_SxBxD, bias = self.linear_proj(out_SxBxHxE.flatten(2))
        return out_SxBxD, self._masked(bias, neighbors, num_positions)

    def neighbor_keys_values(self, encoded_RxKMxD: Tensor, num_chunks: int, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (with rotary positions) and values of the neighbors of M = `num_chunks` chunks: [R·K, M, G, E]."""
        key, value = self.keys_values(encoded_RxKMxD)
        key, value = rotate(key, angles[: key.shape[0]]), value.contiguous()  # copies: kv itself is not kept
        return key.view(-1, num_chunks, *key.shape[2:]), value.view(-1, num_chunks, *value.shape[2:])

    def query_angles(self, position: Tensor, angles: Tensor) -> Tensor:
        """Rotary angles of queries at positions of the sequence (any shape)."""
        return angles[(position + 1) % self.chunk_length + self.chunk_length - 1]

    def _masked(self, bias: Tensor | None, neighbors: Neighbors, num_positions: int) -> Tensor | None:
        if bias is None:
            return None
        readable_SxB = neighbors.readable_positions(num_positions, self.chunk_length)
        if self.config.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            readable_SxB = readable_SxB.chunk(parallel_state.get_tensor_model_parallel_world_size())[rank]
        return bias * readable_SxB[..., None]


class EncoderCrossAttention(CrossAttention):
    """The encoder reads the decoder: tokens of a neighbor of chunk u attend to the C hidden states of chunk u.

    Retrieved token j has rotary position j, position i of the chunk position i.
    """

    def __init__(self, config: TransformerConfig, decoder_hidden_size: int, chunk_length: int):
        super().__init__(config, decoder_hidden_size)
        self.chunk_length = chunk_length

    def forward(
        self, x_RxKMxD: Tensor, decoder_SxBxD: Tensor, neighbors: Neighbors, angles: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [R, K·M, D], bias [D] or None)."""
        q_RxKMxHxE = self.queries(x_RxKMxD)
        k_SxBxGxE, v_SxBxGxE = self.keys_values(decoder_SxBxD)
        num_retrieved, num_rows = q_RxKMxHxE.shape[:2]

        position = torch.arange(k_SxBxGxE.shape[0], device=angles.device)
        q_RxKMxHxE = rotate(q_RxKMxHxE, angles[:num_retrieved])
        k_SxBxGxE = rotate(k_SxBxGxE, angles[position % self.chunk_length])

        q_RKxMxHxE = q_RxKMxHxE.view(-1, len(neighbors.readable_M), *q_RxKMxHxE.shape[2:])
        k_CxMxGxE, v_CxMxGxE = (
            neighbors.take(split_chunks(x, self.chunk_length, neighbors.num_chunks)) for x in (k_SxBxGxE, v_SxBxGxE)
        )
        out_RKxMxHxE = attend(q_RKxMxHxE, k_CxMxGxE, v_CxMxGxE, dropout=self.active_dropout)
        return self.linear_proj(out_RKxMxHxE.reshape(num_retrieved, num_rows, -1))


def split_chunks(x_SxBx: Tensor, chunk_length: int, num_chunks: int) -> Tensor:
    """[S, B, …] → [C, B·L, …], of the first L chunks."""
    x = x_SxBx[: num_chunks * chunk_length].unflatten(0, (num_chunks, chunk_length))
    return x.permute(1, 2, 0, *range(3, x.dim())).flatten(1, 2)


def chunk_queries(q_SxBx: Tensor, chunk_length: int, num_chunks: int) -> Tensor:
    """[S, B, …] → [C, B·L, …] where row (i, (b, u)) is position u·C + C-1 + i, or zeros behind the end."""
    shifted = q_SxBx[chunk_length - 1 :]
    missing = num_chunks * chunk_length - shifted.shape[0]
    return split_chunks(F.pad(shifted, (0, 0) * (q_SxBx.dim() - 1) + (0, missing)), chunk_length, num_chunks)


def unchunk_queries(x_CxBLx: Tensor, num_samples: int, num_positions: int) -> Tensor:
    """Inverse of `chunk_queries`; the first C-1 positions, and any behind chunk L, are zero. [C, B·L, …] → [S, B, …]"""
    chunk_length = x_CxBLx.shape[0]
    x = x_CxBLx.unflatten(1, (num_samples, -1))
    x = x.permute(2, 0, 1, *range(3, x.dim())).flatten(0, 1)
    behind = num_positions - (chunk_length - 1) - x.shape[0]  # negative where the last chunk is cut short
    return F.pad(x, (0, 0) * (x.dim() - 1) + (chunk_length - 1, behind))
