"""Retrieval for text that is in no work dir: what `inspect` and generation ask."""

import copy
import dataclasses
import threading
from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable, Stream
from megatron_retro.data.samples import repeats
from megatron_retro.errors import UserError
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import Embedder, weights_print
from megatron_retro.retrieval.index_search import IndexSearch
from megatron_retro.retrieval.query import OpenIndex, lexical_retriever
from megatron_retro.workdir import WorkDir

_BATCH_SIZE = 32


class LiveRetriever:
    """What found a finished work dir's neighbors, ready for queries that come one by one, from any thread.

    Attributes:
        table: all chunks.
        tokenizer: of the corpora.
        kind: "dense", "bm25" or "hybrid".

    Raises:
        UserError: the index is not built, or the embedder cannot be loaded.
    """

    def __init__(self, work: WorkDir):
        self._index = OpenIndex.open(work)
        self.table, self.tokenizer = self._index.table, open_tokenizer(work)
        self.kind: str = work.settings["retro_retriever"]
        self._shards = self._index.shards(keep_open=True)
        facts = work.facts("embeddings")
        self._embedder, self._embedding = Embedder(facts["embedder"], facts["dtype"], _BATCH_SIZE), threading.Lock()
        found, width = weights_print(facts["embedder"]), self._embedder.width
        if (found, width) != (facts["weights"], facts["width"]):
            raise UserError(
                f"the embedder {facts['embedder']} has weights {found} of width {width}, --retro-work-dir {work.path} "
                f"was made with {facts['weights']} of width {facts['width']}; restore the checkpoint"
            )
        self._open_searches()

    def _open_searches(self) -> None:
        index = self._index
        nprobe = index.work.settings.get("tuned", {}).get("nprobe", 1)
        self._search = IndexSearch(self._shards, index.embeddings, index.database, nprobe)
        self._words: Any = None if self.kind == "dense" else lexical_retriever(self.kind, index, None)

    @property
    def database(self) -> Database:
        return self._index.database

    @property
    def stream(self) -> Stream:
        """The chunks of the database."""
        return self._index.database.stream

    def without(self, documents: np.ndarray) -> "LiveRetriever":
        """This retriever without some documents (int64 ids); what takes memory is shared."""
        kept = np.setdiff1d(np.flatnonzero(self.database.is_member), documents)
        other = copy.copy(self)
        other._index = dataclasses.replace(self._index, database=Database(self.table, kept))
        other._open_searches()
        return other

    def search(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best database chunks for texts.

        Returns:
            (ids [n, k] int64 with -1 for none, distances [n, k] float32 with inf for none, as `Retriever` has them).
        """
        if self.kind == "bm25":
            return self._words.search(texts, k)
        queries = self.embed(texts)
        if self.kind == "dense":
            return self.nearest(queries, k)
        near, _ = self.nearest(queries, max(k, self._words.num_candidates))
        return self._words.rank(texts, near, k)

    def embed(self, texts: list[str]) -> np.ndarray:
        """[n] texts -> [n, E] float16, a batch at a time, so that another thread need not wait long."""
        rows = [np.zeros((0, self._embedder.width), np.float16)]
        for begin in range(0, len(texts), _BATCH_SIZE):
            with self._embedding:  # its tokenizer serves one thread at a time
                rows.append(self._embedder.embed(self._embedder.encode(texts[begin : begin + _BATCH_SIZE])))
        return np.concatenate(rows)

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest embeddings for queries [n, E] float16, returned as `search` does."""
        return self._search.search(queries, np.zeros((len(queries), 2), np.int64), k)


def without_repeats(table: ChunkTable, ids: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of ids and distances [n, K_saved], best first, the first k whose text no better one has: [n, k]."""
    rows, _ = table.tokens(ids.reshape(-1), table.chunk_length, 0)
    dropped = (ids < 0) | repeats(rows.reshape(*ids.shape, table.chunk_length), ids >= 0)
    best = np.argsort(dropped, axis=1, kind="stable")[:, :k]
    ids, distances = np.where(dropped, -1, ids), np.where(dropped, np.float32(np.inf), distances)
    return np.take_along_axis(ids, best, 1), np.take_along_axis(distances, best, 1)
