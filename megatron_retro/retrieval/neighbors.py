"""Neighbors: for every chunk the K nearest database chunks of *other* documents.

    neighbors/<corpus>/<a>-<b>.ids.npy          [b-a, K] int64 chunk ids, nearest first; -1: there is none
    neighbors/<corpus>/<a>-<b>.distances.npy    [b-a, K] float32 squared L2 distance; inf: there is none

Both searches find candidates, then rank them by the distance of the stored embeddings, computed in float64 and rounded
to float32, and among equals by id. So the result does not depend on the number of ranks or shards.
"""

import importlib
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.retrieval.blocks import RowTable, plan
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.index import inverted_lists
from megatron_retro.workdir import WorkDir

_TILE = 16_384  # database rows a matrix product
_GROUP = 64  # scores whose maximum is looked at first
_QUERIES = 1024  # rows a matrix product
_SPARE = 6  # candidates beyond K, to see that rounding cannot have hidden a better one
_ROUNDING = 2e-5  # bounds the error of a float32 product of 384 … 1024 numbers, relative to the vectors' lengths
_RERANKED = 64  # candidates of an index that are ranked again


class Search(Protocol):
    def search(self, queries: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest database chunks of each query.

        Args:
            queries: [n, E] float16.
            own: [n, 2] int64, first chunk id of the query's document and of the next one.
            k: neighbors wanted.

        Returns:
            (ids [n, k] int64 with -1 for none, squared distances [n, k] float32 with inf for none).
        """


class ExactSearch:
    """Every query against every database chunk, by blocked matrix products.

    Args:
        embeddings: of all chunks.
        database: [N] int64 ascending chunk ids.
        device: a torch device.
    """

    def __init__(self, embeddings: EmbeddingTable, database: np.ndarray, device: Any = "cpu"):
        self._embeddings, self._database, self._device = embeddings, database, device

    def search(self, queries: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = [
            self._search(queries[begin : begin + _QUERIES], own[begin : begin + _QUERIES], k)
            for begin in range(0, len(queries), _QUERIES)
        ]
        ids, distances = zip(*found, strict=True)
        return np.concatenate(ids), np.concatenate(distances)

    def _search(self, queries: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, ids, slack = self._candidates(queries, own, k + _SPARE)
        ranked_ids, ranked_distances = rank_candidates(queries, ids, self._embeddings, k)
        limit = scores[:, k - 1] - slack
        unsure = np.flatnonzero(np.isfinite(scores[:, -1]) & (scores[:, -1] >= limit))
        for row, near in zip(unsure, self._all_above(queries[unsure], own[unsure], limit[unsure]), strict=True):
            ranked = rank_candidates(queries[row : row + 1], near[None], self._embeddings, k)
            ranked_ids[row], ranked_distances[row] = ranked[0][0], ranked[1][0]
        return ranked_ids, ranked_distances

    def _candidates(self, queries: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The k best by rounded score q·x - |x|²/2 (descending; -inf for none), and what rounding may have cost."""
        import torch

        best = torch.full((len(queries), k), -torch.inf, device=self._device)
        ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=self._device)
        longest = 0.0
        for scores, tile, length in self._tiles(queries, own):
            top, position = _top(scores, k)
            tile_ids = torch.from_numpy(tile).to(self._device)[position.clamp(max=len(tile) - 1)]
            best, order = torch.cat([best, top], 1).topk(k)
            ids = torch.cat([ids, tile_ids], 1).gather(1, order)
            longest = max(longest, length)
        ids[best == -torch.inf] = -1
        query_length = float(np.linalg.norm(queries.astype(np.float32), axis=1).max())
        return best.cpu().numpy(), ids.cpu().numpy(), _ROUNDING * longest * max(longest, query_length)

    def _all_above(self, queries: np.ndarray, own: np.ndarray, limit: np.ndarray) -> list[np.ndarray]:
        """Ids of all database chunks whose rounded score reaches each query's limit (many equal chunks, usually)."""
        import torch

        found: list[list[np.ndarray]] = [[] for _ in queries]
        if len(queries):
            bound = torch.from_numpy(limit).to(self._device)[:, None]
            for scores, tile, _ in self._tiles(queries, own):
                rows, positions = (scores >= bound).nonzero().cpu().numpy().T
                pieces = np.split(tile[positions], np.searchsorted(rows, np.arange(1, len(queries))))
                for row, piece in enumerate(pieces):
                    found[row].append(piece)
        return [np.concatenate(pieces) for pieces in found]

    def _tiles(self, queries: np.ndarray, own: np.ndarray) -> Iterator[tuple[Any, np.ndarray, float]]:
        """Scores [n, T padded to whole groups] of each tile of the database, own documents and padding at -inf."""
        import torch

        rows = torch.from_numpy(queries).to(self._device, torch.float32)
        for begin in range(0, len(self._database), _TILE):
            tile = self._database[begin : begin + _TILE]
            vectors = torch.from_numpy(self._embeddings.rows(tile)).to(self._device, torch.float32)
            squared, padding = vectors.square().sum(1), -len(tile) % _GROUP
            bias = torch.nn.functional.pad(-0.5 * squared, (0, padding), value=-torch.inf)
            scores = torch.addmm(bias, rows, torch.nn.functional.pad(vectors, (0, 0, 0, padding)).T)
            _hide_own(scores, tile, own)
            yield scores, tile, float(squared.max()) ** 0.5


