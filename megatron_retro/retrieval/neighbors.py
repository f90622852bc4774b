"""Saved neighbors: for every chunk the K nearest database chunks of *other* documents.

neighbors/<corpus>/<a>-<b>.ids.npy          [b-a, K] int64 chunk ids, nearest first; -1: there is none
neighbors/<corpus>/<a>-<b>.distances.npy    [b-a, K] float32, ascending; inf: there is none
"""

import numpy as np

from megatron_retro.retrieval.blocks import RowTable, plan
from megatron_retro.workdir import WorkDir


class NeighborTable:
    """Neighbors by chunk id.

    Attributes:
        num_neighbors: K saved.
    """

    def __init__(self, work: WorkDir):
        self.num_neighbors: int = work.facts("neighbors")["num_neighbors"]
        blocks = plan(work, work.facts("neighbors")["block_size"])
        self._ids = RowTable(work, "neighbors", blocks, ".ids.npy")
        self._distances = RowTable(work, "neighbors", blocks, ".distances.npy")

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        """[n] int64 chunk ids -> [n, K] int64 chunk ids, nearest first, -1 for none."""
        return self._ids.rows(chunks)

    def open_all(self) -> None:
        """Open the files of `ids` now, so that training opens none in a step."""
        self._ids.open_all()

    def distances(self, chunks: np.ndarray) -> np.ndarray:
        """[n] int64 chunk ids -> [n, K] float32 squared L2 distances, inf for none."""
        return self._distances.rows(chunks)
