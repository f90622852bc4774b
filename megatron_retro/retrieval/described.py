"""Neighbors for people: what they say, and where it stands."""

from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable, corpus_of
from megatron_retro.data.tokenizer import Tokenizer


def document_names(table: ChunkTable, documents: np.ndarray) -> list[str]:
    """`<corpus>:<number>` of document ids [n]; the number counts from 0 within the corpus."""
    corpora = corpus_of(table.corpus_documents, documents)
    numbers = documents - table.corpus_documents[corpora]
    return [f"{table.corpora[corpus].name}:{number}" for corpus, number in zip(corpora, numbers, strict=True)]


def describe_neighbors(
    table: ChunkTable, tokenizer: Tokenizer, ids: np.ndarray, distances: np.ndarray
) -> list[dict[str, Any]]:
    """Rank, distance, chunk id, document, text and continuation of a chunk's neighbors.

    Args:
        ids: [K] int64, best first, -1 for none.
        distances: [K] float32; one that is not finite, of a random neighbor, becomes None.
    """
    ids, distances = ids[ids >= 0], distances[ids >= 0]
    length = table.chunk_length
    tokens, lengths = table.tokens(ids, 2 * length, tokenizer.pad)
    rows = [row[:size].tolist() for row, size in zip(tokens, lengths, strict=True)]
    texts = tokenizer.decode([row[:length] for row in rows])
    continuations = tokenizer.decode([row[length:] for row in rows])
    return [
        {
            "rank": rank + 1,
            "distance": round(float(distances[rank]), 4) if np.isfinite(distances[rank]) else None,
            "chunk": int(ids[rank]),
            "document": document,
            "text": texts[rank],
            "continuation": continuations[rank],
        }
        for rank, document in enumerate(document_names(table, table.document(ids)))
    ]
