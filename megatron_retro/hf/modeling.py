"""RetroForCausalLM: RETRO for `transformers`, in plain torch: one process, any device, any dtype.

Tensors have the names of `RetroModel`'s state dict at TP 1, PP 1, so weights go either way as they are. Letters as in
`model/attention.py`: S positions, B samples, C chunk length, L chunks a sample, M chunks that read, K neighbors, R
retrieved tokens, H heads, G key/value groups, E width of a head, D width; T new positions.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from megatron_retro.config.form import OURS, Form
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.model import RetroConfig as RetroFlags
from megatron_retro.errors import UserError
from megatron_retro.hf.cache import RetroCache, first_true
from megatron_retro.hf.configuration import RetroConfig
from megatron_retro.model.attention import attend, chunk_queries, rotate, split_chunks, unchunk_queries
from megatron_retro.model.feed_forward import swiglu
from megatron_retro.model.model import activation, encoder_shape, rotary_positions
from megatron_retro.model.neighbors import Neighbors


class Retrieves(Protocol):
    """A retriever, as `forward` and `generate` take it: any function of this kind, or a `Retriever` of a work dir."""

    def __call__(self, chunks_nxC: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbors of complete chunks.

        Args:
            chunks_nxC: int64 token ids, on the model's device.

        Returns:
            (token ids [n, K, R] int64, number of tokens of each neighbor [n, K] int64, 0 for none), on any device; a
            neighbor's first C tokens are the retrieved chunk, those behind them its continuation.
        """


def _norm(width: int, shape: ModelConfig) -> nn.Module:
    return (nn.LayerNorm if shape.normalization == "LayerNorm" else nn.RMSNorm)(width, shape.norm_epsilon)


class NoRotary:
    """In the place of `Rotary` where nothing has rotary positions."""

    def __call__(self, positions: Tensor) -> Tensor:
        return positions.new_empty(*positions.shape, 1, 0, dtype=torch.float32)


class Rotary:
    """Angles of positions; no buffer, so that nothing of it is in a checkpoint or on the meta device."""

    def __init__(self, shape: ModelConfig):
        with torch.device("cpu"):
            self._frequencies = rotary_positions(shape).inv_freq

    def __call__(self, positions: Tensor) -> Tensor:
        """[…] -> [… , 1, E]: the same for all heads."""
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions[..., None].to(self._frequencies.dtype) * self._frequencies
        return torch.cat((angles, angles), -1)[..., None, :]


@dataclasses.dataclass
class Pattern:
    """How a self-attention looks at its positions.

    Attributes:
        angles: rotary, [S, 1 or N, 1, E]; None without.
        mask: [N, 1, 1 or S, S + those before] bool, True where a position may look; None for all.
        cache: where keys and values go; None keeps none.
    """

    angles: Tensor | None
    mask: Tensor | None
    cache: RetroCache | None = None


class SelfAttention(nn.Module):
    def __init__(self, shape: ModelConfig, number: int, *, causal: bool):
        super().__init__()
        heads, groups, width = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels
        assert heads and groups and width
        self.number, self.causal, self.num_groups, self.head_size = number, causal, groups, width
        self.dropout = shape.attention_dropout
        bias = not shape.disable_bias_linear
        self.linear_qkv = nn.Linear(shape.hidden_size, (heads + 2 * groups) * width, bias=bias or shape.add_qkv_bias)
        self.linear_proj = nn.Linear(heads * width, shape.hidden_size, bias=bias)
        self.q_layernorm = _norm(width, shape) if shape.qk_layernorm else None
        self.k_layernorm = _norm(width, shape) if shape.qk_layernorm else None

    def forward(self, x_SxNxD: Tensor, pattern: Pattern) -> Tensor:
        # Megatron's order: a group's queries, its key, its value.
        qkv = self.linear_qkv(x_SxNxD).unflatten(-1, (self.num_groups, -1, self.head_size))
        query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if pattern.angles is not None:
            query, key = rotate(query, pattern.angles), rotate(key, pattern.angles)
        if pattern.cache is not None:
            of_all = pattern.cache.update(key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), self.number - 1)
            key, value = (kept.permute(2, 0, 1, 3) for kept in of_all)
        dropout = self.dropout if self.training else 0.0
        out = attend(query, key, value, mask=pattern.mask, causal=self.causal, dropout=dropout)
        return self.linear_proj(out.flatten(2))


