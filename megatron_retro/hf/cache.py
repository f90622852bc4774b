"""What RetroForCausalLM keeps of a text, so that a new token costs one position.

Beside keys and values of self-attention: of chunked cross-attention the keys and values of each text's last complete
chunk; and of the last C positions the tokens, to look up when they make up a chunk, and the first RETRO layer's states,
for the encoder.

Letters as in `model/attention.py`; P positions so far.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from megatron_retro.errors import UserError
from megatron_retro.model.neighbors import Neighbors


@dataclasses.dataclass
class Reading:
    """What one RETRO layer reads: [B, R·K, G, E] each."""

    keys: Tensor
    values: Tensor


class RetroCache(DynamicCache):
    """Grows with the texts of a batch; beams may be put in another order, nothing can be taken back.

    Attributes:
        mask_BxP: bool, False where a position is padding.
        tokens_BxC: int64, of the last positions, at most C.
        states_BxCxD: what the encoder reads of the last positions, at most C.
        key_mask: [B, 1, 1, R·K] bool, True where cross-attention may look; None before anything was read.
        readable_B: bool, whether a text's last complete chunk has any neighbor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.mask_BxP: Tensor | None = None
        self.tokens_BxC: Tensor | None = None
        self.states_BxCxD: Tensor | None = None
        self.key_mask: Tensor | None = None
        self.readable_B: Tensor | None = None
        self._reading: dict[int, Reading] = {}

    @property
    def first_B(self) -> Tensor:
        """Where each text begins, behind its left padding."""
        assert self.mask_BxP is not None
        return first_true(self.mask_BxP)

    def see(self, tokens_BxT: Tensor, mask_BxT: Tensor, chunk_length: int) -> None:
        """Take note of new positions."""
        self.mask_BxP = _longer(self.mask_BxP, mask_BxT)
        self.tokens_BxC = _longer(self.tokens_BxC, tokens_BxT)[:, -chunk_length:]

    def keep_states(self, states_TxBxD: Tensor, chunk_length: int) -> None:
        """Take note of what the encoder reads of new positions."""
        self.states_BxCxD = _longer(self.states_BxCxD, states_TxBxD.transpose(0, 1))[:, -chunk_length:]

    # ------------------------------------------------------------------------------------------ what is read

    def show(self, samples: Tensor, key_mask: Tensor, readable: Tensor) -> None:
        """From now on some texts read other neighbors.

        Args:
            samples: [n] int64.
            key_mask: [n, 1, 1, R·K] bool.
            readable: [n] bool.
        """
        assert self.mask_BxP is not None
        num_samples, width = len(self.mask_BxP), key_mask.shape[-1]
        if self.key_mask is None:
            self.key_mask = key_mask.new_ones(num_samples, 1, 1, width)
            self.readable_B = readable.new_zeros(num_samples)
        if self.key_mask.shape[-1] != width:
            raise UserError(
                f"neighbors of a chunk have K x R = {width} tokens here, had {self.key_mask.shape[-1]} before in the "
                "same cache; give every chunk as many neighbors, with length 0 where there is none"
            )
        assert self.readable_B is not None
        self.key_mask = self.key_mask.index_copy(0, samples, key_mask)
        self.readable_B = self.readable_B.index_copy(0, samples, readable)

    def show_nothing(self, samples: Tensor) -> None:
        """From now on these texts read no neighbors."""
        if self.readable_B is not None:
            self.readable_B = self.readable_B.index_fill(0, samples, False)

    def read(self, layer: int, samples: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Keys and values [R·K, n, G, E] that a layer reads for these samples (None: all) from now on."""
        assert self.mask_BxP is not None
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        if samples is None:
            self._reading[layer] = Reading(keys, values)
            return
        if layer not in self._reading:
            nothing = keys.new_zeros(len(self.mask_BxP), *keys.shape[1:])
            self._reading[layer] = Reading(nothing, nothing)
        before = self._reading[layer]
        self._reading[layer] = Reading(
            before.keys.index_copy(0, samples, keys), before.values.index_copy(0, samples, values)
        )

    def reading(self, layer: int) -> Reading | None:
        return self._reading.get(layer)

    def show_last_chunks(self, neighbors: Neighbors, lengths_B: Tensor, chunk_length: int) -> Tensor:
        """`show` the neighbors of each text's last complete chunk; returns their rows [B] of the M chunks."""
        last_B = lengths_B // chunk_length - 1
        num_rows = neighbors.num_samples * neighbors.num_chunks
        rows = torch.full((num_rows,), -1, device=lengths_B.device)
        chunks_M = torch.arange(num_rows, device=rows.device) if neighbors.chunks_M is None else neighbors.chunks_M
        rows[chunks_M] = torch.arange(len(chunks_M), device=rows.device)
        samples = torch.arange(neighbors.num_samples, device=rows.device)
        row_B = rows[samples * neighbors.num_chunks + last_B.clamp(min=0)]
        is_here = (row_B >= 0) & (last_B >= 0)
        row_B = row_B.clamp(min=0)
        self.show(samples, neighbors.key_mask[row_B], neighbors.readable_M[row_B] & is_here)
        return row_B

    # ------------------------------------------------------------------------------------------ beams

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.mask_BxP is not None:
            samples = torch.arange(len(self.mask_BxP), device=self.mask_BxP.device)
            self._select(samples.repeat_interleave(repeats))

    def _select(self, samples: Tensor) -> None:
        for name in ("mask_BxP", "tokens_BxC", "states_BxCxD", "key_mask", "readable_B"):
            if (kept := getattr(self, name)) is not None:
                setattr(self, name, kept.index_select(0, samples.to(kept.device)))
        for layer, reading in self._reading.items():
            there = samples.to(reading.keys.device)
            self._reading[layer] = Reading(reading.keys.index_select(0, there), reading.values.index_select(0, there))

    def reset(self) -> None:
        super().reset()
        self._forget()

    @property
    def is_croppable(self) -> bool:
        return False  # what the chunk before the last one read is gone

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError("a RetroCache cannot be cropped; begin a new one")


def _longer(kept: Tensor | None, new: Tensor) -> Tensor:
    return new if kept is None else torch.cat([kept, new], 1)


def first_true(mask_BxP: Tensor) -> Tensor:
    """[B] int64, where each row has its first True; P where it has none."""
    return torch.where(mask_BxP.any(1), mask_BxP.int().argmax(1), mask_BxP.shape[1])
