"""Search for many queries at once through inverted lists: a join of queries and lists.

Each list is read once for all queries that probe it, and their scores are one matrix product with the *stored*
embeddings. So the codes of the index cost nothing in recall, a query's own document is left out exactly, and what is
missed lies in a list that was not probed.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.exact import ExactSearch
from megatron_retro.retrieval.index import Shards, inverted_lists
from megatron_retro.retrieval.ranking import rank_candidates

_SPARE = 6  # candidates beyond K, against rounding
_SLAB = 16_384  # rows of the database read at once
_SCORES = 4_000_000  # products of queries and chunks that are held at once
_PENDING = 2_000_000  # candidates that wait to be merged
_FIRST_PROBES = 4  # nearest lists, whose best scores bound what the others must reach
_COARSE_QUERIES = 8192  # whose nearest lists are sought at once


class ListJoin:
    """Offline search of an index with inverted lists.

    Args:
        shards: of the index.
        embeddings: of all chunks.
        database: the chunks to search; ids in the lists that are not in it are passed over.
        nprobe: lists a query looks into.
        device: a torch device.
        complete: search the whole database for a query whose lists hold too few chunks of other documents.
    """

    def __init__(
        self,
        shards: Shards,
        embeddings: EmbeddingTable,
        database: Database,
        nprobe: int,
        device: Any,
        *,
        complete: bool = True,
    ):
        self._shards, self._embeddings, self._database = shards, embeddings, database
        self._nprobe, self._device, self._complete = nprobe, device, complete

    def search(self, queries: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        probes = np.empty((len(queries), self._nprobe), np.int64)
        best = _Best(queries, own, k + _SPARE, self._device)
        for number, shard in enumerate(self._shards):
            if number == 0:
                probes = nearest_lists(shard, queries, self._nprobe)
            first = probes[:, :_FIRST_PROBES], probes[:, _FIRST_PROBES:]
            for some in first:
                self._scan(shard, some, best)
        ids, distances = rank_candidates(queries, best.ids(), self._embeddings, k)
        short = np.flatnonzero((ids >= 0).sum(1) < np.minimum(k, self._database.num_foreign(own)))
        if len(short) and self._complete:
            exact = ExactSearch(self._embeddings, self._database, self._device)
            ids[short], distances[short] = exact.search(queries[short], own[short], k)
        return ids, distances

    def _scan(self, shard: Any, probes: np.ndarray, best: "_Best") -> None:
        """Offer the chunks of the probed lists to the queries that probe them."""
        by_list = np.argsort(probes, axis=None, kind="stable")
        lists, begins = np.unique(probes.reshape(-1)[by_list], return_index=True)
        rows = by_list // max(1, probes.shape[1])
        bounds = dict(zip(lists.tolist(), itertools.pairwise([*begins.tolist(), len(rows)]), strict=True))
        for number, chunks, vectors in self._lists(shard, lists[lists >= 0]):
            first, end = bounds[number]
            at_once = max(1, _SCORES // len(chunks))
            for begin in range(first, end, at_once):
                best.offer(rows[begin : min(begin + at_once, end)], chunks, vectors)
        best.merge()

    def _lists(self, shard: Any, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(number, chunk ids, embeddings) of the lists that are not empty, or of parts of them, read slab by slab."""
        waiting: list[tuple[int, np.ndarray]] = []
        num_chunks = 0
        for number in numbers:
            ids = list_ids(shard, int(number))
            ids = ids[self._database.holds(ids)]
            for begin in range(0, len(ids), _SLAB):  # a list may be longer than a slab
                waiting.append((int(number), ids[begin : begin + _SLAB]))
                num_chunks += len(waiting[-1][1])
                if num_chunks >= _SLAB:
                    yield from self._read(waiting)
                    waiting, num_chunks = [], 0
        yield from self._read(waiting)

    def _read(self, lists: list[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        vectors = self._embeddings.rows(np.concatenate([np.zeros(0, np.int64), *(chunks for _, chunks in lists)]))
        begin = 0
        for number, chunks in lists:
            yield number, chunks, vectors[begin : begin + len(chunks)]
            begin += len(chunks)


class _Best:
    """The best candidates of each query so far, by score q·x - |x|²/2.

    Candidates wait in a heap of loose entries until `merge`; those that cannot be among the best are dropped at once.
    """

    def __init__(self, queries: np.ndarray, own: np.ndarray, count: int, device: Any):
        import torch

        self._queries = torch.from_numpy(queries).to(device, torch.float32)
        self._own, self._count, self._device = own, count, device
        self._scores = torch.full((len(queries), count), -torch.inf, device=device)
        self._ids = torch.full((len(queries), count), -1, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Any, Any, Any]] = []  # rows, scores, ids
        self._num_waiting = 0

    def ids(self) -> np.ndarray:
        """[n, count] int64, -1 for none."""
        return self._ids.cpu().numpy()

    def offer(self, rows: np.ndarray, chunks: np.ndarray, vectors: np.ndarray) -> None:
        """Score chunks (ids [m] ascending, vectors [m, E] float16) for the queries `rows` [n]."""
        import torch

        on_device = torch.from_numpy(rows).to(self._device)
        points = torch.from_numpy(vectors).to(self._device, torch.float32)
        scores = torch.addmm(-0.5 * points.square().sum(1), self._queries[on_device], points.T)
        self._hide_own(scores, rows, chunks)
        worst = self._scores[on_device, -1]
        better = (scores.amax(1) > worst).nonzero(as_tuple=True)[0]
        top, position = scores[better].topk(min(self._count, len(chunks)), dim=1)
        row, column = (top > worst[better, None]).nonzero(as_tuple=True)
        ids = torch.from_numpy(chunks).to(self._device)[position[row, column]]
        self._waiting.append((on_device[better[row]], top[row, column], ids))
        self._num_waiting += len(ids)
        if self._num_waiting > _PENDING:
            self.merge()

    def merge(self) -> None:
        """Take the waiting candidates up, and raise what others must reach."""
        import torch

        if not self._num_waiting:
            return
        count = self._count
        rows, scores, ids = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        touched, inverse = rows.unique(return_inverse=True)
        own_rows = torch.arange(len(touched), device=self._device).repeat_interleave(count)
        rows = torch.cat([own_rows, inverse])
        scores = torch.cat([self._scores[touched].flatten(), scores])
        ids = torch.cat([self._ids[touched].flatten(), ids])
        order = scores.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        rows = rows[order]
        rank = torch.arange(len(rows), device=self._device) - torch.searchsorted(rows, rows)
        kept = rank < count
        where = touched[rows[kept]], rank[kept]
        self._scores[where], self._ids[where] = scores[order[kept]], ids[order[kept]]
        self._waiting, self._num_waiting = [], 0

    def _hide_own(self, scores: Any, rows: np.ndarray, chunks: np.ndarray) -> None:
        import torch

        begin, end = np.searchsorted(chunks, self._own[rows].T)
        touched = np.flatnonzero(begin < end)
        if len(touched):
            column = np.arange(len(chunks))
            hidden = (begin[touched, None] <= column) & (column < end[touched, None])
            row, column = hidden.nonzero()
            scores[
                torch.from_numpy(touched[row]).to(self._device), torch.from_numpy(column).to(self._device)
            ] = -torch.inf


def nearest_lists(shard: Any, queries: np.ndarray, nprobe: int) -> np.ndarray:
    """[n, nprobe] int64 numbers of the inverted lists nearest to each query [n, E], nearest first; -1 for none."""
    found = []
    for begin in range(0, len(queries), _COARSE_QUERIES):
        rows = queries[begin : begin + _COARSE_QUERIES].astype(np.float32)
        if hasattr(shard, "chain"):  # a transform stands before the lists
            for place in range(shard.chain.size()):
                rows = shard.chain.at(place).apply(rows)
        found.append(inverted_lists(shard).quantizer.search(rows, nprobe)[1])
    return np.concatenate(found) if found else np.zeros((0, nprobe), np.int64)


def list_ids(shard: Any, number: int) -> np.ndarray:
    """Chunk ids [m] int64 in an inverted list, ascending."""
    import faiss

    lists = inverted_lists(shard).invlists
    size = lists.list_size(number)
    if not size:
        return np.zeros(0, np.int64)
    ids = lists.get_ids(number)
    try:
        return np.sort(faiss.rev_swig_ptr(ids, size))
    finally:
        lists.release_ids(number, ids)
