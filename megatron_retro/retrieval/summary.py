"""What a finished work dir holds, in figures: `report/summary.json` and the lines printed at the end."""

import collections
import json
from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.neighbors import NeighborTable, exact_neighbors, recall
from megatron_retro.retrieval.progress import duration
from megatron_retro.workdir import WorkDir, write_atomically

_RECALL_QUERIES = 1000
_RECALL_AT = (2, 10)
_ROWS = 1 << 18


def summarize(work: WorkDir, table: ChunkTable, embeddings: EmbeddingTable, database: np.ndarray) -> dict[str, Any]:
    """Measure a work dir, and write `report/summary.json` (by one rank)."""
    chunks = work.facts("chunks")
    skipped: collections.Counter = collections.Counter()
    for corpus in work.facts("corpus")["corpora"]:
        skipped.update(corpus["skipped"])
    neighbors = NeighborTable(work)
    summary = {
        "documents": chunks["documents"],
        "skipped": dict(skipped),
        "vocab_size": work.facts("tokenizer")["vocab_size"],
        "tokens": chunks["tokens"],
        "chunks": chunks["chunks"],
        "padding_share": 1 - chunks["tokens"] / (chunks["chunks"] * chunks["chunk_length"]),
        "database_chunks": chunks["database_chunks"],
        "embedder": work.facts("embeddings"),
        "index": work.facts("index"),
        "recall": _recall(table, embeddings, database, neighbors, work.settings["seed"]),
        "share_with_fewer_neighbors": _share_with_fewer(neighbors, table.num_chunks),
        "seconds": work.settings.get("seconds", {}),
    }
    text = json.dumps(summary, indent=1)
    write_atomically(work.path / "report" / "summary.json", lambda file: file.write(text.encode()))
    return summary


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in summary["skipped"].items()) or "none"
    recalls = ", ".join(f"@{k} {value:.4f}" for k, value in summary["recall"].items())
    return [
        f"documents            {summary['documents']:,} (skipped: {skipped})",
        f"tokens               {summary['tokens']:,} of a vocabulary of {summary['vocab_size']:,}",
        f"chunks               {summary['chunks']:,} ({summary['padding_share']:.1%} padding)",
        f"database chunks      {summary['database_chunks']:,}",
        f"recall vs exact      {recalls}",
        f"fewer neighbors      {summary['share_with_fewer_neighbors']:.2%} of chunks",
        *(f"time {task:<15} {duration(seconds)}" for task, seconds in summary["seconds"].items()),
    ]


def _recall(
    table: ChunkTable, embeddings: EmbeddingTable, database: np.ndarray, neighbors: NeighborTable, seed: int
) -> dict[str, float]:
    """Recall@K against exact search, for a sample of all chunks."""
    count = min(_RECALL_QUERIES, table.num_chunks)
    chunks = np.sort(np.random.default_rng(seed).choice(table.num_chunks, count, replace=False))
    ks = sorted({min(k, neighbors.num_neighbors) for k in _RECALL_AT})
    _, truth = exact_neighbors(table, embeddings, database, chunks, ks[-1])
    found = neighbors.distances(chunks)
    return {str(k): recall(found[:, :k], truth[:, :k]) for k in ks}


def _share_with_fewer(neighbors: NeighborTable, num_chunks: int) -> float:
    fewer = 0
    for begin in range(0, num_chunks, _ROWS):
        ids = neighbors.ids(np.arange(begin, min(begin + _ROWS, num_chunks)))
        fewer += int((ids[:, -1] < 0).sum())
    return fewer / num_chunks