def _hide_own(scores: Any, tile: np.ndarray, own: np.ndarray) -> None:
    """Set each row's scores of its own document to -inf, document by document."""
    first_rows = np.flatnonzero(np.append(True, own[1:, 0] != own[:-1, 0]))
    bounds = np.searchsorted(tile, own[first_rows])
    for row, end_row, (begin, end) in zip(first_rows, np.append(first_rows[1:], len(own)), bounds, strict=True):
        if begin < end:
            scores[row:end_row, begin:end] = float("-inf")


def _top(scores: Any, k: int) -> tuple[Any, Any]:
    """(values, positions) of the k largest of each row, [n, k], by way of the k groups of largest maximum."""
    num_rows, num_groups = len(scores), scores.shape[1] // _GROUP
    groups = scores.view(num_rows, num_groups, _GROUP)
    chosen = groups.amax(2).topk(min(k, num_groups)).indices
    candidates = groups.gather(1, chosen[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    values, inside = candidates.topk(min(k, candidates.shape[1]))
    return values, chosen.gather(1, inside // _GROUP) * _GROUP + inside % _GROUP


class IndexSearch:
    """Search shard by shard through FAISS, leaving the query's document out, and rank the best again.

    A query that finds fewer neighbors than there are looks into more lists, and at last at every database chunk.

    Args:
        shards: indexes holding the database under its chunk ids.
        embeddings: of all chunks.
        database: [N] int64 ascending chunk ids.
        nprobe: inverted lists a query looks into; unused by an index without.
    """

    def __init__(self, shards: list[Any], embeddings: EmbeddingTable, database: np.ndarray, nprobe: int):
        self._shards, self._embeddings, self._database, self._nprobe = shards, embeddings, database, nprobe
        lists = inverted_lists(shards[0])
        self._num_lists = 0 if lists is None else int(lists.nlist)

    def search(self, queries: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        wanted = np.minimum(k, available(self._database, own))
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
    distances, ids = shard.search(rows, min(shard.ntotal, k + min(most_own, 256)))
    is_own = (own[:, :1] <= ids) & (ids < own[:, 1:])
    return np.where(is_own, np.inf, distances), np.where(is_own, -1, ids)


def rank_candidates(
    queries: np.ndarray, candidates: np.ndarray, embeddings: EmbeddingTable, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each query's candidates, by exact distance, then id.

    Args:
        queries: [n, E] float16.
        candidates: [n, M] int64 chunk ids, no id twice in a row but -1, which is none.
        embeddings: of all chunks.
        k: how many to keep.

    Returns:
        (ids [n, k] int64, distances [n, k] float32).
    """
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    step = max(1, 20_000 // max(1, candidates.shape[1]))
    for begin in range(0, len(queries), step):
        near = candidates[begin : begin + step]
        distance = _distances(queries[begin : begin + step], near, embeddings)
        order = np.lexsort((near, distance), axis=1)[:, :k]
        width = order.shape[1]
        distances[begin : begin + step, :width] = np.take_along_axis(distance, order, 1)
        ids[begin : begin + step, :width] = np.take_along_axis(near, order, 1)
    return np.where(np.isinf(distances), -1, ids), distances


def _distances(queries: np.ndarray, near: np.ndarray, embeddings: EmbeddingTable) -> np.ndarray:
    """[n, M] float32 squared L2, computed in float64; inf at -1."""
    chunks, inverse = np.unique(np.maximum(near, 0), return_inverse=True)
    vectors = embeddings.rows(chunks).astype(np.float64)
    distance = np.empty(near.shape, np.float32)
    for row, inside in enumerate(inverse.reshape(near.shape)):
        difference = vectors[inside] - queries[row].astype(np.float64)
        distance[row] = np.einsum("me,me->m", difference, difference)
    return np.where(near < 0, np.float32(np.inf), distance)


def available(database: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many database chunks lie outside each query's document, [n] int64."""
    begin, end = np.searchsorted(database, own.T)
    return len(database) - (end - begin)


def own_chunks(table: ChunkTable, chunks: np.ndarray) -> np.ndarray:
    """[n, 2] int64: first chunk id of each chunk's document and of the next document."""
    document = table.document(chunks)
    return np.stack([table.first_chunk[document], table.first_chunk[document + 1]], axis=1)


def check_neighbors(ids: np.ndarray, distances: np.ndarray, own: np.ndarray, database: np.ndarray) -> None:
    """Assert on every row: none from the own document, as many as there are, nearest first."""
    found = ids >= 0
    assert not (found & (own[:, :1] <= ids) & (ids < own[:, 1:])).any(), "a neighbor from the own document"
    wanted = np.minimum(ids.shape[1], available(database, own))
    assert (found == (np.arange(ids.shape[1]) < wanted[:, None])).all(), "fewer neighbors than there are"
    assert (distances[:, 1:] >= distances[:, :-1]).all(), "neighbors out of order"


def exact_neighbors(
    table: ChunkTable, embeddings: EmbeddingTable, database: np.ndarray, chunks: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The true neighbors of a few chunks [n]: ids and distances [n, k], for measuring recall."""
    return ExactSearch(embeddings, database).search(embeddings.rows(chunks), own_chunks(table, chunks), k)


def recall(distances: np.ndarray, true_distances: np.ndarray) -> float:
    """Share of the true neighbors that were found; one as near as the farthest true one counts as true.

    Args:
        distances: [n, k] float32 of the neighbors found, inf for none.
        true_distances: [n, k] float32 of the true ones.
    """
    exist = np.isfinite(true_distances)
    farthest = np.where(exist, true_distances, -np.inf).max(1, keepdims=True)
    return float((np.isfinite(distances) & (distances <= farthest)).sum() / max(1, exist.sum()))


class NeighborTable:
    """Neighbors by chunk id.

    Attributes:
        num_neighbors: K saved.
    """

    def __init__(self, work: WorkDir):
        self.num_neighbors: int = work.facts("neighbors")["num_neighbors"]
        blocks = plan(work, work.facts("embeddings")["block_size"])
        self._ids = RowTable(work, "neighbors", blocks, ".ids.npy")
        self._distances = RowTable(work, "neighbors", blocks, ".distances.npy")

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        """[n] int64 chunk ids -> [n, K] int64 chunk ids, nearest first, -1 for none."""
        return self._ids.rows(chunks)

    def distances(self, chunks: np.ndarray) -> np.ndarray:
        """[n] int64 chunk ids -> [n, K] float32 squared L2 distances, inf for none."""
        return self._distances.rows(chunks)
