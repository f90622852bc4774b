"""Saved neighbors: for every chunk the K nearest database chunks of *other* documents.

neighbors/<corpus>/<a>-<b>.ids.npy          [b-a, K] int64 chunk ids, nearest first; -1: there is none
neighbors/<corpus>/<a>-<b>.distances.npy    [b-a, K] float32, ascending; inf: there is none
"""

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.errors import UserError
from megatron_retro.reading import WAY_OUT
from megatron_retro.retrieval.blocks import RowTable, plan
from megatron_retro.workdir import WorkDir


class NeighborTable:
    """Neighbors by chunk id.

    Args:
        table: all chunks of the work dir; opened where not given.

    Attributes:
        num_neighbors: K saved.
    """

    def __init__(self, work: WorkDir, table: ChunkTable | None = None):
        self._table = ChunkTable.open(work) if table is None else table
        self.num_neighbors: int = work.facts("neighbors")["num_neighbors"]
        blocks = plan(work, work.facts("neighbors")["block_size"])
        self._ids = RowTable(work, "neighbors", blocks, ".ids.npy", np.int64, self.num_neighbors)
        self._distances = RowTable(work, "neighbors", blocks, ".distances.npy", np.float32, self.num_neighbors)

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        """[n] int64 chunk ids -> [n, K] int64 chunk ids, nearest first, -1 for none.

        Raises:
            UserError: a row that cannot be: it holds what is no chunk, a chunk of its own document, or one twice.
        """
        ids = self._ids.rows(chunks)
        own, ascending = self._table.document_chunks(chunks), np.sort(ids, axis=1)
        wrong = ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)).any(1)
        wrong |= ((own[:, :1] <= ids) & (ids < own[:, 1:])).any(1)
        wrong |= (ascending[:, 0] < -1) | (ascending[:, -1] >= len(self._ids))
        if wrong.any():
            self._refuse(chunks, ids, own, int(np.flatnonzero(wrong)[0]))
        return ids

    def _refuse(self, chunks: np.ndarray, ids: np.ndarray, own: np.ndarray, row: int) -> None:
        outside, inside = [id for id in ids[row] if not -1 <= id < len(self._ids)], own[row].tolist()
        mine = [id for id in ids[row] if inside[0] <= id < inside[1]]
        if outside:
            reason = f"{outside[0]}, and there are chunks 0 … {len(self._ids) - 1}"
        elif mine:
            reason = f"{mine[0]} of the chunk's own document, whose chunks are {inside[0]} … {inside[1] - 1}"
        else:
            reason = f"{next(id for id in ids[row] if id >= 0 and (ids[row] == id).sum() > 1)} twice"
        raise UserError(
            f"{self._ids.place(int(chunks[row]))}, of chunk {chunks[row]}, holds the neighbor {reason}; {WAY_OUT}"
        )

    def open_all(self) -> None:
        """Open the files of `ids` now, so that training opens none in a step."""
        self._ids.open_all()

    def distances(self, chunks: np.ndarray) -> np.ndarray:
        """[n] int64 chunk ids -> [n, K] float32 squared L2 distances, inf for none."""
        return self._distances.rows(chunks)
