"""The database's index: made by a FAISS factory string, trained on a sample, filled in shards.

    index/trained.faiss     trained and empty
    index/shard-<i>.faiss   a contiguous range of blocks' database chunks, under their chunk ids

The database is the chunks of the documents in the train split. The metric is L2.
"""

import itertools
import math
import pathlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_retro.errors import UserError
from megatron_retro.retrieval.blocks import Block
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.storage import for_library, replacing

EXACT_LIMIT = 50_000  # database chunks up to which comparing with all costs little beside embedding

_READING = threading.Lock()  # FAISS's limits on what it reads are the whole process's

_POINTS_A_LIST = 50  # training points; FAISS asks for 39 at least
_POINTS_AT_LEAST = 16_384  # for the codebooks of quantizers
_ROWS_AT_ONCE = 16_384


def choose_factory(wanted: str, num_chunks: int, width: int, memory_gb: float) -> str:
    """The factory string of "auto" by the database's size, else `wanted` itself.

    RaBitQ codes take E/8 + 8 bytes and no training; the lists hold each chunk's id as well.

    Raises:
        UserError: not even these codes fit into `memory_gb`.
    """
    if wanted != "auto":
        return wanted
    if num_chunks <= EXACT_LIMIT and num_chunks * (4 * width + 8) <= memory_gb * 1e9:
        return "Flat"
    num_lists = 4 * math.isqrt(num_chunks)  # training then costs a chunk the same, however many there are
    needed = (num_chunks * (width / 8 + 16) + num_lists * 4 * width) / 1e9
    if needed > memory_gb:
        raise UserError(
            f"--retro-index-memory-gb {memory_gb:g} holds no index of {num_chunks} chunks: its smallest codes "
            f"(RaBitQ, {width / 8 + 16:.0f} bytes a chunk) take {needed:.3g}; give as much, or a --retro-index-str"
        )
    return f"IVF{num_lists}{'_HNSW32' if num_lists > _FLAT_QUANTIZER else ''},RaBitQ"


_FLAT_QUANTIZER = 4096  # lists up to which comparing with all centroids is as fast as a graph over them


def check_factory(factory: str, width: int) -> Any:
    """The untrained index of a factory string.

    Raises:
        UserError: FAISS cannot make it for vectors of this width.
    """
    import faiss

    try:
        return faiss.index_factory(width, factory, faiss.METRIC_L2)
    except RuntimeError as error:
        raise UserError(
            f"--retro-index-str {factory}: FAISS cannot make it for embeddings of width {width} ({_reason(error)}); "
            "give another factory string, or auto"
        ) from None


def check_size(factory: str, num_chunks: int, width: int) -> None:
    """Refuse an index with more inverted lists than a database has chunks.

    Raises:
        UserError: names both numbers.
    """
    lists = inverted_lists(check_factory(factory, width))
    if lists is not None and lists.quantizer_trains_alone != 1 and lists.nlist > num_chunks:
        raise UserError(
            f"--retro-index-str {factory} has {lists.nlist} lists, more than the {num_chunks} chunks of the database; "
            "give fewer lists, or auto"
        )


def train_index(factory: str, embeddings: EmbeddingTable, database: Database, width: int, seed: int) -> Any:
    """A trained, empty index that takes vectors with their ids.

    Raises:
        UserError: FAISS refuses the factory string, for this width or this number of chunks.
    """
    import faiss

    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_L2)
        if inverted_lists(index) is None and not isinstance(index, faiss.IndexIDMap):
            index = faiss.IndexIDMap2(index)
        lists = inverted_lists(index)
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(lists.d)) if lists and gpus_search() else None
        if on_gpus is not None:
            lists.clustering_index = on_gpus
        if not index.is_trained:
            index.train(_sample(index, embeddings, database, seed))
        if on_gpus is not None:
            lists.clustering_index = None
        trial = faiss.clone_index(index)
        trial.add_with_ids(np.zeros((1, width), np.float32), np.zeros(1, np.int64))
    except RuntimeError as error:
        raise UserError(
            f"--retro-index-str {factory}: FAISS cannot make it for {len(database)} chunks of width {width} "
            f"({_reason(error)}); give another factory string, or auto"
        ) from None
    return index


def gpus_search() -> bool:
    """Whether FAISS has GPUs that find the right neighbors: a small search tells, not the import alone."""
    import faiss

    if not (hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus()):
        return False
    points = np.eye(64, dtype=np.float32)
    try:
        index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(64))
        index.add(points)
        return bool((index.search(points, 1)[1][:, 0] == np.arange(64)).all())
    except RuntimeError:
        return False


def inverted_lists(index: Any) -> Any:
    """The IVF part of an index, or None."""
    import faiss

    inner = faiss.try_extract_index_ivf(index)
    return None if inner is None else faiss.downcast_index(inner)


