"""Retrieval for text that is in no work dir: what `inspect` and generation ask."""

import numpy as np

from megatron_retro.errors import UserError
from megatron_retro.retrieval.embedding import Embedder, weights_print
from megatron_retro.retrieval.index_search import IndexSearch
from megatron_retro.retrieval.query import OpenIndex
from megatron_retro.workdir import WorkDir

_BATCH_SIZE = 32


class LiveRetriever:
    """The embedder and the index of a finished work dir, ready for queries that come one by one.

    Raises:
        UserError: the index is not built, or the embedder cannot be loaded.
    """

    def __init__(self, work: WorkDir):
        self._index = OpenIndex.open(work)
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

    def search(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest database chunks of texts.

        Returns:
            (ids [n, k] int64 with -1 for none, squared L2 distances [n, k] float32 with inf for none).
        """
        queries = self._embedder.embed(self._embedder.encode(texts))
        return self._search.search(queries, np.zeros((len(texts), 2), np.int64), k)
