"""What the model reads while it writes: the neighbors of a chunk that has just become complete."""

import dataclasses
import time
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_retro import distributed, mcore
from megatron_retro.data.chunks import ChunkTable, Stream
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.retrieval.live import LiveRetriever, without_repeats
from megatron_retro.training.data import check_num_neighbors, split_weights
from megatron_retro.workdir import WorkDir


class Library(Protocol):
    """What a reader asks: a `LiveRetriever`, or a `LiveDatabase`, whose documents come and go."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def table(self) -> ChunkTable:
        """All chunks; it may grow."""

    @property
    def stream(self) -> Stream:
        """The chunks in the database."""

    def search(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n, k] int64 with -1 for none, distances [n, k] float32 with inf for none), best first."""


@dataclasses.dataclass
class Reads:
    """Neighbors of n chunks.

    Attributes:
        ids_nxK: int64 chunk ids, best first, -1 for none.
        distances_nxK: float32, inf for none and for random ones.
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
        library: on rank 0 of retrieval "on", else None; where there is one, its chunks count.
        database: ids of the documents in the database, for random neighbors.
        num_neighbors: K.
        fetched: neighbors sought for each chunk, of which repeated ones are dropped: the work dir's K_saved.
        retrieval: "on" or "random".
        seed: of random neighbors.
    """

    def __init__(
        self,
        table: ChunkTable,
        library: Library | None,
        *,
        num_neighbors: int,
        fetched: int,
        retrieval: str,
        database: np.ndarray,
        seed: int,
    ):
        self._own_table, self._library = table, library
        self._num_neighbors, self._fetched, self._retrieval = num_neighbors, max(fetched, num_neighbors), retrieval
        self._own_stream, self._draw = Stream(table, database), np.random.default_rng(seed)
        self.seconds = 0.0

    @property
    def _table(self) -> ChunkTable:
        return self._library.table if self._library else self._own_table

    def read(self, chunks: list[list[int]]) -> Reads:
        """Neighbors of chunks of tokens, each complete; every rank calls it."""
        start = time.perf_counter()
        ids, distances = distributed.all_gather(self._find(chunks) if distributed.rank() == 0 else None)[0]
        reads = self._reads(ids, distances)
        self.seconds += time.perf_counter() - start
        return reads

    def read_alone(self, chunks: list[list[int]]) -> Reads:
        """As `read`, by one process for itself, which has a library."""
        return self._reads(*self._find(chunks))

    def _reads(self, ids: np.ndarray, distances: np.ndarray) -> Reads:
        tokens, lengths = self._table.tokens(ids.reshape(-1), 2 * self._table.chunk_length, 0)
        device = mcore.device()
        return Reads(
            ids,
            distances,
            torch.from_numpy(tokens).view(*ids.shape, -1).to(device),
            torch.from_numpy(lengths).view(ids.shape).to(device),
        )

    def _find(self, chunks: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(chunks), self._num_neighbors)
        if self._retrieval == "random":
            return self._random(shape)
        assert self._library is not None
        ids, distances = self._library.search(self._library.tokenizer.decode(chunks), self._fetched)
        return without_repeats(self._table, ids, distances, self._num_neighbors)

    def _random(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        stream = self._library.stream if self._library else self._own_stream
        if not len(stream):
            return np.full(shape, -1), np.full(shape, np.inf)
        return stream.chunks(self._draw.integers(len(stream), size=shape)), np.full(shape, np.inf)


class GivenReader(Reader):
    """Reads the same texts for every chunk.

    Args:
        texts: token ids; the first `num_neighbors` are read, cut to `length` tokens.
    """

    def __init__(self, texts: list[list[int]], num_neighbors: int, length: int):
        self.seconds = 0.0
        self._tokens_KxR = torch.zeros(num_neighbors, length, dtype=torch.int64)
        self._lengths_K = torch.zeros(num_neighbors, dtype=torch.int64)
        for row, text in enumerate(texts[:num_neighbors]):
            self._lengths_K[row] = min(len(text), length)
            self._tokens_KxR[row, : min(len(text), length)] = torch.tensor(text[:length], dtype=torch.int64)

    def read(self, chunks: list[list[int]]) -> Reads:
        shape, device = (len(chunks), len(self._lengths_K)), mcore.device()
        return Reads(
            np.full(shape, -1),
            np.full(shape, np.inf, np.float32),
            self._tokens_KxR.expand(len(chunks), -1, -1).to(device),
            self._lengths_K.expand(len(chunks), -1).to(device),
        )


def open_reader(
    work: WorkDir,
    table: ChunkTable,
    num_neighbors: int,
    retrieval: str = "on",
    *,
    seed: int = 0,
    library: Library | None = None,
) -> Reader:
    """A `Reader` ("on" or "random") of a work dir's database; every rank calls it.

    Args:
        table: all chunks of the work dir.
        num_neighbors: K.
        seed: of random neighbors.
        library: searched where given; else rank 0 opens the work dir's own for retrieval "on".

    Raises:
        UserError: K is more than the work dir holds for a chunk.
    """
    saved = work.facts("neighbors")["num_neighbors"]
    check_num_neighbors(num_neighbors, saved)
    if library is None:
        opens = retrieval == "on" and distributed.rank() == 0
        library = distributed.together(lambda: LiveRetriever(work) if opens else None)
    return Reader(
        table,
        library,
        num_neighbors=num_neighbors,
        fetched=saved,
        retrieval=retrieval,
        database=table.database_documents(split_weights(work)),
        seed=seed,
    )
