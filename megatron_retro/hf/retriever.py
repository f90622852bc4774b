"""A work dir's database, as `RetroForCausalLM.generate` reads it."""

import os
from typing import Any

from torch import Tensor

from megatron_retro.errors import UserError


class Retriever:
    """Neighbors of chunks of tokens, found and chosen as `tools/generate_retro_text.py` does; each process its own.

    Args:
        work_dir: a finished work dir.
        num_neighbors: K.

    Attributes:
        tokenizer_digest: of the work dir's tokenizer.

    Raises:
        UserError: the work dir is not complete, or K is less than 1 or more than it holds for a chunk.
    """

    def __init__(self, work_dir: str | os.PathLike, num_neighbors: int):
        from megatron_retro.data.chunks import ChunkTable
        from megatron_retro.inference.reader import open_reader
        from megatron_retro.retrieval.live import LiveRetriever
        from megatron_retro.training.data import open_work_dir
        from megatron_retro.workdir import STAGES

        if num_neighbors < 1:
            raise UserError(f"num_neighbors is {num_neighbors}; give at least 1, or no retriever to read nothing")
        work = open_work_dir(str(work_dir))
        work.verify(STAGES)
        table = ChunkTable.open(work)
        self._where, self._chunk_length = work_dir, table.chunk_length
        self._reader: Any = open_reader(work, table, num_neighbors, library=LiveRetriever(work))
        self.tokenizer_digest: str = work.manifest["stages"]["tokenizer"]["digest"]

    def __call__(self, chunks_nxC: Tensor) -> tuple[Tensor, Tensor]:
        """(token ids [n, K, R] int64, their numbers [n, K] int64) of chunks [n, C] int64, on the same device."""
        if chunks_nxC.shape[1] != self._chunk_length:
            raise UserError(
                f"the model's chunks have {chunks_nxC.shape[1]} tokens, those of {self._where} {self._chunk_length}; "
                "use a work dir built with that --retro-chunk-length"
            )
        reads = self._reader.read_alone(chunks_nxC.tolist())
        return reads.tokens_nxKxR.to(chunks_nxC.device), reads.lengths_nxK.to(chunks_nxC.device)
