"""Samples: L consecutive chunks of the shuffled document stream, with labels and neighbors.

Sample n is a function of (seed, n) alone: not of batch size, ranks, or what was read before. Within an epoch the
documents of a split are shuffled and laid end to end; every L chunks of that stream are a sample; the samples are
shuffled again. Corpora are interleaved by weight, each with epochs of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_retro.data.chunks import ChunkTable, Stream
from megatron_retro.data.overlap import longest_common_run
from megatron_retro.errors import UserError

# Streams of random numbers that never meet: default_rng((seed, stream, …)).
_DOCUMENT_STREAM, _SAMPLE_STREAM, _NEIGHBOR_STREAM = range(3)

_HASH_BASE = 6_364_136_223_846_793_005  # of a polynomial modulo 2^64 that stands for a row of tokens


class NeighborSource(Protocol):
    """What samples need of a neighbor table.

    Attributes:
        num_neighbors: K_saved.
    """

    num_neighbors: int

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        """[n] int64 chunk ids → [n, K_saved] int64 neighbor ids, nearest first, -1 for none."""


@dataclasses.dataclass
class Batch:
    """Samples as the model takes them.

    Attributes:
        tokens_BxS: int64.
        labels_BxS: int64, the next token of the same document.
        loss_mask_BxS: float32, 1 where a label exists.
        order_BxS: int64, the positions of each sample, those with text before those with padding; None where there is
            no padding.
        neighbor_tokens_BxLxKxR: int64, or None with retrieval off.
        neighbor_lengths_BxLxK: int64, 0 for no neighbor, or None.
        neighbor_chunks_M: int64, which of the B·L chunks have neighbors, at least one; None where all have, or with
            retrieval off.
        sample_ids: [B] int64, -1 for an empty sample that fills up a batch.
        examples_BxS: int64, ascending, which example of its sample a position belongs to: they do not see each other;
            None where each sample is one.
    """

    tokens_BxS: Tensor
    labels_BxS: Tensor
    loss_mask_BxS: Tensor
    order_BxS: Tensor | None
    neighbor_tokens_BxLxKxR: Tensor | None
    neighbor_lengths_BxLxK: Tensor | None
    neighbor_chunks_M: Tensor | None
    sample_ids: np.ndarray
    examples_BxS: Tensor | None = None

    @property
    def reading(self) -> float:
        """Share of the chunks that have neighbors."""
        if self.neighbor_lengths_BxLxK is None:
            return 0.0
        if self.neighbor_chunks_M is None:
            return 1.0
        return len(self.neighbor_chunks_M) / self.neighbor_lengths_BxLxK[..., 0].numel()

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copied to where a GPU can fetch it while the host goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: Any = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)


class CorpusSamples:
    """The endless sample order of one corpus's split.

    Args:
        documents: ids of the split's documents in this corpus.
        number: of the corpus, to give each its own random stream.
        keep_rest: keep the last chunks of an epoch that do not fill a sample, padded (evaluation).
    """

    def __init__(
        self, table: ChunkTable, documents: np.ndarray, *, chunks_a_sample: int, seed: int, number: int, keep_rest: bool
    ):
        self._table, self._documents, self._chunks_a_sample = table, documents, chunks_a_sample
        self._seed, self._number = seed, number
        num_chunks = int((table.first_chunk[documents + 1] - table.first_chunk[documents]).sum())
        self.num_samples = (-(-num_chunks // chunks_a_sample)) if keep_rest else num_chunks // chunks_a_sample
        self._epoch, self._stream, self._order = -1, Stream(table, documents), np.arange(0)

    def chunks(self, index: int) -> np.ndarray:
        """Chunk ids [L] of the index-th sample from the beginning of training."""
        epoch, position = divmod(index, self.num_samples)
        if epoch != self._epoch:
            self._start(epoch)
        begin = self._order[position] * self._chunks_a_sample
        return self._stream.chunks(begin + np.arange(self._chunks_a_sample))

    def _start(self, epoch: int) -> None:
        key = (self._seed, self._number, epoch)
        documents = np.random.default_rng((*key, _DOCUMENT_STREAM)).permutation(self._documents)
        self._stream = Stream(self._table, documents)
        self._order = np.random.default_rng((*key, _SAMPLE_STREAM)).permutation(self.num_samples)
        self._epoch = epoch


class Samples:
    """Sample n of a split, for every n from 0 on.

    Args:
        table: the work dir's chunks.
        split: "train", "valid" or "test".
        split_weights: share of each split, as the work dir was built.
        corpus_weights: name -> sampling weight of the corpora to use; None takes all, by size.
        chunks_a_sample: L.
        seed: of the order.
        pad: token id that fills up short chunks.
        num_samples: how many will be asked for (the interleaving of several corpora is laid out in advance).
            None means one epoch.
        keep_rest: see `CorpusSamples`.
        neighbors: the neighbor table; None turns retrieval off.
        num_neighbors: K.
        retrieval_dropout: share of samples whose neighbors are hidden.
        random_neighbor_prob: share of samples whose neighbors are random chunks of the database.
        max_overlap: neighbors whose longest common run with the chunk is over this share of C tokens are not read.

    Raises:
        UserError: the split holds no sample.
    """

    def __init__(
        self,
        table: ChunkTable,
        *,
        split: str,
        split_weights: tuple[float, ...],
        corpus_weights: dict[str, float] | None,
        chunks_a_sample: int,
        seed: int,
        pad: int,
        num_samples: int | None = None,
        keep_rest: bool = False,
        neighbors: NeighborSource | None = None,
        num_neighbors: int = 2,
        retrieval_dropout: float = 0.0,
        random_neighbor_prob: float = 0.0,
        max_overlap: float = 1.0,
    ):
        self.table, self._neighbors, self._pad, self._seed = table, neighbors, pad, seed
        self._num_neighbors = num_neighbors
        self._dropout, self._random = retrieval_dropout, random_neighbor_prob
        self._max_run = max_overlap * table.chunk_length
        self.chunks_a_sample = chunks_a_sample
        self._database = Stream(table, table.database_documents(split_weights))
        self._corpora, weights = [], []
        for number, documents in enumerate(_by_corpus(table, table.documents_in(split, split_weights))):
            name = table.corpora[number].name
            if corpus_weights is not None and name not in corpus_weights:
                continue
            corpus = CorpusSamples(
                table, documents, chunks_a_sample=chunks_a_sample, seed=seed, number=number, keep_rest=keep_rest
            )
            if corpus.num_samples:
                self._corpora.append(corpus)
                weights.append((corpus_weights or {}).get(name) or corpus.num_samples)
        self.epoch_size = sum(corpus.num_samples for corpus in self._corpora)
        if not self.epoch_size:
            raise UserError(
                f"the {split} split holds less than one sample of {chunks_a_sample} chunks; "
                "use a larger corpus, another --split when building the work dir, or a smaller --seq-length"
            )
        self._corpus_of, self._index_of = interleave(weights, num_samples or self.epoch_size)

    def __len__(self) -> int:
        return len(self._corpus_of)

    def chunks(self, sample: int) -> np.ndarray:
        """Chunk ids [L] of a sample; -1 where there is none."""
        if sample < 0:
            return np.full(self.chunks_a_sample, -1)
        return self._corpora[self._corpus_of[sample]].chunks(int(self._index_of[sample]))

    def batch(self, sample_ids: np.ndarray, retrieval: str = "on") -> Batch:
        """Read samples.

        Args:
            sample_ids: [B] int64; -1 gives an empty sample without labels.
            retrieval: "on", "off", or "random" (every neighbor replaced by a random chunk of the database).
        """
        chunks_BxL = np.stack([self.chunks(int(sample)) for sample in sample_ids])
        batch = self._text(chunks_BxL, sample_ids)
        if self._neighbors is None or retrieval == "off":
            return batch
        ids_BxLxK = self._choose(chunks_BxL, sample_ids, retrieval)
        tokens, lengths = self.table.tokens(ids_BxLxK.reshape(-1), 2 * self.table.chunk_length, self._pad)
        return dataclasses.replace(
            batch,
            neighbor_tokens_BxLxKxR=torch.from_numpy(tokens).view(*ids_BxLxK.shape, -1),
            neighbor_lengths_BxLxK=torch.from_numpy(lengths).view(ids_BxLxK.shape),
            neighbor_chunks_M=chunks_that_read(ids_BxLxK),
        )

    def described(self, sample_ids: np.ndarray) -> list[dict[str, Any]]:
        """What samples are made of: ids of their "chunks" [L] and "neighbors" [L, K], None with retrieval off."""
        chunks_BxL = np.stack([self.chunks(int(sample)) for sample in sample_ids])
        neighbors = [None] * len(sample_ids)
        if self._neighbors is not None:
            neighbors = self._choose(chunks_BxL, sample_ids, "on").tolist()
        return [
            {"chunks": chunks, "neighbors": ids} for chunks, ids in zip(chunks_BxL.tolist(), neighbors, strict=True)
        ]

    def _text(self, chunks_BxL: np.ndarray, sample_ids: np.ndarray) -> Batch:
        chunk_length, num_samples = self.table.chunk_length, len(chunks_BxL)
        tokens, lengths = self.table.tokens(chunks_BxL.reshape(-1), chunk_length + 1, self._pad)
        offset = np.arange(chunk_length)
        valid_BxS = (offset < lengths[:, None]).reshape(num_samples, -1)
        labeled_BxS = (offset + 1 < lengths[:, None]).reshape(num_samples, -1)
        return Batch(
            tokens_BxS=torch.from_numpy(tokens[:, :-1].reshape(num_samples, -1)),
            labels_BxS=torch.from_numpy(tokens[:, 1:].reshape(num_samples, -1)),
            loss_mask_BxS=torch.from_numpy(labeled_BxS.astype(np.float32)),
            order_BxS=None if valid_BxS.all() else text_first(torch.from_numpy(valid_BxS)),
            neighbor_tokens_BxLxKxR=None,
            neighbor_lengths_BxLxK=None,
            neighbor_chunks_M=None,
            sample_ids=sample_ids,
        )

    def _choose(self, chunks_BxL: np.ndarray, sample_ids: np.ndarray, retrieval: str) -> np.ndarray:
        """Neighbor ids [B, L, K] of samples, -1 for none, after training's retrieval dropout."""
        ids_BxLxK = np.full((*chunks_BxL.shape, self._num_neighbors), -1)
        draws = [np.random.default_rng((self._seed, max(int(sample), 0), _NEIGHBOR_STREAM)) for sample in sample_ids]
        share_B = np.array([draw.random() for draw in draws])
        shown = np.flatnonzero(share_B >= self._dropout)
        ids_BxLxK[shown] = self._foreign(chunks_BxL[shown])
        for row in shown:
            if retrieval == "random" or share_B[row] < self._dropout + self._random:
                ids_BxLxK[row] = self._randomized(ids_BxLxK[row], chunks_BxL[row], draws[row])
        return ids_BxLxK

    def _foreign(self, chunks: np.ndarray) -> np.ndarray:
        """The K nearest neighbors [..., L, K] that samples [..., L] may read.

        None from any document of the sample, not just from the chunk's own: a later document of the sample could
        otherwise read its own text through an earlier one. None for the last chunk of a document: only the next
        document's first tokens would read them. None with the text of a nearer one: it would say the same again.
        """
        assert self._neighbors is not None
        known = np.maximum(chunks, 0)
        saved = self._neighbors.ids(known.reshape(-1))
        ids = np.where(chunks[..., None] < 0, -1, saved.reshape(*chunks.shape, saved.shape[1]))
        own_document = np.where(chunks < 0, -1, self.table.document(known))
        documents = self.table.document(np.maximum(ids, 0))
        own = (documents[..., None] == own_document[..., None, None, :]).any(-1)
        dropped = (ids < 0) | own | self.table.is_last(known)[..., None]
        ids = np.where(dropped, -1, ids)
        dropped |= self._repeated_or_copied(chunks.reshape(-1), ids.reshape(-1, ids.shape[-1])).reshape(ids.shape)
        nearest = np.argsort(dropped, axis=-1, kind="stable")[..., : self._num_neighbors]
        return np.take_along_axis(np.where(dropped, -1, ids), nearest, axis=-1)

    def _repeated_or_copied(self, chunks: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Which neighbors [n, K_saved] of chunks [n] have the text of a nearer one, or too long a run of it."""
        length = self.table.chunk_length
        rows, lengths = self.table.tokens(ids.reshape(-1), length, self._pad)
        repeated = repeats(rows.reshape(*ids.shape, length), ids >= 0)
        if self._max_run >= length:
            return repeated
        own, own_lengths = (np.repeat(part, ids.shape[1], 0) for part in self.table.tokens(chunks, length, self._pad))
        run, _, _ = longest_common_run(own, rows, own_lengths, lengths)
        return repeated | (run.reshape(ids.shape) > self._max_run)

    def _randomized(self, ids: np.ndarray, chunks: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Each neighbor [L, K] replaced by a random chunk of the database, not from the sample's documents."""
        if not (ids >= 0).any():
            return ids
        chosen = self._database.chunks(draw.integers(len(self._database), size=ids.shape))
        own = np.isin(self.table.document(chosen), self.table.document(chunks[chunks >= 0]))
        return np.where((ids < 0) | own, -1, chosen)


def repeats(tokens: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Which neighbors say again what a nearer one of the same chunk said.

    Args:
        tokens: [n, K, C] of the neighbors, nearest first, short ones filled up.
        present: [n, K] bool; one that is missing repeats nothing and is repeated by none.
    """
    powers = np.cumprod(np.full(tokens.shape[2], _HASH_BASE, np.uint64))
    text = (tokens.astype(np.uint64) * powers).sum(2)
    return np.tril((text[:, :, None] == text[:, None, :]) & present[:, None, :], -1).any(2)


def text_first(valid_BxS: Tensor) -> Tensor:
    """The positions of each sample [B, S] int64, those with text before those with padding, else as they were."""
    return torch.argsort(~valid_BxS, dim=1, stable=True)


def chunks_that_read(ids_BxLxK: np.ndarray) -> Tensor | None:
    """Which of the B·L chunks have a neighbor (int64, ascending), None if all; the first one if none has."""
    reads = (ids_BxLxK >= 0).any(-1).reshape(-1)
    reads[0] |= not reads.any()
    return None if reads.all() else torch.from_numpy(np.flatnonzero(reads))


def interleave(weights: list[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay several endless sequences into one, in proportion to their weights.

    Element j of sequence c stands at (j + ½) / w_c, so any prefix holds each to within one element of its share, and
    more samples never reorder the first ones.

    Returns:
        (sequence [num_samples] int16, element in it [num_samples] int64).
    """
    if len(weights) == 1:
        return np.zeros(num_samples, np.int16), np.arange(num_samples)
    share = np.asarray(weights, np.float64) / sum(weights)
    counts = np.ceil(share * num_samples).astype(np.int64) + 1
    sequence = np.repeat(np.arange(len(weights), dtype=np.int16), counts)
    element = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((sequence, (element + 0.5) / share[sequence]))[:num_samples]
    return sequence[order], element[order]


def _by_corpus(table: ChunkTable, documents: np.ndarray) -> list[np.ndarray]:
    """Ascending document ids, split by corpus."""
    return np.split(documents, np.searchsorted(documents, table.corpus_documents[1:-1]))