class CrossAttention(nn.Module):
    """Projections of an attention whose keys and values may be of another width than its queries."""

    def __init__(self, shape: ModelConfig, key_value_size: int, rotary: Rotary | NoRotary, chunk_length: int):
        super().__init__()
        heads, groups, width = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels
        assert heads and groups and width
        self.num_groups, self.head_size, self.dropout = groups, width, shape.attention_dropout
        self.rotary, self.chunk_length = rotary, chunk_length
        bias = not shape.disable_bias_linear
        self.linear_q = nn.Linear(shape.hidden_size, heads * width, bias=bias)
        self.linear_kv = nn.Linear(key_value_size, 2 * groups * width, bias=bias)
        self.linear_proj = nn.Linear(heads * width, shape.hidden_size, bias=bias)

    def queries(self, x_SxBxD: Tensor, positions: Tensor) -> Tensor:
        q = self.linear_q(x_SxBxD).unflatten(-1, (-1, self.head_size))
        return rotate(q, self.rotary(positions))

    def keys_values(self, x_TxNxD: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.linear_kv(x_TxNxD).unflatten(-1, (self.num_groups, 2 * self.head_size))
        key, value = kv.chunk(2, dim=-1)
        return rotate(key, self.rotary(positions)), value

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0


class ChunkedCrossAttention(CrossAttention):
    """The decoder reads encoded neighbors, see `model/attention.py`."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.linear_proj.starts_silent = True  # type: ignore[assignment]

    def neighbor_keys_values(self, encoded_RxKMxD: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
        """Of the neighbors of M = `num_chunks` chunks: [R·K, M, G, E] each."""
        position = torch.arange(len(encoded_RxKMxD), device=encoded_RxKMxD.device)[:, None]
        key, value = self.keys_values(encoded_RxKMxD, position)
        return key.reshape(-1, num_chunks, *key.shape[2:]), value.reshape(-1, num_chunks, *value.shape[2:])

    def forward(self, x_SxBxD: Tensor, keys: Tensor, values: Tensor, neighbors: Neighbors) -> Tensor:
        """Positions of whole texts read the neighbors of their chunks."""
        num_positions, num_samples = x_SxBxD.shape[:2]
        position = torch.arange(num_positions, device=x_SxBxD.device)[:, None]
        q_SxBxHxE = self.queries(x_SxBxD, self._retro_position(position))
        q_CxMxHxE = neighbors.take(chunk_queries(q_SxBxHxE, self.chunk_length, neighbors.num_chunks))
        out_CxMxHxE = attend(q_CxMxHxE, keys, values, mask=neighbors.key_mask, dropout=self.active_dropout)
        out_CxBLxHxE = neighbors.put_back(out_CxMxHxE * neighbors.readable_M[:, None, None])
        out_SxBxHxE = unchunk_queries(out_CxBLxHxE, num_samples, num_positions)
        return self._project(out_SxBxHxE, neighbors.readable_positions(num_positions, self.chunk_length))

    def step(self, x_1xBxD: Tensor, position_B: Tensor, layer: int, cache: RetroCache) -> Tensor:
        """One more position of each text reads the neighbors of its last complete chunk."""
        reading = cache.reading(layer)
        if reading is None:
            return torch.zeros_like(x_1xBxD)
        assert cache.readable_B is not None
        q_1xBxHxE = self.queries(x_1xBxD, self._retro_position(position_B[None]))
        keys, values = reading.keys.transpose(0, 1), reading.values.transpose(0, 1)
        out_1xBxHxE = attend(q_1xBxHxE, keys, values, mask=cache.key_mask, dropout=self.active_dropout)
        return self._project(out_1xBxHxE * cache.readable_B[:, None, None], cache.readable_B[None])

    def _retro_position(self, position: Tensor) -> Tensor:
        return (position + 1) % self.chunk_length + self.chunk_length - 1

    def _project(self, out_SxBxHxE: Tensor, readable_SxB: Tensor) -> Tensor:
        out = F.linear(out_SxBxHxE.flatten(2), self.linear_proj.weight)
        if self.linear_proj.bias is None:
            return out
        return out + self.linear_proj.bias * readable_SxB[..., None]


class EncoderCrossAttention(CrossAttention):
    """The encoder reads the decoder's states of the chunk that a neighbor belongs to, see `model/attention.py`."""

    def forward(self, x_RxKMxD: Tensor, decoder_SxBxD: Tensor, neighbors: Neighbors) -> Tensor:
        num_retrieved, num_rows = x_RxKMxD.shape[:2]
        position = torch.arange(max(num_retrieved, len(decoder_SxBxD)), device=x_RxKMxD.device)[:, None]
        q_RxKMxHxE = self.queries(x_RxKMxD, position[:num_retrieved])
        keys_values = self.keys_values(decoder_SxBxD, position[: len(decoder_SxBxD)] % self.chunk_length)
        q_RKxMxHxE = q_RxKMxHxE.reshape(-1, len(neighbors.readable_M), *q_RxKMxHxE.shape[2:])
        keys, values = (neighbors.take(split_chunks(x, self.chunk_length, neighbors.num_chunks)) for x in keys_values)
        out = attend(q_RKxMxHxE, keys, values, dropout=self.active_dropout)
        return self.linear_proj(out.reshape(num_retrieved, num_rows, -1))


class FeedForward(nn.Module):
    def __init__(self, shape: ModelConfig):
        super().__init__()
        assert shape.ffn_hidden_size
        inner = shape.ffn_hidden_size * (2 if shape.swiglu else 1)
        bias = not shape.disable_bias_linear
        self.linear_fc1 = nn.Linear(shape.hidden_size, inner, bias=bias)
        self.linear_fc2 = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, bias=bias)
        self.activate: Callable[[Tensor], Tensor] = swiglu if shape.swiglu else activation(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.activate(self.linear_fc1(x)))


