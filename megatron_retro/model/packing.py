"""One tensor between pipeline stages: hidden states, and under them the encoder's output.

Stages behind the first RETRO layer need both; megatron-core's schedules send one tensor [rows, B, D]. The encoder's
output is laid under the hidden states as it lies in memory, in rows of B × D; boundaries before the encoder carry
zeros there. Autograd takes the gradients back through the same cut.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def boundary_rows(encoded_shape: tuple[int, int, int], num_samples: int, hidden_size: int) -> int:
    """Rows of B × D that hold an encoder output of this shape."""
    return -(-math.prod(encoded_shape) // (num_samples * hidden_size))


def pack(x_SxBxD: Tensor, encoded: Tensor | None, num_rows: int) -> Tensor:
    """[S, B, D] and the encoder's output, zeros where it is not made yet or shorter, as [S + num_rows, B, D]."""
    if not num_rows:
        return x_SxBxD
    num_samples, hidden_size = x_SxBxD.shape[1:]
    size = num_rows * num_samples * hidden_size
    assert encoded is None or encoded.numel() <= size
    flat = x_SxBxD.new_zeros(size) if encoded is None else F.pad(encoded.flatten(), (0, size - encoded.numel()))
    return torch.cat((x_SxBxD, flat.view(-1, num_samples, hidden_size)))


def unpack(packed: Tensor, num_positions: int, shape: tuple[int, int, int] | None) -> tuple[Tensor, Tensor | None]:
    """Inverse of `pack`, for an encoder output of this shape; None where there is none."""
    if shape is None:
        return packed, None
    return packed[:num_positions], packed[num_positions:].flatten()[: math.prod(shape)].view(shape)
