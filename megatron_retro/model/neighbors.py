"""Retrieved tokens as the model reads them: one fixed axis order, and what is masked.

Axes: B batch, L chunks a sample, M chunks of the batch that read, K neighbors, R retrieved tokens. The encoder works on
[R, K·M, …] like any transformer on [sequence, batch, …], and chunked cross-attention reads the same memory as
[R·K, M, …].
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The retrieved tokens of a batch, ready for encoder and cross-attention.

    Only M of the B·L chunks are here, those that have a neighbor: the others cost nothing. A missing neighbor (length
    0) of such a chunk is masked for cross-attention. A chunk that is here without any neighbor is marked not readable:
    its rows are left unmasked so that every softmax stays finite, and its result is multiplied by zero.

    Attributes:
        tokens_KMxR: token ids.
        token_mask: [K·M, 1, 1, R] bool, True where the encoder's self-attention may look.
        key_mask: [M, 1, 1, R·K] bool, True where cross-attention may look.
        readable_M: bool, whether the chunk has any neighbor.
        chunks_M: int64, the chunk's place among B·L, ascending; None where M = B·L.
        num_samples: B.
        num_chunks: L.
    """

    tokens_KMxR: Tensor
    token_mask: Tensor
    key_mask: Tensor
    readable_M: Tensor
    chunks_M: Tensor | None
    num_samples: int
    num_chunks: int

    @classmethod
    def of(
        cls,
        tokens_BxLxKxR: Tensor,
        lengths_BxLxK: Tensor,
        chunks_M: Tensor | None = None,
        *,
        hides_padding: bool = True,
    ) -> "Neighbors":
        """Build from token ids (int64) and the number of tokens of each neighbor (int64, 0: no neighbor).

        Args:
            hides_padding: whether what stands behind these tokens is masked.
        """
        if not hides_padding:
            lengths_BxLxK = torch.where(lengths_BxLxK > 0, tokens_BxLxKxR.shape[-1], 0)
        num_samples, num_chunks, num_neighbors, num_tokens = tokens_BxLxKxR.shape
        tokens_MxKxR, lengths_MxK = tokens_BxLxKxR.flatten(0, 1), lengths_BxLxK.flatten(0, 1)
        if chunks_M is not None:
            tokens_MxKxR, lengths_MxK = tokens_MxKxR[chunks_M], lengths_MxK[chunks_M]
        position = torch.arange(num_tokens, device=tokens_MxKxR.device)
        valid_MxKxR = position < lengths_MxK[..., None]
        present_MxK = lengths_MxK > 0
        readable_M = present_MxK.any(-1)
        token_mask_MxKxR = valid_MxKxR | ~present_MxK[..., None]
        key_mask_MxKxR = valid_MxKxR | ~readable_M[:, None, None]
        return cls(
            tokens_MxKxR.transpose(0, 1).reshape(-1, num_tokens),
            token_mask_MxKxR.transpose(0, 1).reshape(-1, 1, 1, num_tokens),
            key_mask_MxKxR.transpose(1, 2).reshape(-1, 1, 1, num_tokens * num_neighbors),
            readable_M,
            chunks_M,
            num_samples,
            num_chunks,
        )

    def take(self, x_CxBLx: Tensor) -> Tensor:
        """Of something for each chunk, what belongs to the chunks that are here: [C, B·L, …] → [C, M, …]."""
        return x_CxBLx if self.chunks_M is None else x_CxBLx.index_select(1, self.chunks_M)

    def put_back(self, x_CxMx: Tensor) -> Tensor:
        """Inverse of `take`, zero for the chunks that are not here: [C, M, …] → [C, B·L, …]."""
        if self.chunks_M is None:
            return x_CxMx
        num_rows = self.num_samples * self.num_chunks
        return x_CxMx.new_zeros(len(x_CxMx), num_rows, *x_CxMx.shape[2:]).index_copy(1, self.chunks_M, x_CxMx)

    def readable_positions(self, num_positions: int, chunk_length: int) -> Tensor:
        """Whether position t reads any neighbor: t + 1 - C lies in a readable chunk. [num_positions, B] bool."""
        readable_BxL = self.put_back(self.readable_M[None]).view(self.num_samples, self.num_chunks)
        by_chunk = readable_BxL.t().repeat_interleave(chunk_length, 0)
        behind = num_positions - (chunk_length - 1) - by_chunk.shape[0]  # negative where the last chunk is cut short
        return F.pad(by_chunk, (0, 0, chunk_length - 1, behind))