class Layer(nn.Module):
    """Pre-norm: x + self-attention, x + cross-attention (where there is one), x + MLP; see `model/layer.py`."""

    def __init__(
        self,
        shape: ModelConfig,
        number: int,
        *,
        causal: bool,
        parallel: bool = False,
        cross_attention: CrossAttention | None = None,
    ):
        super().__init__()
        self.number, self._parallel, self._dropout = number, parallel, shape.hidden_dropout
        self.input_layernorm = _norm(shape.hidden_size, shape)
        self.self_attention = SelfAttention(shape, number, causal=causal)
        self.pre_cross_attn_layernorm = _norm(shape.hidden_size, shape) if cross_attention else None
        self.cross_attention = cross_attention
        self.pre_mlp_layernorm = _norm(shape.hidden_size, shape)
        self.mlp = FeedForward(shape)

    def attend(self, x: Tensor, pattern: Pattern) -> Tensor:
        attended = self.add(x, self.self_attention(self.input_layernorm(x), pattern))
        return self.add(attended, self.mlp(self.pre_mlp_layernorm(x))) if self._parallel else attended

    def norm_to_read(self, x: Tensor) -> Tensor:
        """What cross-attention takes."""
        assert self.pre_cross_attn_layernorm is not None
        return self.pre_cross_attn_layernorm(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x if self._parallel else self.add(x, self.mlp(self.pre_mlp_layernorm(x)))

    def add(self, x: Tensor, more: Tensor) -> Tensor:
        return x + F.dropout(more, self._dropout, self.training)


class Layers(nn.ModuleList):
    def __iter__(self) -> Iterator[Layer]:
        return super().__iter__()  # type: ignore[return-value]


class Embedding(nn.Module):
    def __init__(self, shape: ModelConfig, vocab_size: int, num_positions: int | None):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, shape.hidden_size)
        self.position_embeddings = nn.Embedding(num_positions, shape.hidden_size) if num_positions else None
        self._dropout = shape.hidden_dropout

    def forward(self, tokens_BxT: Tensor, positions_BxT: Tensor) -> Tensor:
        """[T, B, D]"""
        x = self.word_embeddings(tokens_BxT)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions_BxT)
        return F.dropout(x.transpose(0, 1), self._dropout, self.training)


class Encoder(nn.Module):
    """Encodes neighbors, reading the chunks that they were retrieved for; see `model/encoder.py`."""

    def __init__(
        self,
        shape: ModelConfig,
        vocab_size: int,
        decoder_hidden_size: int,
        rotary: Rotary | NoRotary,
        chunk_length: int,
        form: Form,
    ):
        super().__init__()
        self.rotary, self._normed_residual = rotary, form.normed_residual
        learned = shape.position_embedding_type == "learned_absolute" and not form.rotary_reading
        self.embedding = Embedding(shape, vocab_size, 2 * chunk_length if learned else None)
        reads = EncoderCrossAttention(shape, decoder_hidden_size, rotary, chunk_length)
        self.layers = Layers(
            Layer(shape, number, causal=False, cross_attention=reads if number == 1 else None)
            for number in range(1, shape.num_layers + 1)
        )
        self.final_layernorm = _norm(shape.hidden_size, shape) if form.encoder_norm else nn.Identity()

    def forward(self, neighbors: Neighbors, decoder_SxBxD: Tensor) -> Tensor:
        """[R, K·M, D], D the encoder's width."""
        tokens = neighbors.tokens_KMxR
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x, pattern = self.embedding(tokens, position), Pattern(self.rotary(position[:, None]), neighbors.token_mask)
        for layer in self.layers:
            x = layer.attend(x, pattern)
            if layer.cross_attention is not None:
                normed = layer.norm_to_read(x)
                read = layer.cross_attention(normed, decoder_SxBxD, neighbors)
                x = layer.add(normed if self._normed_residual else x, read)
            x = layer.feed_forward(x)
        return self.final_layernorm(x)


