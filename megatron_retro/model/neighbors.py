"""Retrieved tokens as the model reads them: one fixed axis order, and what is masked.

Axes: B batch, L chunks a sample, K neighbors, R retrieved tokens. The encoder works on [R, K·B·L, …] like any
transformer on [sequence, batch, …], and chunked cross-attention reads the same memory as [R·K, B·L, …].
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The retrieved tokens of a batch, ready for encoder and cross-attention.

    A missing neighbor (length 0) is masked for cross-attention. A chunk without any neighbor is marked not readable;
    its rows are left unmasked so that every softmax stays finite, and its result is multiplied by zero.

    Attributes:
        tokens_KBLxR: token ids.
        token_mask: [K·B·L, 1, 1, R] bool, True where the encoder's self-attention may look.
        key_mask: [B·L, 1, 1, R·K] bool, True where cross-attention may look.
        readable_BxL: bool, whether the chunk has any neighbor.
    """

    tokens_KBLxR: Tensor
    token_mask: Tensor
    key_mask: Tensor
    readable_BxL: Tensor

    @classmethod
    def of(cls, tokens_BxLxKxR: Tensor, lengths_BxLxK: Tensor) -> "Neighbors":
        """Build from token ids (int64) and the number of tokens of each neighbor (int64, 0: no neighbor)."""
        num_samples, num_chunks, num_neighbors, num_tokens = tokens_BxLxKxR.shape
        position = torch.arange(num_tokens, device=tokens_BxLxKxR.device)
        valid_BxLxKxR = position < lengths_BxLxK[..., None]
        present_BxLxK = lengths_BxLxK > 0
        readable_BxL = present_BxLxK.any(-1)
        token_mask_BxLxKxR = valid_BxLxKxR | ~present_BxLxK[..., None]
        key_mask_BxLxKxR = valid_BxLxKxR | ~readable_BxL[..., None, None]
        return cls(
            _kbl_first(tokens_BxLxKxR).reshape(-1, num_tokens),
            _kbl_first(token_mask_BxLxKxR).reshape(-1, 1, 1, num_tokens),
            key_mask_BxLxKxR.transpose(2, 3).reshape(num_samples * num_chunks, 1, 1, num_tokens * num_neighbors),
            readable_BxL,
        )

    def readable_positions(self, num_positions: int, chunk_length: int) -> Tensor:
        """Whether position t reads any neighbor: t + 1 - C lies in a readable chunk. [num_positions, B] bool."""
        by_chunk = self.readable_BxL.t().repeat_interleave(chunk_length, 0)
        behind = num_positions - (chunk_length - 1) - by_chunk.shape[0]  # negative where the last chunk is cut short
        return F.pad(by_chunk, (0, 0, chunk_length - 1, behind))


def _kbl_first(x_BxLxKxR: Tensor) -> Tensor:
    return x_BxLxKxR.permute(2, 0, 1, 3)
