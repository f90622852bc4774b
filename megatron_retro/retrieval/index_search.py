"""Search through FAISS, query by query: for indexes without inverted lists, and for live queries."""

import importlib
import itertools
from typing import Any

import numpy as np

from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.exact import ExactSearch
from megatron_retro.retrieval.index import Shards, inverted_lists
from megatron_retro.retrieval.ranking import rank_candidates

_RERANKED = 64  # candidates of an index that are ranked again


class IndexSearch:
    """Search shard by shard through FAISS, leaving the query's document out, and rank the best again.

    A query that finds fewer neighbors than there are looks into more lists, and at last at every database chunk.

    Args:
        shards: of the index; ids in them that are not in the database are passed over.
        embeddings: of all chunks.
        database: the chunks to search.
        nprobe: inverted lists a query looks into; unused by an index without.
    """

    def __init__(self, shards: Shards, embeddings: EmbeddingTable, database: Database, nprobe: int):
        self._shards, self._embeddings, self._database, self._nprobe = shards, embeddings, database, nprobe
        lists = inverted_lists(next(iter(shards)))
        self._num_lists = 0 if lists is None else int(lists.nlist)

    def search(self, queries: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        wanted = np.minimum(k, self._database.num_foreign(own))
        rows, nprobe = np.flatnonzero(wanted), self._nprobe
        while len(rows):
            candidates = self._candidates(queries[rows], own[rows], max(k, _RERANKED), nprobe)
            ids[rows], distances[rows] = rank_candidates(queries[rows], candidates, self._embeddings, k)
            rows = rows[(ids[rows] >= 0).sum(1) < wanted[rows]]
            if nprobe >= self._num_lists:
                break
            nprobe = min(4 * nprobe, self._num_lists)
        if len(rows):
            exact = ExactSearch(self._embeddings, self._database)
            ids[rows], distances[rows] = exact.search(queries[rows], own[rows], k)
        return ids, distances

    def _candidates(self, queries: np.ndarray, own: np.ndarray, k: int, nprobe: int) -> np.ndarray:
        """[n, k] int64 ids by the codes' distances, -1 for none, own documents left out."""
        rows = queries.astype(np.float32)
        best, ids = np.full((len(rows), k), np.inf, np.float32), np.full((len(rows), k), -1, np.int64)
        for shard in self._shards:
            found, found_ids = self._search_shard(shard, rows, own, k, nprobe)
            found_ids = np.where((found_ids >= 0) & self._database.holds(np.maximum(found_ids, 0)), found_ids, -1)
            found = np.where(found_ids < 0, np.inf, found)
            best, ids = np.concatenate([best, found], 1), np.concatenate([ids, found_ids], 1)
            order = np.lexsort((ids, best), axis=1)[:, :k]
            best, ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)
        return ids

    def _search_shard(self, shard: Any, rows: np.ndarray, own: np.ndarray, k: int, nprobe: int) -> Any:
        if self._num_lists == 0:
            return _overfetch(shard, rows, own, k)
        found = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
        bounds = np.flatnonzero(np.append(True, np.append(own[1:, 0] != own[:-1, 0], True)))
        for begin, end in itertools.pairwise(bounds):
            params = _without(shard, own[begin], nprobe)
            found[0][begin:end], found[1][begin:end] = shard.search(rows[begin:end], k, params=params)
        return found


def _without(shard: Any, own: np.ndarray, nprobe: int) -> Any:
    """Parameters of a search in inverted lists that leaves out the ids own[0] … own[1]-1."""
    faiss: Any = importlib.import_module("faiss")  # its type stubs do not know the keyword arguments

    selector = faiss.IDSelectorNot(faiss.IDSelectorRange(int(own[0]), int(own[1])))
    params = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
    return faiss.SearchParametersPreTransform(index_params=params) if hasattr(shard, "chain") else params


def _overfetch(shard: Any, rows: np.ndarray, own: np.ndarray, k: int) -> Any:
    """For indexes without inverted lists, of which some take no selector: fetch more, then drop the own document."""
    most_own = int((own[:, 1] - own[:, 0]).max())
    count = min(shard.ntotal, k + min(most_own, 256))
    if not count:  # of blocks whose documents are not in the database
        return np.zeros((len(rows), 0), np.float32), np.zeros((len(rows), 0), np.int64)
    distances, ids = shard.search(rows, count)
    is_own = (own[:, :1] <= ids) & (ids < own[:, 1:])
    return np.where(is_own, np.inf, distances), np.where(is_own, -1, ids)
