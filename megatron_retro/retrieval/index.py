"""The database's index: made by a FAISS factory string, trained on a sample, filled in shards.

    index/trained.faiss     trained and empty
    index/shard-<i>.faiss   a contiguous range of blocks' database chunks, under their chunk ids

The database is the chunks of the documents in the train split. The metric is L2.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.errors import UserError
from megatron_retro.retrieval.blocks import Block
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.workdir import sync_directory

EXACT_LIMIT = 300_000  # database chunks up to which a matrix product over all is cheaper than an index is good

_POINTS_A_LIST = 50  # training points; FAISS asks for 39 at least
_POINTS_AT_LEAST = 16_384  # for the codebooks of quantizers


def database_chunks(table: ChunkTable, weights: tuple[float, ...]) -> np.ndarray:
    """Ids of the chunks that may be neighbors, ascending int64.

    Raises:
        UserError: there are none.
    """
    chunks = table.chunks_of(table.documents_in("train", weights))
    if not len(chunks):
        raise UserError(f"--split {','.join(map(str, weights))} leaves no document of {table.num_documents} for train")
    return chunks


def choose_factory(wanted: str, num_chunks: int, width: int) -> str:
    """The factory string of "auto" by the database's size, else `wanted` itself."""
    if wanted != "auto":
        return wanted
    if num_chunks <= EXACT_LIMIT:
        return "Flat"
    num_lists = next((lists for most, lists in _LISTS if num_chunks <= most), _LISTS[-1][1])
    codes = next(codes for codes in range(min(64, width), 0, -1) if width % codes == 0)
    code = "SQ8" if num_chunks <= 10_000_000 else f"PQ{codes}"
    return f"IVF{num_lists or 4 * math.isqrt(num_chunks)}_HNSW32,{code}"


_LISTS = ((1_000_000, 0), (10_000_000, 1 << 14), (100_000_000, 1 << 16), (1_000_000_000, 1 << 18))


def auto_nprobe(num_lists: int) -> int:
    """Neighbors of other documents lie far: 64 of 1,024 lists, 256 of 16,384, 1,024 of 262,144."""
    return min(num_lists, max(8, 2 * math.isqrt(num_lists)))


def train_index(factory: str, embeddings: EmbeddingTable, database: np.ndarray, width: int, seed: int) -> Any:
    """A trained, empty index that takes vectors with their ids.

    Raises:
        UserError: FAISS refuses the factory string, for this width or this number of chunks.
    """
    import faiss

    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_L2)
        if inverted_lists(index) is None and not isinstance(index, faiss.IndexIDMap):
            index = faiss.IndexIDMap2(index)
        if not index.is_trained:
            index.train(_sample(index, embeddings, database, seed))
        trial = faiss.clone_index(index)
        trial.add_with_ids(np.zeros((1, width), np.float32), np.zeros(1, np.int64))
    except RuntimeError as error:
        raise UserError(
            f"--retro-index-str {factory}: FAISS cannot make it for {len(database)} chunks of width {width} "
            f"({_reason(error)}); give another factory string, or auto"
        ) from None
    return index


def inverted_lists(index: Any) -> Any:
    """The IVF part of an index, or None."""
    import faiss

    inner = faiss.try_extract_index_ivf(index)
    return None if inner is None else faiss.downcast_index(inner)


def plan_shards(blocks: list[Block], num_shards: int) -> list[list[Block]]:
    """Contiguous, about equal ranges of blocks."""
    bounds = [len(blocks) * shard // num_shards for shard in range(num_shards + 1)]
    return [blocks[begin:end] for begin, end in itertools.pairwise(bounds)]


def fill(
    index: Any, blocks: list[Block], embeddings: EmbeddingTable, database: np.ndarray, advance: Callable[[int], None]
) -> None:
    """Add the database's chunks of `blocks`, under their chunk ids; `advance` is told the chunks of each block."""
    for block in blocks:
        begin, end = np.searchsorted(database, (block.first, block.first + len(block)))
        chunks = database[begin:end]
        if len(chunks):
            index.add_with_ids(embeddings.rows(chunks).astype(np.float32), chunks)
        advance(len(block))


def write_index(path: pathlib.Path, index: Any) -> None:
    """Write an index under a temporary name, then give it its name."""
    import faiss

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    faiss.write_index(index, str(temporary))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def read_index(path: pathlib.Path, width: int) -> Any:
    """Read an index of embeddings of `width`.

    Raises:
        UserError: it is no index, or of another width.
    """
    import faiss

    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} is not a FAISS index ({_reason(error)}); restore it from a backup") from None
    if index.d != width:
        raise UserError(
            f"{path} holds vectors of width {index.d}, the embeddings of --retro-work-dir have width {width}; "
            "restore the index that was made from them, or build a new work dir"
        )
    return index


def _sample(index: Any, embeddings: EmbeddingTable, database: np.ndarray, seed: int) -> np.ndarray:
    lists = inverted_lists(index)
    wanted = max(_POINTS_AT_LEAST, _POINTS_A_LIST * lists.nlist if lists is not None else 0)
    chosen = np.random.default_rng(seed).choice(len(database), min(wanted, len(database)), replace=False)
    return embeddings.rows(database[np.sort(chosen)]).astype(np.float32)


def _reason(error: RuntimeError) -> str:
    """FAISS's message without its place in the source."""
    return " ".join(str(error).split()).rsplit("Error: ", 1)[-1][:200]
