"""Exact search: every query against every chunk of the database, by blocked matrix products."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.ranking import rank_candidates

_TILE = 16_384  # database rows a matrix product
_GROUP = 64  # scores whose maximum is looked at first
_QUERIES = 1024  # rows a matrix product
_SPARE = 6  # candidates beyond K, to see that rounding cannot have hidden a better one
_ROUNDING = 2e-5  # bounds the error of a float32 product of 384 … 1024 numbers, relative to the vectors' lengths


class ExactSearch:
    """Every query against every database chunk, by blocked matrix products.

    Args:
        embeddings: of all chunks.
        database: the chunks to search.
        device: a torch device.
    """

    def __init__(self, embeddings: EmbeddingTable, database: Database, device: Any = "cpu"):
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
            tile = self._database.chunks(begin, begin + _TILE)
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
