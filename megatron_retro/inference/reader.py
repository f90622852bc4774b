"""What the model reads while it writes: the neighbors of a chunk that has just become complete."""

import dataclasses
import time

import numpy as np
import torch
from torch import Tensor

from megatron_retro import distributed, mcore
from megatron_retro.data.chunks import ChunkTable, Stream
from megatron_retro.data.samples import repeats
from megatron_retro.retrieval.live import LiveRetriever


@dataclasses.dataclass
class Reads:
    """Neighbors of n chunks.

    Attributes:
        ids_nxK: int64 chunk ids, best first, -1 for none.
        distances_nxK: float32, inf for none.
        tokens_nxKxR: int64, on this rank's device.
        lengths_nxK: int64 on this rank's device, 0 for no neighbor.
    """

    ids_nxK: np.ndarray
    distances_nxK: np.ndarray
    tokens_nxKxR: Tensor
    lengths_nxK: Tensor


class Reader:
    """Finds neighbors as training's samples had them: the same text form, embedder, retriever and filter.

    Rank 0 embeds and searches, and tells the others.

    Args:
        table: all chunks of the work dir.
        retriever: on rank 0 of retrieval "on", else None.
        database: ids of the documents in the database, for random neighbors.
        num_neighbors: K.
        fetched: neighbors sought for each chunk, of which repeated ones are dropped: the work dir's K_saved.
        retrieval: "on" or "random".
        seed: of random neighbors.
    """

    def __init__(
        self,
        table: ChunkTable,
        retriever: LiveRetriever | None,
        *,
        num_neighbors: int,
        fetched: int,
        retrieval: str,
        database: np.ndarray,
        seed: int,
    ):
        self._table, self._retriever = table, retriever
        self._num_neighbors, self._fetched, self._retrieval = num_neighbors, max(fetched, num_neighbors), retrieval
        self._database, self._draw = Stream(table, database), np.random.default_rng(seed)
        self.seconds = 0.0

    def read(self, chunks: list[list[int]]) -> Reads:
        """Neighbors of chunks of tokens, each complete; every rank calls it."""
        start = time.perf_counter()
        found = distributed.all_gather(self._find(chunks) if distributed.rank() == 0 else None)[0]
        ids, distances = found
        tokens, lengths = self._table.tokens(ids.reshape(-1), 2 * self._table.chunk_length, 0)
        device = mcore.device()
        reads = Reads(
            ids,
            distances,
            torch.from_numpy(tokens).view(*ids.shape, -1).to(device),
            torch.from_numpy(lengths).view(ids.shape).to(device),
        )
        self.seconds += time.perf_counter() - start
        return reads

    def _find(self, chunks: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(chunks), self._num_neighbors)
        if self._retrieval == "random":
            return self._database.chunks(self._draw.integers(len(self._database), size=shape)), np.zeros(shape)
        assert self._retriever is not None
        ids, distances = self._retriever.search(self._retriever.tokenizer.decode(chunks), self._fetched)
        length = self._table.chunk_length
        rows, _ = self._table.tokens(ids.reshape(-1), length, 0)
        dropped = (ids < 0) | repeats(rows.reshape(*ids.shape, length), ids >= 0)
        best = np.argsort(dropped, axis=1, kind="stable")[:, : self._num_neighbors]
        ids, distances = np.where(dropped, -1, ids), np.where(dropped, np.float32(np.inf), distances)
        return np.take_along_axis(ids, best, 1), np.take_along_axis(distances, best, 1)
