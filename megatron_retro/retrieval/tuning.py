"""How far an index must look to find enough: measured against exact search on a sample of chunks."""

import math
from typing import Any

import numpy as np

from megatron_retro import distributed
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.retrieval.database import Database
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.exact import ExactSearch
from megatron_retro.retrieval.index import Shards, inverted_lists
from megatron_retro.retrieval.index_search import IndexSearch
from megatron_retro.retrieval.join import nearest_lists
from megatron_retro.retrieval.ranking import recall

SAMPLE = 2000  # queries
K_TRAIN = 2  # neighbors that a model reads; recall@2 is what is tuned

_MOST_PROBES = 8192
_EF_SEARCH = (16, 32, 64, 128, 256, 512, 1024, 2048)


def sample_truth(
    table: ChunkTable, embeddings: EmbeddingTable, database: Database, *, k: int, seed: int, device: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True neighbors of a random sample of all chunks, found by all ranks together.

    Returns:
        (chunks [n] int64, ids [n, k] int64, distances [n, k] float32).
    """
    count = min(SAMPLE, table.num_chunks)
    chunks = np.sort(np.random.default_rng(seed).choice(table.num_chunks, count, replace=False))
    mine = chunks[distributed.rank() :: distributed.world_size()]
    search = ExactSearch(embeddings, database, device)
    found = distributed.together(lambda: search.search(embeddings.rows(mine), table.document_chunks(mine), k))
    every = distributed.all_gather((mine, *found))
    chunks, ids, distances = (np.concatenate(parts) for parts in zip(*every, strict=True))
    order = np.argsort(chunks)
    return chunks[order], ids[order], distances[order]


def tune_nprobe(
    shard: Any, embeddings: EmbeddingTable, chunks: np.ndarray, true_ids: np.ndarray, target: float
) -> tuple[int, float]:
    """The smallest nprobe whose recall is surely (95 %, one-sided) at least `target` in a `ListJoin`.

    A join misses exactly the neighbors whose list is not probed, so the rank of each true neighbor's list among the
    query's nearest lists tells the recall of every nprobe at once.

    Args:
        shard: any shard of the index.
        embeddings: of all chunks.
        chunks: [n] int64 sampled chunks.
        true_ids: [n, K] int64 their true neighbors, -1 for none.
        target: recall wanted.

    Returns:
        (nprobe, its recall on the sample); the recall is below the target where no nprobe reaches it.
    """
    num_lists = inverted_lists(shard).nlist
    probes = nearest_lists(shard, embeddings.rows(chunks), min(num_lists, _MOST_PROBES))
    row, column = np.nonzero(true_ids >= 0)
    if not len(row):
        return 1, 1.0
    home = nearest_lists(shard, embeddings.rows(true_ids[row, column]), 1)
    is_home = probes[row] == home
    rank = np.where(is_home.any(1), is_home.argmax(1), probes.shape[1])
    share = np.cumsum(np.bincount(rank, minlength=probes.shape[1] + 1))[: probes.shape[1]] / len(rank)
    doubt = 1.645 * np.sqrt(share * (1 - share) / len(rank))
    enough = np.flatnonzero(share - doubt >= target)
    best = int(enough[0]) if len(enough) else len(share) - 1
    return best + 1, float(share[best])


def tune_ef_search(
    shards: Shards,
    table: ChunkTable,
    embeddings: EmbeddingTable,
    database: Database,
    chunks: np.ndarray,
    true_distances: np.ndarray,
    target: float,
) -> tuple[int, float]:
    """The smallest power of two as a graph's efSearch that reaches `target` on the sample, and its recall."""
    found = 0.0
    k = true_distances.shape[1]
    for ef_search in _EF_SEARCH:
        search = IndexSearch(shards.with_parameters({"efSearch": ef_search}), embeddings, database, nprobe=1)
        _, distances = search.search(embeddings.rows(chunks), table.document_chunks(chunks), k)
        found = recall(distances, true_distances)
        if found - 1.645 * math.sqrt(found * (1 - found) / max(1, len(chunks) * k)) >= target:
            break
    return ef_search, found