def choose_num_shards(num_chunks: int) -> int:
    """One up to a million chunks, 61 for a billion.

    Every shard repeats the index's centroids, whose number grows with the square root of the chunks, so shards do too.
    """
    return max(1, math.isqrt(num_chunks >> 18))


def plan_shards(blocks: list[Block], num_shards: int) -> list[list[Block]]:
    """Contiguous, about equal ranges of blocks."""
    bounds = [len(blocks) * shard // num_shards for shard in range(num_shards + 1)]
    return [blocks[begin:end] for begin, end in itertools.pairwise(bounds)]


def fill(
    index: Any,
    blocks: list[Block],
    embeddings: EmbeddingTable,
    database: Database,
    advance: Callable[[int], None],
    there: np.ndarray,
) -> None:
    """Add the database's chunks of `blocks`, under their chunk ids, but for those that are `there` (ascending ids).

    `advance` is told the chunks of each block.
    """
    for block in blocks:
        chunks = np.setdiff1d(database.chunks_within(block.first, block.first + len(block)), there)
        if len(chunks):
            index.add_with_ids(embeddings.rows(chunks).astype(np.float32), chunks)
        advance(len(block))


def write_index(path: pathlib.Path, index: Any) -> None:
    """Write an index; `path` is complete or absent."""
    import faiss

    with replacing(path) as temporary, for_library(temporary) as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write, 1 << 20))  # type: ignore[attr-defined]


def read_index(path: pathlib.Path, width: int | None, *, mapped: bool = False) -> Any:
    """Read an index of embeddings of `width`, None for any; `mapped` leaves its codes on disk until they are looked at.

    Raises:
        UserError: it is no index, or of another width.
    """
    import faiss

    flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if mapped else 0
    try:
        with _READING:
            for limit in ("vector_byte", "loop"):  # no part of a file is larger; older FAISS trusts it
                set_limit = getattr(faiss, f"set_deserialization_{limit}_limit", None)
                if set_limit and path.exists():
                    set_limit(max(path.stat().st_size, 1 << 16))
            index = faiss.read_index(str(path), flags)
            if index is None:  # FAISS has a name for that
                raise RuntimeError("it holds none")
    except (RuntimeError, MemoryError) as error:  # a damaged size may ask for more than there is
        raise UserError(f"{path} is not a FAISS index ({_reason(error)}); restore it from a backup") from None
    if width is not None and index.d != width:
        raise UserError(
            f"{path} holds vectors of width {index.d}, the embeddings of --retro-work-dir have width {width}; "
            "restore the index that was made from them, or build a new work dir"
        )
    return index


class Shards:
    """An index's shards, opened one after the other, so that one at a time is in memory.

    Args:
        paths: their files.
        width: E.
        parameters: FAISS's search-time parameters, name -> value.
        keep_open: keep all in memory, for queries that come one by one.
    """

    def __init__(
        self,
        paths: list[pathlib.Path],
        width: int,
        parameters: dict[str, int] | None = None,
        *,
        keep_open: bool = False,
    ):
        self.paths, self._width, self._parameters = paths, width, parameters or {}
        self._open: dict[pathlib.Path, Any] | None = {} if keep_open or len(paths) == 1 else None

    def with_parameters(self, parameters: dict[str, int]) -> "Shards":
        return Shards(self.paths, self._width, parameters, keep_open=self._open is not None)

    def __iter__(self) -> Iterator[Any]:
        return map(self._shard, self.paths)

    def _shard(self, path: pathlib.Path) -> Any:
        import faiss

        if self._open is not None and path in self._open:
            return self._open[path]
        index = read_index(path, self._width, mapped=True)
        for name, value in self._parameters.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        if self._open is not None:
            self._open[path] = index
        return index


def _sample(index: Any, embeddings: EmbeddingTable, database: Database, seed: int) -> np.ndarray:
    lists = inverted_lists(index)
    wanted = max(_POINTS_AT_LEAST, _POINTS_A_LIST * lists.nlist if lists is not None else 0)
    chunks = database.sample(wanted, seed)
    rows = np.empty((len(chunks), index.d), np.float32)
    for begin in range(0, len(chunks), _ROWS_AT_ONCE):  # so that they are not held twice
        rows[begin : begin + _ROWS_AT_ONCE] = embeddings.rows(chunks[begin : begin + _ROWS_AT_ONCE])
    return rows


def _reason(error: Exception) -> str:
    """FAISS's message without its place in the source."""
    return re.sub(r"^Error in .* at \S+:\d+: ", "", " ".join(str(error).split())).rsplit("Error: ", 1)[-1][:200]
