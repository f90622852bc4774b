"""What turns chunks into neighbors: by the distance of embeddings here, by words in `lexical`."""

from typing import Protocol

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.retrieval.embedding import EmbeddingTable
from megatron_retro.retrieval.ranking import Search


class Retriever(Protocol):
    def neighbors(self, chunks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best database chunks for each chunk, none from its own document.

        Args:
            chunks: [n] int64 chunk ids.
            k: neighbors wanted.

        Returns:
            (ids [n, k] int64 with -1 for none, distances [n, k] float32, ascending, with inf for none). What a
            distance is depends on the retriever: squared L2 of embeddings, or a BM25 score with its sign turned.
        """


class DenseRetriever:
    """Nearest embeddings."""

    def __init__(self, search: Search, embeddings: EmbeddingTable, table: ChunkTable):
        self._search, self._embeddings, self._table = search, embeddings, table

    def neighbors(self, chunks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._search.search(self._embeddings.rows(chunks), self._table.document_chunks(chunks), k)
