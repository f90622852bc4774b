"""The database of another work dir, read by the text of this one.

The stored embeddings of the evaluated chunks (for words: their text) are searched for in the other index. No document
is left out: an evaluated document is not in the other database as a document, but copies of its text may be.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import torch

from megatron_retro import distributed
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.samples import Batch, Samples, repeats
from megatron_retro.errors import UserError
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.embedding import EmbeddingTable, chunk_texts
from megatron_retro.retrieval.query import OpenIndex, lexical_retriever
from megatron_retro.workdir import STAGES, WorkDir

_CHUNKS_AT_ONCE = 32_768  # queries that share one pass over the index


class OtherDatabase:
    """An opened database, ready to be searched for chunks of `work`.

    Attributes:
        table: the other work dir's chunks.
        num_neighbors: neighbors found for each chunk, as many as that work dir saves.
    """

    @classmethod
    def open(cls, path: str, work: WorkDir) -> "OtherDatabase":
        """Verify and open; every rank calls it.

        Args:
            path: the other work dir (`--also-db`).
            work: the work dir whose chunks are evaluated.

        Raises:
            UserError: there is none, it is not finished, or tokenizer, chunk length or embedder differ.
        """
        if not (pathlib.Path(path) / "manifest.json").exists():
            raise UserError(
                f"--also-db {path} holds no manifest.json; tools/preprocess_retro_data.py builds a work dir"
            )
        other = distributed.together(lambda: WorkDir(path))
        other.verify(STAGES)
        return distributed.together(lambda: cls(other, work))

    def __init__(self, other: WorkDir, work: WorkDir):
        _check_alike(work, other)
        index, self._kind = OpenIndex.open(other), other.settings["retro_retriever"]
        self._tokenizer, self._embeddings = open_tokenizer(work), EmbeddingTable(work)
        self._search = None if self._kind == "bm25" else index.search(index.database)
        self._words: Any = None if self._kind == "dense" else lexical_retriever(self._kind, index, None)
        self.table: ChunkTable = index.table
        self.num_neighbors: int = other.facts("neighbors")["num_neighbors"]

    def neighbors(self, table: ChunkTable, chunks: np.ndarray) -> np.ndarray:
        """The nearest chunks of this database.

        Args:
            table: of the evaluated text.
            chunks: [n] int64 ids in it.

        Returns:
            [n, num_neighbors] int64 ids in this database, best first, -1 for none.
        """
        found = [np.zeros((0, self.num_neighbors), np.int64)]
        for begin in range(0, len(chunks), _CHUNKS_AT_ONCE):
            found.append(self._neighbors(table, chunks[begin : begin + _CHUNKS_AT_ONCE]))
        return np.concatenate(found)

    def _neighbors(self, table: ChunkTable, chunks: np.ndarray) -> np.ndarray:
        k, texts = self.num_neighbors, chunk_texts(table, chunks, self._tokenizer) if self._words else []
        if self._search is None:
            return self._words.search(texts, k)[0]
        nobody = np.zeros((len(chunks), 2), np.int64)
        wanted = max(k, self._words.num_candidates) if self._words else k
        near, _ = self._search.search(self._embeddings.rows(chunks), nobody, wanted)
        return self._words.rank(texts, near, k)[0] if self._words else near


def _check_alike(work: WorkDir, other: WorkDir) -> None:
    embedder, others = work.facts("embeddings"), other.facts("embeddings")
    for what, ours, theirs in (
        ("tokenizer", *(each.manifest["stages"]["tokenizer"]["digest"] for each in (work, other))),
        ("chunk length", *(each.facts("chunks")["chunk_length"] for each in (work, other))),
        ("embedder", *(facts["weights"] or facts["embedder"] for facts in (embedder, others))),
    ):
        if ours != theirs:
            raise UserError(
                f"--also-db {other.path}: its {what} is {theirs}, that of --retro-work-dir {work.path} is {ours}; "
                f"build it with the same {what}"
            )


class OtherSamples:
    """The samples of a split with neighbors from another database, filtered as `Samples` filters its own.

    Args:
        samples: the text.
        database: where the neighbors are.
        chunks: [n] int64 ascending ids of the text.
        ids: [n, K_saved] int64, their neighbors in `database`.
        num_neighbors: K.
        pad: fills up short neighbors.
    """

    def __init__(
        self, samples: Samples, database: ChunkTable, chunks: np.ndarray, ids: np.ndarray, num_neighbors: int, pad: int
    ):
        self.table, self._samples, self._database = samples.table, samples, database
        self._chunks, self._ids, self._num_neighbors, self._pad = chunks, ids, num_neighbors, pad

    def batch(self, sample_ids: np.ndarray, retrieval: str = "on") -> Batch:
        batch = self._samples.batch(sample_ids, "off")
        if retrieval == "off":
            return batch
        chunks_BL = np.concatenate([self._samples.chunks(int(sample)) for sample in sample_ids])
        tokens, lengths = self._database.tokens(
            self._nearest(chunks_BL).reshape(-1), 2 * self._database.chunk_length, self._pad
        )
        shape = (len(sample_ids), self._samples.chunks_a_sample, self._num_neighbors)
        return dataclasses.replace(
            batch,
            neighbor_tokens_BxLxKxR=torch.from_numpy(tokens).view(*shape, -1),
            neighbor_lengths_BxLxK=torch.from_numpy(lengths).view(shape),
        )

    def _nearest(self, chunks: np.ndarray) -> np.ndarray:
        """[n, K] int64 ids to read for chunks [n], -1 for none."""
        real = np.maximum(chunks, 0)
        ids = self._ids[np.minimum(np.searchsorted(self._chunks, real), len(self._chunks) - 1)]
        ids = np.where(((chunks < 0) | self.table.is_last(real))[:, None], -1, ids)
        rows, _ = self._database.tokens(ids.reshape(-1), self._database.chunk_length, self._pad)
        dropped = (ids < 0) | repeats(rows.reshape(*ids.shape, -1), ids >= 0)
        nearest = np.argsort(dropped, axis=1, kind="stable")[:, : self._num_neighbors]
        return np.take_along_axis(np.where(dropped, -1, ids), nearest, axis=1)
