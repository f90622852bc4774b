"""A sample of a work dir's chunks, and how each relates to its neighbors."""

import dataclasses

import numpy as np

from megatron_retro.data.chunks import ChunkTable, Stream, corpus_of
from megatron_retro.data.overlap import longest_common_run
from megatron_retro.retrieval.neighbors import NeighborTable

_PAIRS = 1 << 14  # compared at once


@dataclasses.dataclass(frozen=True)
class Sample:
    """Chunks in random order, of documents that are not removed."""

    chunks: np.ndarray  # [n] int64 chunk ids
    ids: np.ndarray  # [n, K] int64 of the neighbors, nearest first, -1: none
    distances: np.ndarray  # [n, K] float32, inf: none
    run: np.ndarray  # [n] int64, tokens of the longest run shared with the nearest neighbor
    num_chunks: int  # that it was drawn from

    @classmethod
    def draw(cls, table: ChunkTable, neighbors: NeighborTable, count: int, seed: int) -> "Sample":
        """At most `count` chunks; the same seed draws the same ones."""
        stream = Stream(table, np.flatnonzero(~table.removed))
        size = min(count, len(stream))
        chunks = stream.chunks(np.random.default_rng(seed).choice(len(stream), size, replace=False))
        ids = neighbors.ids(chunks)
        run = shared_runs(table, chunks, ids[:, 0])[0]
        return cls(chunks, ids, neighbors.distances(chunks), run, len(stream))

    def hard(self, count: int) -> dict[str, np.ndarray]:
        """The chunks that deserve a look: at most `count` chunk ids in each list, the hardest first."""
        num_neighbors, nearest = (self.ids >= 0).sum(1), self.distances[:, 0]
        found = num_neighbors > 0
        worst = {
            "overlap": (-self.run, self.run > 0),
            "few": (num_neighbors, num_neighbors < self.ids.shape[1]),
            "far": (-nearest, found),
        }
        return {name: self._first(count, key, among) for name, (key, among) in worst.items()}

    def _first(self, count: int, key: np.ndarray, among: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(among)
        return self.chunks[rows[np.lexsort((self.chunks[rows], key[rows]))[:count]]]

    def mix(self, table: ChunkTable) -> np.ndarray:
        """[num_corpora, num_corpora] int64: neighbors by corpus of the chunk and corpus of the neighbor."""
        size = len(table.corpora)
        own = np.broadcast_to(corpus_of(table.corpus_chunks, self.chunks)[:, None], self.ids.shape)
        found = self.ids >= 0
        cell = own[found] * size + corpus_of(table.corpus_chunks, self.ids[found])
        return np.bincount(cell, minlength=size * size).reshape(size, size)


def shared_runs(table: ChunkTable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[3, n] int64: tokens, start in a, and start in b of the longest run that chunks a and b share; b may be -1."""
    runs = np.zeros((3, len(a)), np.int64)
    for begin in range(0, len(a), _PAIRS):
        here = slice(begin, begin + _PAIRS)
        a_tokens, a_length = table.tokens(a[here], table.chunk_length, 0)
        b_tokens, b_length = table.tokens(b[here], table.chunk_length, 0)
        runs[:, here] = longest_common_run(a_tokens, b_tokens, a_length, b_length)
    return runs
