"""The chunks that were evaluated: what each cost, how many bytes it has, and its document.

Slots are those of `SampleLosses`: the tokens of a sample by the chunk in which they stand. A chunk whose first token
stands behind one sample and the rest in another has two slots; here they are one.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from megatron_retro import distributed
from megatron_retro.data.samples import Samples

Decode = Callable[[list[list[int]]], list[str]]


@dataclasses.dataclass
class EvaluatedChunks:
    """Chunks with predicted tokens, ascending by id; n of them.

    Attributes:
        ids: [n] int64.
        documents: [n] int64, their documents.
        tokens: [n] int64, predicted tokens.
        bytes: [n] int64, UTF-8 bytes of those.
        rows: [num_samples, L + 1] int64, the chunk of each slot as a row of the above; -1 for a slot without tokens.
    """

    ids: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, samples: Samples, tokens: np.ndarray, decode: Decode) -> "EvaluatedChunks":
        """Of the first samples, as many as `tokens` (`SampleLosses.tokens`) has rows; every rank calls it."""
        slots, has_tokens = slot_chunks(samples, len(tokens)), tokens > 0
        ids, of_slot = np.unique(slots[has_tokens], return_inverse=True)
        rows = np.full(slots.shape, -1)
        rows[has_tokens] = of_slot
        num_bytes = by_ranks(len(tokens), functools.partial(_slot_bytes, samples, decode))
        made = cls(ids, samples.table.document(ids), np.zeros(0), np.zeros(0), rows)
        made.tokens, made.bytes = (made.sum(counts).astype(np.int64) for counts in (tokens, num_bytes))
        return made

    def sum(self, by_slot: np.ndarray) -> np.ndarray:
        """[num_samples, L + 1] figures of slots -> [n] float64 sums by chunk."""
        here = self.rows >= 0
        return np.bincount(self.rows[here], weights=by_slot[here], minlength=len(self.ids))

    def largest(self, by_slot: np.ndarray) -> np.ndarray:
        """[num_samples, L + 1] int64 figures of slots, at least 0 -> [n] int64, the largest by chunk."""
        here, largest = self.rows >= 0, np.zeros(len(self.ids), np.int64)
        np.maximum.at(largest, self.rows[here], by_slot[here])
        return largest


def slot_chunks(samples: Samples, num_samples: int) -> np.ndarray:
    """[num_samples, L + 1] int64: the chunks of each sample, and the one that follows it in its document, or -1."""
    chunks = np.stack([samples.chunks(sample) for sample in range(num_samples)])
    last = chunks[:, -1]
    ends = (last < 0) | samples.table.is_last(np.maximum(last, 0))
    return np.concatenate([chunks, np.where(ends, -1, last + 1)[:, None]], axis=1)


def _slot_bytes(samples: Samples, decode: Decode, numbers: np.ndarray) -> np.ndarray:
    """[n, L + 1] int64: UTF-8 bytes of the predicted tokens in each slot of samples [n].

    A slot has the bytes by which it makes the text of the sample's predicted tokens longer, so they add up to all.
    """
    length, num_slots = samples.table.chunk_length, samples.chunks_a_sample + 1
    sizes = np.zeros((len(numbers), num_slots + 1), np.int64)
    for row, sample in enumerate(numbers):
        batch = samples.batch(np.array([sample]), "off")
        predicted = batch.loss_mask_BxS[0].numpy() > 0
        tokens = batch.labels_BxS[0].numpy()[predicted].tolist()
        slot = ((np.arange(len(predicted)) + 1) // length)[predicted]
        ends = np.searchsorted(slot, np.arange(num_slots), side="right")
        texts = decode([tokens[:end] for end in ends])
        # A character that a slot's end cuts counts where it is completed.
        whole = [text.rstrip("\ufffd") if end < len(tokens) else text for text, end in zip(texts, ends, strict=True)]
        sizes[row, 1:] = [len(text.encode("utf-8", errors="replace")) for text in whole]
    return np.diff(sizes, axis=1)


def by_ranks(total: int, work: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows 0 … total-1 of an array, a part made by each rank; `work` takes row numbers [n] and must not communicate."""
    mine = np.array_split(np.arange(total), distributed.world_size())[distributed.rank()]
    return np.concatenate(distributed.all_gather(distributed.together(lambda: work(mine))))
