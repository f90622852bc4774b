"""Retrieval for text that is in no work dir: what `inspect` and generation ask."""

from typing import Any

import numpy as np

from megatron_retro.errors import UserError
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.embedding import Embedder, weights_print
from megatron_retro.retrieval.index_search import IndexSearch
from megatron_retro.retrieval.query import OpenIndex, lexical_retriever
from megatron_retro.workdir import WorkDir

_BATCH_SIZE = 32


class LiveRetriever:
    """What found a finished work dir's neighbors, ready for queries that come one by one.

    Attributes:
        table: all chunks.
        tokenizer: of the corpora.

    Raises:
        UserError: the index is not built, or the embedder cannot be loaded.
    """

    def __init__(self, work: WorkDir):
        self._index = OpenIndex.open(work)
        self.table, self.tokenizer = self._index.table, open_tokenizer(work)
        self._kind: str = work.settings["retro_retriever"]
        nprobe = work.settings.get("tuned", {}).get("nprobe", 1)
        self._search = IndexSearch(
            self._index.shards(keep_open=True), self._index.embeddings, self._index.database, nprobe
        )
        facts = work.facts("embeddings")
        self._embedder = Embedder(facts["embedder"], facts["dtype"], _BATCH_SIZE)
        found, width = weights_print(facts["embedder"]), self._embedder.width
        if (found, width) != (facts["weights"], facts["width"]):
            raise UserError(
                f"the embedder {facts['embedder']} has weights {found} of width {width}, --retro-work-dir {work.path} "
                f"was made with {facts['weights']} of width {facts['width']}; restore the checkpoint"
            )
        self._words: Any = None if self._kind == "dense" else lexical_retriever(self._kind, self._index, None)

    def search(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best database chunks for texts.

        Returns:
            (ids [n, k] int64 with -1 for none, distances [n, k] float32 with inf for none, as `Retriever` has them).
        """
        if self._kind == "bm25":
            return self._words.search(texts, k)
        queries, nobody = self._embedder.embed(self._embedder.encode(texts)), np.zeros((len(texts), 2), np.int64)
        if self._kind == "dense":
            return self._search.search(queries, nobody, k)
        near, _ = self._search.search(queries, nobody, max(k, self._words.num_candidates))
        return self._words.rank(texts, near, k)