@dataclasses.dataclass
class Arrivals:
    """Neighbors of chunks that one more position completes.

    Attributes:
        samples: [n] int64, whose they are.
        neighbors: of n samples with one chunk each.
    """

    samples: Tensor
    neighbors: Neighbors


class Decoder(nn.Module):
    """The layers; see `model/decoder.py`."""

    def __init__(self, shape: ModelConfig, retro: RetroFlags | None, vocab_size: int, chunk_length: int):
        super().__init__()
        rotary, self.form = Rotary(shape), retro.form if retro else OURS
        reading = rotary if self.form.rotary_reading else NoRotary()
        self.rotary = rotary if shape.position_embedding_type == "rope" else None
        self.chunk_length, numbers = chunk_length, retro.layers if retro else ()
        self.first_retro_layer = min(numbers, default=0)
        encoder = encoder_shape(shape, retro) if retro else None
        self.layers = Layers()
        for number in range(1, shape.num_layers + 1):
            reads = None
            if encoder is not None and number in numbers:
                reads = ChunkedCrossAttention(shape, encoder.hidden_size, reading, chunk_length)
            self.layers.append(
                Layer(shape, number, causal=True, parallel=shape.use_parallel_residual, cross_attention=reads)
            )
        self.encoder = None
        if encoder is not None:
            self.encoder = Encoder(encoder, vocab_size, shape.hidden_size, reading, chunk_length, self.form)
        self.final_layernorm = _norm(shape.hidden_size, shape) if self.form.decoder_norm else nn.Identity()

    def forward(
        self,
        x_SxBxD: Tensor,
        mask_BxS: Tensor | None,
        first_B: Tensor | None,
        neighbors: Neighbors | None,
        cache: RetroCache | None,
    ) -> Tensor:
        """Whole texts.

        Args:
            mask_BxS: bool, False where a position is padding; None without padding.
            first_B: where each text begins; None where all do at 0.
            neighbors: of the texts' chunks, counted from there.
            cache: an empty one, which has seen the tokens.
        """
        positions = _positions(len(x_SxBxD), first_B, x_SxBxD.device)
        mask = None if mask_BxS is None else _causal(mask_BxS)
        pattern = Pattern(self.rotary(positions) if self.rotary else None, mask, cache)
        encoded = row_B = None
        if cache is not None and neighbors is not None:
            row_B = cache.show_last_chunks(neighbors, len(x_SxBxD) - cache.first_B, self.chunk_length)
        for layer in self.layers:
            x_SxBxD = layer.attend(x_SxBxD, pattern)
            reads = layer.cross_attention
            if isinstance(reads, ChunkedCrossAttention) and (neighbors is not None or cache is not None):
                normed = layer.norm_to_read(x_SxBxD)
                if cache is not None and layer.number == self.first_retro_layer:
                    cache.keep_states(normed, self.chunk_length)
                if neighbors is not None:
                    aligned = _shift(normed, first_B)
                    encoded = self._encoded(layer, encoded, neighbors, aligned)
                    keys, values = reads.neighbor_keys_values(encoded, len(neighbors.readable_M))
                    if cache is not None and row_B is not None:
                        cache.read(layer.number, None, keys[:, row_B], values[:, row_B])
                    out = reads(aligned, keys, values, neighbors)
                    x_SxBxD = layer.add(x_SxBxD, _shift(out, None if first_B is None else -first_B))
            x_SxBxD = layer.feed_forward(x_SxBxD)
        return self.final_layernorm(x_SxBxD)

    def step(self, x_1xBxD: Tensor, cache: RetroCache, arrivals: Arrivals | None) -> Tensor:
        """One more position of each text, which the cache has seen the token of."""
        assert cache.mask_BxP is not None
        position_B = (cache.mask_BxP.shape[1] - 1 - cache.first_B).clamp(min=0)
        mask_BxP = cache.mask_BxP.clone()
        mask_BxP[:, -1] = True  # its own place, should it be padding: every softmax stays finite
        angles = self.rotary(position_B[None]) if self.rotary else None
        pattern, encoded = Pattern(angles, mask_BxP[:, None, None], cache), None
        if arrivals is not None:
            cache.show(arrivals.samples, arrivals.neighbors.key_mask, arrivals.neighbors.readable_M)
        for layer in self.layers:
            x_1xBxD = layer.attend(x_1xBxD, pattern)
            if isinstance(reads := layer.cross_attention, ChunkedCrossAttention):
                normed = layer.norm_to_read(x_1xBxD)
                if layer.number == self.first_retro_layer:
                    cache.keep_states(normed, self.chunk_length)
                if arrivals is not None:
                    assert cache.states_BxCxD is not None
                    states_CxnxD = cache.states_BxCxD[arrivals.samples].transpose(0, 1)
                    encoded = self._encoded(layer, encoded, arrivals.neighbors, states_CxnxD)
                    read = reads.neighbor_keys_values(encoded, len(arrivals.samples))
                    cache.read(layer.number, arrivals.samples, *read)
                x_1xBxD = layer.add(x_1xBxD, reads.step(normed, position_B, layer.number, cache))
            x_1xBxD = layer.feed_forward(x_1xBxD)
        return self.final_layernorm(x_1xBxD)

    def _encoded(self, layer: Layer, encoded: Tensor | None, neighbors: Neighbors, states: Tensor) -> Tensor:
        """What the encoder makes at the first RETRO layer, and all of them read."""
        if layer.number == self.first_retro_layer:
            assert self.encoder is not None
            return self.encoder(neighbors, states)
        assert encoded is not None
        return encoded


