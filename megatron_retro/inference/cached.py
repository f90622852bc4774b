"""The model token by token: what it has computed is kept, so a new token costs one position.

Kept are keys and values of self-attention; of chunked cross-attention the keys and values of each sample's last
complete chunk; and, for the encoder, the first RETRO layer's states of the chunk that is not complete yet. Positions
are those of training: every sample begins at position 0, and its chunks lie on the same grid.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_retro import mcore
from megatron_retro.model.attention import ChunkedCrossAttention, Pattern, attend, rotate
from megatron_retro.model.layer import Layer
from megatron_retro.model.model import RetroModel
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.model.packing import boundary_rows, pack, unpack

_ROOM = 256  # positions that a cache begins with, behind a prompt


@dataclasses.dataclass
class Arrivals:
    """Neighbors of chunks that have just become complete.

    Attributes:
        samples: [n] int64, the samples whose last chunk it is.
        tokens_nxKxR: int64.
        lengths_nxK: int64, 0 for no neighbor.
    """

    samples: Tensor
    tokens_nxKxR: Tensor
    lengths_nxK: Tensor


@dataclasses.dataclass
class _Read:
    """What one RETRO layer reads: [R·K, B, G, E] each."""

    keys: Tensor
    values: Tensor


class CachedModel:
    """A model whose samples grow together, at any tensor- and pipeline-parallel layout; sequence parallelism is off.

    Every rank calls every method. Results are on the last pipeline stage; None before it.

    Args:
        model: not wrapped, in evaluation mode.
        num_samples: B.
        max_length: positions that any sample may reach.
        num_neighbors: K; 0 turns retrieval off.
    """

    def __init__(self, model: RetroModel, num_samples: int, max_length: int, num_neighbors: int):
        assert not model.config.sequence_parallel and not model.training
        self._model, self._decoder, self._device = model, model.decoder, mcore.device()
        self._num_neighbors = num_neighbors if model.retrieved_shape else 0
        self._chunk_length = self._decoder.retrieved_length // 2
        self.length = torch.zeros(num_samples, dtype=torch.int64, device=self._device)
        self._max_length = max_length
        self._keys: dict[int, Tensor] = {}  # layer -> [room, B, G, E]; the room grows with the samples
        self._values: dict[int, Tensor] = {}
        self._read: dict[int, _Read] = {}  # RETRO layer -> what it reads now
        self._key_mask = self._readable = self._chunk_states = torch.empty(0)
        if self._num_neighbors:
            width = self._num_neighbors * self._decoder.retrieved_length
            self._key_mask = torch.ones(num_samples, 1, 1, width, dtype=torch.bool, device=self._device)
            self._readable = torch.zeros(num_samples, dtype=torch.bool, device=self._device)

    # -------------------------------------------------------------------------------------------- the prompt

    @torch.inference_mode()
    def begin(
        self, tokens_BxT: Tensor, lengths: Tensor, neighbor_tokens_BxLxKxR: Tensor | None, lengths_BxLxK: Tensor | None
    ) -> Tensor | None:
        """Read all prompts at once.

        Args:
            tokens_BxT: int64, filled up to whole chunks, T = L·C.
            lengths: [B] int64 of the prompts, at least 1.
            neighbor_tokens_BxLxKxR: int64, of the complete chunks; None with retrieval off.
            lengths_BxLxK: int64, 0 for no neighbor and for chunks that are not complete.

        Returns:
            logits [B, V] behind each prompt.
        """
        num_samples, width = tokens_BxT.shape
        neighbors = None
        if self._num_neighbors:
            assert neighbor_tokens_BxLxKxR is not None and lengths_BxLxK is not None
            neighbors = self._model.neighbors(neighbor_tokens_BxLxKxR, lengths_BxLxK)
        self.length = lengths.clone()
        last = (lengths - 1)[None, :, None]

        def forward(received: Tensor | None) -> Tensor:
            x_TxBxD, encoded = self._enter(tokens_BxT, torch.arange(width, device=self._device), received, neighbors)
            with self._remembering(self._store_prompt), self._first_states() as states:
                x_TxBxD, encoded = self._decoder(
                    x_TxBxD, num_positions=width, neighbors=neighbors, encoded_RxKMxD=encoded
                )
            if neighbors is not None:
                if states:
                    self._keep_states(states[0])
                if encoded is not None:
                    self._keep_last_chunk(encoded, neighbors)
            if self._model.post_process:
                return self._logits(x_TxBxD.gather(0, last.expand(1, -1, x_TxBxD.shape[-1])))
            return self._leave(x_TxBxD, encoded, neighbors)

        return self._through_stages(forward, num_samples, width, neighbors)

    def _store_prompt(self, layer: Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for kept, new in ((self._keys, key), (self._values, value)):
            kept[layer.number] = _with_room(new[: self._max_length], min(len(new) + _ROOM, self._max_length))
        return key, value

    def _keep_states(self, states_TxBxD: Tensor) -> None:
        """The states of each sample's chunk that is not complete; what lies behind them is overwritten in time."""
        begin = self.length // self._chunk_length * self._chunk_length
        position = begin + torch.arange(self._chunk_length, device=self._device)[:, None]
        position = position.clamp(max=len(states_TxBxD) - 1)[..., None].expand(-1, -1, states_TxBxD.shape[-1])
        self._chunk_states = states_TxBxD.gather(0, position)

    def _keep_last_chunk(self, encoded_RxKMxD: Tensor, neighbors: Neighbors) -> None:
        num_samples, num_chunks = neighbors.num_samples, neighbors.num_chunks
        last = self.length // self._chunk_length - 1
        row = torch.arange(num_samples, device=self._device) * num_chunks + last.clamp(min=0)
        encoded = encoded_RxKMxD.unflatten(1, (self._num_neighbors, -1))[:, :, row].flatten(1, 2)
        for layer, reads in self._retro_layers():
            self._read[layer.number] = _Read(*reads.neighbor_keys_values(encoded, num_samples, self._angles()))
        self._key_mask = neighbors.key_mask[row].clone()
        self._readable = neighbors.readable_M[row] & (last >= 0)

    # -------------------------------------------------------------------------------------------- one more token

    @torch.inference_mode()
    def step(self, tokens: Tensor, arrivals: Arrivals | None) -> Tensor | None:
        """Append a token to each sample.

        Args:
            tokens: [B] int64.
            arrivals: of the samples whose chunk this token completes; None if there are none.

        Returns:
            logits [B, V] behind it.
        """
        position, num_samples = self.length, len(tokens)
        neighbors = None
        if arrivals is not None and self._num_neighbors:
            neighbors = self._model.neighbors(arrivals.tokens_nxKxR[:, None], arrivals.lengths_nxK[:, None])
        seen = int(position.max()) + 1
        mask = (torch.arange(seen, device=self._device) <= position[:, None])[:, None, None]
        if neighbors is not None:
            assert arrivals is not None
            self._key_mask[arrivals.samples] = neighbors.key_mask
            self._readable[arrivals.samples] = neighbors.readable_M

        def forward(received: Tensor | None) -> Tensor:
            x_1xBxD, encoded = self._enter(tokens[:, None], position[:, None], received, neighbors)
            angles = self._decoder.angles(seen)[position].transpose(0, 1) if self._decoder.rotary else None
            with self._remembering(functools.partial(self._append, position, seen)):
                for layer in self._decoder.layers:
                    x_1xBxD = layer.attend(x_1xBxD, Pattern(angles, mask))
                    if self._num_neighbors and layer.cross_attention is not None:
                        x_1xBxD, encoded = self._read_neighbors(layer, x_1xBxD, encoded, arrivals, neighbors)
                    x_1xBxD = layer.feed_forward(x_1xBxD)
            if self._decoder.final_layernorm is not None:
                return self._logits(self._decoder.final_layernorm(x_1xBxD))
            return self._leave(x_1xBxD, encoded, neighbors)

        logits = self._through_stages(forward, num_samples, 1, neighbors)
        self.length = self.length + 1
        return logits

    def _append(self, position: Tensor, seen: int, layer: Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        sample = torch.arange(len(position), device=self._device)
        for kept, new in ((self._keys, key), (self._values, value)):
            if seen > (room := len(kept[layer.number])):
                kept[layer.number] = _with_room(kept[layer.number], min(2 * room, self._max_length))
            kept[layer.number][position, sample] = new[0]
        return self._keys[layer.number][:seen], self._values[layer.number][:seen]

    def _read_neighbors(
        self,
        layer: Layer,
        x_1xBxD: Tensor,
        encoded: Tensor | None,
        arrivals: Arrivals | None,
        neighbors: Neighbors | None,
    ) -> tuple[Tensor, Tensor | None]:
        reads, position = layer.cross_attention, self.length
        assert isinstance(reads, ChunkedCrossAttention) and layer.pre_cross_attn_layernorm is not None
        normed_1xBxD = layer.pre_cross_attn_layernorm(x_1xBxD)
        if layer.number == self._decoder.first_retro_layer:
            sample = torch.arange(len(position), device=self._device)
            self._chunk_states[position % self._chunk_length, sample] = normed_1xBxD[0]
            if neighbors is not None:
                assert arrivals is not None and self._decoder.encoder is not None
                encoded = self._decoder.encoder(neighbors, self._chunk_states[:, arrivals.samples])
        if neighbors is not None:
            assert arrivals is not None and encoded is not None
            keys, values = reads.neighbor_keys_values(encoded, len(arrivals.samples), self._angles())
            self._read[layer.number].keys[:, arrivals.samples] = keys
            self._read[layer.number].values[:, arrivals.samples] = values
        read, angles = self._read[layer.number], self._angles()
        queries = rotate(reads.queries(normed_1xBxD), reads.query_angles(position, angles).transpose(0, 1))
        out = attend(queries, read.keys, read.values, mask=self._key_mask) * self._readable[:, None, None]
        out_1xBxD, bias = reads.linear_proj(out.flatten(2))
        if bias is not None:
            out_1xBxD = out_1xBxD + bias * self._readable[:, None]
        return x_1xBxD + out_1xBxD, encoded

    def keep(self, samples: Tensor) -> None:
        """Go on with these samples [n] int64 only."""
        self.length = self.length[samples]
        for kept in (self._keys, self._values):
            for number in kept:
                kept[number] = kept[number][:, samples]
        for number, read in self._read.items():
            self._read[number] = _Read(read.keys[:, samples], read.values[:, samples])
        if self._num_neighbors:
            self._key_mask, self._readable = self._key_mask[samples], self._readable[samples]
            if self._chunk_states.numel():
                self._chunk_states = self._chunk_states[:, samples]

    @torch.inference_mode()
    def join(self, other: "CachedModel") -> None:
        """Go on with the samples of `other` as well, behind these; made alike, and not used any more."""
        self.length = torch.cat([self.length, other.length])
        for kept, more in ((self._keys, other._keys), (self._values, other._values)):
            for number in kept:
                room = max(len(kept[number]), len(more[number]))
                kept[number] = torch.cat([_with_room(both[number], room) for both in (kept, more)], 1)
        for number, read in self._read.items():
            new = other._read[number]
            self._read[number] = _Read(torch.cat([read.keys, new.keys], 1), torch.cat([read.values, new.values], 1))
        if self._num_neighbors:
            self._key_mask = torch.cat([self._key_mask, other._key_mask])
            self._readable = torch.cat([self._readable, other._readable])
            if self._chunk_states.numel():
                self._chunk_states = torch.cat([self._chunk_states, other._chunk_states], 1)

    # -------------------------------------------------------------------------------------------- stages

    def _enter(
        self, tokens_BxT: Tensor, positions: Tensor, received: Tensor | None, neighbors: Neighbors | None
    ) -> tuple[Tensor, Tensor | None]:
        """This stage's input: (hidden states [T, B, D], the encoder's output or None)."""
        if self._model.pre_process:
            return self._model.embedding(tokens_BxT, positions.expand_as(tokens_BxT)), None
        assert received is not None
        return unpack(received, tokens_BxT.shape[1], self._model.encoded_shape(neighbors))

    def _leave(self, x_TxBxD: Tensor, encoded: Tensor | None, neighbors: Neighbors | None) -> Tensor:
        return pack(x_TxBxD, encoded, self._encoded_rows(neighbors, x_TxBxD.shape[1]))

    def _encoded_rows(self, neighbors: Neighbors | None, num_samples: int) -> int:
        shape = self._model.encoded_shape(neighbors)
        return boundary_rows(shape, num_samples, self._model.config.hidden_size) if shape else 0

    def _logits(self, x_1xBxD: Tensor) -> Tensor:
        logits, _ = self._model.output_layer(x_1xBxD, weight=self._model.output_weight())
        return mcore.gather_vocabulary(logits)[0]

    def _through_stages(
        self, forward: Any, num_samples: int, num_positions: int, neighbors: Neighbors | None
    ) -> Tensor | None:
        """Run `forward` on every pipeline stage in turn."""

        def forward_step(_: Iterator, model: RetroModel) -> tuple[Tensor, Any]:
            output = forward(model.input_tensor)
            return output, lambda logits: (logits.sum() * 0, torch.ones((), dtype=torch.int32), {"logits": logits})

        reports = mcore.run_pipeline(
            forward_step,
            iter([None]),
            self._model,
            num_microbatches=1,
            seq_length=num_positions + self._encoded_rows(neighbors, num_samples),
            micro_batch_size=num_samples,
            forward_only=True,
        )
        return reports[0]["logits"] if reports else None

    # -------------------------------------------------------------------------------------------- layers

    def _retro_layers(self) -> Iterator[tuple[Layer, ChunkedCrossAttention]]:
        for layer in self._decoder.layers:
            if isinstance(layer.cross_attention, ChunkedCrossAttention):
                yield layer, layer.cross_attention

    @contextlib.contextmanager
    def _remembering(self, remember: Callable[[Layer, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Let the self-attentions of this stage hand new keys and values to `remember`, and take what it returns."""
        kernels = {layer: layer.self_attention.core_attention for layer in self._decoder.layers}
        for layer, kernel in kernels.items():
            kernel.remember = functools.partial(remember, layer)
        try:
            yield
        finally:
            for kernel in kernels.values():
                kernel.remember = None

    @contextlib.contextmanager
    def _first_states(self) -> Iterator[list[Tensor]]:
        """What the encoder is given: a list that holds it when the decoder has run, on the stage with the encoder."""
        states: list[Tensor] = []
        if self._decoder.encoder is None:
            yield states
            return
        first = next(layer for layer in self._decoder.layers if layer.number == self._decoder.first_retro_layer)
        assert first.pre_cross_attn_layernorm is not None
        handle = first.pre_cross_attn_layernorm.register_forward_hook(lambda *call: states.append(call[-1]))
        try:
            yield states
        finally:
            handle.remove()

    def _angles(self) -> Tensor:
        return self._decoder.reading_angles()


def _with_room(x_TxBx: Tensor, room: int) -> Tensor:
    """[T, B, …] -> [room, B, …] with zeros behind."""
    grown = x_TxBx.new_zeros(room, *x_TxBx.shape[1:])
    grown[: len(x_TxBx)] = x_TxBx
    return grown
