"""What all searches share: the exact ranking of candidates, checks of a result, and recall.

Candidates are ranked by the distance of the stored embeddings, computed in float64 and rounded to float32, and among
equals by id. So a result does not depend on the number of ranks or shards, nor on the codes of an index.
"""

from typing import Protocol

import numpy as np

from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import EmbeddingTable


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


def check_neighbors(
    ids: np.ndarray, distances: np.ndarray, own: np.ndarray, database: Database, complete: np.ndarray | bool = True
) -> None:
    """Assert on every row: none from the own document, none twice, nearest first, all there are if `complete` [n]."""
    found = ids >= 0
    assert not (found & (own[:, :1] <= ids) & (ids < own[:, 1:])).any(), "a neighbor from the own document"
    ascending = np.sort(ids, axis=1)
    assert not ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)).any(), "a neighbor twice"
    wanted = np.minimum(ids.shape[1], database.num_foreign(own))
    assert ((found.sum(1) == wanted) | ~np.asarray(complete)).all(), "fewer neighbors than there are"
    assert (found == np.isfinite(distances)).all() and (distances[:, 1:] >= distances[:, :-1]).all(), "out of order"
    assert database.holds(ids[found]).all(), "a neighbor that is not in the database"


def recall(distances: np.ndarray, true_distances: np.ndarray) -> float:
    """Share of the true neighbors that were found; one as near as the farthest true one counts as true.

    Args:
        distances: [n, k] float32 of the neighbors found, inf for none.
        true_distances: [n, k] float32 of the true ones.
    """
    exist = np.isfinite(true_distances)
    farthest = np.where(exist, true_distances, -np.inf).max(1, keepdims=True)
    return float((np.isfinite(distances) & (distances <= farthest)).sum() / max(1, exist.sum()))