def _positions(num_positions: int, first_B: Tensor | None, device: torch.device) -> Tensor:
    """[S, 1 or B], counted from where each text begins."""
    position = torch.arange(num_positions, device=device)[:, None]
    return position if first_B is None else (position - first_B).clamp(min=0)


def _causal(mask_BxS: Tensor) -> Tensor:
    """[B, 1, S, S]: positions look back, not at padding but for their own place, so that every softmax is finite."""
    seen = torch.ones(mask_BxS.shape[1], mask_BxS.shape[1], dtype=torch.bool, device=mask_BxS.device).tril()
    own = torch.eye(mask_BxS.shape[1], dtype=torch.bool, device=mask_BxS.device)
    return (seen & mask_BxS[:, None] | own)[:, None]


def _shift(x_SxBx: Tensor, by_B: Tensor | None) -> Tensor:
    """Row t of sample b is row t + by[b] of x, zero outside."""
    if by_B is None:
        return x_SxBx
    row_SxB = torch.arange(len(x_SxBx), device=x_SxBx.device)[:, None] + by_B
    inside_SxB = (row_SxB >= 0) & (row_SxB < len(x_SxBx))
    sample_B = torch.arange(len(by_B), device=x_SxBx.device)
    shifted = x_SxBx[row_SxB.clamp(0, len(x_SxBx) - 1), sample_B]
    return torch.where(inside_SxB.view(*inside_SxB.shape, *(1,) * (x_SxBx.dim() - 2)), shifted, 0)


class RetroForCausalLM(PreTrainedModel, GenerationMixin):
    """A RETRO (or with `retro_add_retriever` false a GPT) with the weights of `pretrain_retro.py`."""

    config: RetroConfig
    config_class = RetroConfig
    _tied_weights_keys = {"output_layer.weight": "embedding.word_embeddings.weight"}  # noqa: RUF012 - of the base class
    _no_split_modules = ["Decoder"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # no token can be taken back from a cache, as assisted generation would

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        shape, retro = config.shape()
        learned = shape.position_embedding_type == "learned_absolute"
        self.embedding = Embedding(shape, config.vocab_size, shape.max_position_embeddings if learned else None)
        self.decoder = Decoder(shape, retro, config.vocab_size, config.retro_chunk_length)
        self.output_layer = nn.Linear(shape.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.output_layer

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.output_layer = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        std = self.config.init_method_std
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=0.0 if getattr(module, "starts_silent", False) else std)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            init.zeros_(bias)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        neighbor_input_ids: Tensor | None = None,
        neighbor_lengths: Tensor | None = None,
        retriever: Retrieves | None = None,
        past_key_values: RetroCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and what they cost.

        Chunks are counted from each text's first token: `attention_mask` tells where left padding ends. Neighbors are
        those of the chunks that this call completes, the first one first; with a cache of P positions the first of
        them is chunk P // C.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, P + T], 0 where a position is padding; None where none is.
            neighbor_input_ids: [B, L, K, R] int64 token ids of retrieved text, L the chunks that the longest text
                completes here, R = 2C; None turns retrieval off.
            neighbor_lengths: [B, L, K] int64, number of tokens of each neighbor, 0 for none; None means R of each.
            retriever: finds the neighbors of the chunks that this call completes, in place of those two.
            past_key_values: what was kept of the P positions before.
            use_cache: whether to keep what is computed; by default as the configuration says, and not in training.
            labels: [B, T] int64, `input_ids` where a token counts in the loss, else -100.
            logits_to_keep: only so many of the last positions get logits; 0 for all.
            kwargs: what `transformers` gives a loss function.

        Raises:
            UserError: shapes do not fit, or a text is longer than `max_position_embeddings`.
        """
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = RetroCache()
        if past_key_values is not None and not isinstance(past_key_values, RetroCache):
            kind = type(past_key_values).__name__
            raise UserError(f"past_key_values is a {kind}; RetroForCausalLM takes a RetroCache, or None")
        given = self._given(input_ids, neighbor_input_ids, neighbor_lengths, retriever)
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = self._mask(input_ids, attention_mask, past_key_values)
        if before == 0:
            x_TxBxD = self._whole(input_ids, mask, given, retriever, past_key_values)
        else:
            assert past_key_values is not None
            x_TxBxD = self._more(input_ids, mask, given, retriever, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output_layer(x_TxBxD.transpose(0, 1)[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)

    def _whole(
        self,
        tokens_BxS: Tensor,
        mask_BxS: Tensor | None,
        given: tuple[Tensor, Tensor] | None,
        retriever: Retrieves | None,
        cache: RetroCache | None,
    ) -> Tensor:
        length = self.config.retro_chunk_length
        num_positions = tokens_BxS.shape[1]
        if mask_BxS is not None and bool(mask_BxS.all()):
            mask_BxS = None
        first_B = None if mask_BxS is None else first_true(mask_BxS)
        first_B = None if first_B is None or not bool(first_B.any()) else first_B
        self._check_length(num_positions if first_B is None else int((num_positions - first_B).max()))
        if cache is not None:
            seen = torch.ones_like(tokens_BxS, dtype=torch.bool) if mask_BxS is None else mask_BxS
            cache.see(tokens_BxS, seen, length)
        aligned = tokens_BxS if first_B is None else _shift(tokens_BxS.t(), first_B).t()
        num_chunks = num_positions // length
        if given is not None:
            self._check_chunks(given, 0, num_positions, first_B, most=num_chunks)
        complete_BxL = torch.ones_like(aligned, dtype=torch.bool) if mask_BxS is None else mask_BxS
        complete_BxL = complete_BxL if first_B is None else _shift(complete_BxL.t(), first_B).t().bool()
        chunks_BxLxC = aligned[:, : num_chunks * length].unflatten(1, (num_chunks, length)) if num_chunks else None
        if retriever is not None and chunks_BxLxC is not None:
            complete_BxL = complete_BxL[:, : num_chunks * length].unflatten(1, (num_chunks, length)).all(-1)
            given = self._retrieved(retriever, chunks_BxLxC, complete_BxL)
        neighbors = None
        if given is not None and num_chunks:
            hides = self.decoder.form.hides_padding
            neighbors = _of_chunks(*given, num_chunks, first_B, num_positions, length, hides_padding=hides)
        positions = _positions(num_positions, first_B, tokens_BxS.device).t()
        return self.decoder(self.embedding(tokens_BxS, positions), mask_BxS, first_B, neighbors, cache)

    def _more(
        self,
        tokens_BxT: Tensor,
        mask_BxT: Tensor | None,
        given: tuple[Tensor, Tensor] | None,
        retriever: Retrieves | None,
        cache: RetroCache,
    ) -> Tensor:
        """New positions of texts that the cache knows the beginning of, one after the other."""
        length, slots = self.config.retro_chunk_length, [0] * len(tokens_BxT)
        states: list[Tensor] = []
        assert cache.mask_BxP is not None and cache.tokens_BxC is not None
        mask_BxT = torch.ones_like(tokens_BxT, dtype=torch.bool) if mask_BxT is None else mask_BxT
        before = cache.mask_BxP.shape[1]
        self._check_length(before + tokens_BxT.shape[1] - int(cache.first_B.min()))
        if given is not None:
            first_B = first_true(torch.cat([cache.mask_BxP, mask_BxT], 1))
            self._check_chunks(given, before, tokens_BxT.shape[1], first_B)
        for column in range(tokens_BxT.shape[1]):
            cache.see(tokens_BxT[:, column, None], mask_BxT[:, column, None], length)
            ends = cache.mask_BxP.shape[1]
            begins = cache.first_B.tolist()
            completing = [b for b, begin in enumerate(begins) if ends > begin and (ends - begin) % length == 0]
            arrivals = None
            if completing:
                samples = torch.tensor(completing, device=tokens_BxT.device)
                found = None
                if retriever is not None:
                    found = self._ask(retriever, cache.tokens_BxC[samples])
                elif given is not None:
                    slot = torch.tensor([slots[b] for b in completing], device=samples.device)
                    found = given[0][samples, slot], given[1][samples, slot]
                if found is not None:
                    hides = self.decoder.form.hides_padding
                    own = Neighbors.of(found[0][:, None], found[1][:, None], hides_padding=hides)
                    arrivals = Arrivals(samples, own)
                else:
                    cache.show_nothing(samples)
                for b in completing:
                    slots[b] += 1
            positions = (ends - 1 - cache.first_B).clamp(min=0)[:, None]
            states.append(self.decoder.step(self.embedding(tokens_BxT[:, column, None], positions), cache, arrivals))
        return torch.cat(states)

    # -------------------------------------------------------------------------------------------- what was given

    def _given(
        self, tokens: Tensor, neighbor_ids: Tensor | None, lengths: Tensor | None, retriever: Retrieves | None
    ) -> tuple[Tensor, Tensor] | None:
        if (retriever is not None or neighbor_ids is not None) and self.decoder.encoder is None:
            raise UserError("this model has retro_add_retriever false and reads no neighbors; leave them out")
        if retriever is not None:
            self._check_retriever(retriever)
            if neighbor_ids is not None:
                raise UserError("neighbor_input_ids and retriever were both given; leave one out")
        if neighbor_ids is None:
            return None
        if lengths is None:
            lengths = _full_lengths(neighbor_ids)
        if neighbor_ids.dim() != 4 or lengths.shape != neighbor_ids.shape[:3] or len(neighbor_ids) != len(tokens):
            raise UserError(
                f"neighbor_input_ids is {list(neighbor_ids.shape)} and neighbor_lengths {list(lengths.shape)} for "
                f"{len(tokens)} texts; they are [B, L, K, R] and [B, L, K]"
            )
        if neighbor_ids.shape[-1] != 2 * self.config.retro_chunk_length:
            raise UserError(
                f"neighbor_input_ids has R = {neighbor_ids.shape[-1]} tokens a neighbor; a chunk and its continuation "
                f"have 2C = {2 * self.config.retro_chunk_length}, pad shorter ones and give neighbor_lengths"
            )
        return neighbor_ids.to(tokens.device), lengths.to(tokens.device)

    def _check_chunks(
        self, given: tuple[Tensor, Tensor], before: int, new: int, first_B: Tensor | None, most: int = 0
    ) -> None:
        """Check that the neighbors given are those of the chunks that new positions complete.

        Args:
            before: positions before the new ones.
            first_B: where each text begins; None where all do at 0.
            most: how many chunks may be given if no text completes as many, for it is padded.
        """
        length, first_B = self.config.retro_chunk_length, torch.zeros(1) if first_B is None else first_B
        ends_B, begins_B = (before + new - first_B).clamp(min=0), (before - first_B).clamp(min=0)
        completed, found = int((ends_B // length - begins_B // length).max()), given[0].shape[1]
        if not completed <= found <= max(completed, most):
            raise UserError(
                f"neighbor_input_ids has the neighbors of L = {found} chunks; with C = {length} tokens a chunk these "
                f"input_ids complete {completed}, give the neighbors of each"
            )

    def _check_retriever(self, retriever: Retrieves) -> None:
        digest = getattr(retriever, "tokenizer_digest", None)
        if digest and self.config.tokenizer_digest and digest != self.config.tokenizer_digest:
            raise UserError(
                f"the retriever's work dir has the tokenizer {digest}, the model was trained with "
                f"{self.config.tokenizer_digest}; use a work dir built with that tokenizer"
            )

    def _mask(self, tokens: Tensor, mask: Tensor | None, cache: RetroCache | None) -> Tensor | None:
        """[B, T] bool of the new positions; None where none is padding."""
        if mask is None:
            return None
        before = 0 if cache is None else cache.get_seq_length()
        if mask.shape != (len(tokens), before + tokens.shape[1]):
            raise UserError(
                f"attention_mask is {list(mask.shape)}; it is [B, P + T] = {[len(tokens), before + tokens.shape[1]]}"
            )
        return mask[:, before:].bool().to(tokens.device)

    def _check_length(self, num_positions: int) -> None:
        if num_positions > self.config.max_position_embeddings:
            raise UserError(
                f"a text has {num_positions} positions, max_position_embeddings is "
                f"{self.config.max_position_embeddings}; give a shorter one, or generate fewer tokens"
            )

    def _ask(self, retriever: Retrieves, chunks_nxC: Tensor) -> tuple[Tensor, Tensor]:
        tokens, lengths = retriever(chunks_nxC)
        width = 2 * self.config.retro_chunk_length
        if tokens.dim() != 3 or tokens.shape != (*lengths.shape, width) or len(tokens) != len(chunks_nxC):
            raise UserError(
                f"the retriever returned {list(tokens.shape)} and {list(lengths.shape)} for {len(chunks_nxC)} chunks; "
                f"it returns tokens [n, K, R], R = 2C = {width}, and their numbers [n, K]"
            )
        return tokens.to(chunks_nxC.device), lengths.to(chunks_nxC.device)

    def _retrieved(
        self, retriever: Retrieves, chunks_BxLxC: Tensor, complete_BxL: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        if not bool(complete_BxL.any()):
            return None
        found, lengths = self._ask(retriever, chunks_BxLxC[complete_BxL])
        shape = (*complete_BxL.shape, *found.shape[1:])
        tokens_BxLxKxR = found.new_zeros(shape)
        lengths_BxLxK = lengths.new_zeros(shape[:-1])
        tokens_BxLxKxR[complete_BxL], lengths_BxLxK[complete_BxL] = found, lengths
        return tokens_BxLxKxR, lengths_BxLxK

    # -------------------------------------------------------------------------------------------- generation

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        near, lengths = kwargs.get("neighbor_input_ids"), kwargs.get("neighbor_lengths")
        if near is not None and not kwargs.get("is_first_iteration"):  # they were the prompt's
            if kwargs.get("past_key_values") is not None:
                near = lengths = None
            else:
                more = input_ids.shape[1] // self.config.retro_chunk_length - near.shape[1]
                lengths = F.pad(_full_lengths(near) if lengths is None else lengths, (0, 0, 0, more))
                near = F.pad(near, (0, 0, 0, 0, 0, more))
            kwargs.update(neighbor_input_ids=near, neighbor_lengths=lengths)
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _prepare_model_inputs(self, inputs: Any, bos_token_id: Any, model_kwargs: Any) -> Any:
        prepared = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)  # type: ignore[misc]
        mask = prepared[2].get("attention_mask")
        if not prepared[0].shape[1] or (mask is not None and not bool(mask.any(-1).all())):
            raise UserError("a text is empty; give at least one token to go on from")
        return prepared

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict, *args: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation is {generation_config.cache_implementation!r}; RetroForCausalLM has a cache of "
                "its own, leave it out"
            )
        if generation_config.prefill_chunk_size and model_kwargs.get("neighbor_input_ids") is not None:
            raise UserError(
                f"prefill_chunk_size {generation_config.prefill_chunk_size} cuts the prompt that neighbor_input_ids is "
                "for; leave one out, or give a retriever"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RetroCache()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]

    def _validate_generated_length(self, generation_config: Any, input_ids_length: int, *args: Any) -> None:
        if generation_config.max_length - 1 > self.config.max_position_embeddings:  # the last token is not read
            raise UserError(
                f"{input_ids_length} tokens and those to generate are {generation_config.max_length}, "
                f"max_position_embeddings is {self.config.max_position_embeddings}; shorten the prompt, or "
                "max_new_tokens"
            )
        super()._validate_generated_length(generation_config, input_ids_length, *args)  # type: ignore[misc]


def _full_lengths(neighbor_ids: Tensor) -> Tensor:
    """Of neighbors that have all their tokens: [B, L, K, R] -> [B, L, K]."""
    return torch.full(neighbor_ids.shape[:-1], neighbor_ids.shape[-1], device=neighbor_ids.device)


def _of_chunks(
    tokens_BxLxKxR: Tensor,
    lengths_BxLxK: Tensor,
    num_chunks: int,
    first_B: Tensor | None,
    num_positions: int,
    chunk_length: int,
    *,
    hides_padding: bool,
) -> Neighbors | None:
    """Those of `num_chunks` chunks of which each text may have some complete; None where none has a neighbor."""
    missing = num_chunks - tokens_BxLxKxR.shape[1]
    tokens = F.pad(tokens_BxLxKxR, (0, 0, 0, 0, 0, missing))
    lengths = F.pad(lengths_BxLxK, (0, 0, 0, missing))
    if first_B is not None:
        complete_B = (num_positions - first_B) // chunk_length
        lengths = lengths * (torch.arange(num_chunks, device=lengths.device) < complete_B[:, None])[..., None]
    has_any = (lengths > 0).any(-1).flatten()
    if not bool(has_any.any()):
        return None
    chunks_M = None if bool(has_any.all()) else torch.nonzero(has_any).flatten()
    return Neighbors.of(tokens, lengths, chunks_M, hides_padding=hides_padding)
