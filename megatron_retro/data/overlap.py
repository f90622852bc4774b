"""Copied text: the longest run of tokens that two rows share.

For rows a, b the table run[i, j] = run[i-1, j-1] + 1 where a_i = b_j, else 0, holds the length of the common run that
ends at (i, j). One row of it at a time is kept, for many pairs at once.
"""

import numpy as np

_SLAB_TOKENS = 1 << 18  # of a and b together: a few megabytes of temporary memory, near the processor's cache


def longest_common_run(
    a: np.ndarray, b: np.ndarray, a_length: np.ndarray, b_length: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The longest run of consecutive equal tokens of each pair of rows (longest common substring).

    Args:
        a: [n, A] token ids, 0 … 2^31 - 1.
        b: [n, B] token ids.
        a_length: [n] int64, how many tokens of each row of `a` count; what stands behind them never matches.
        b_length: [n] int64, the same of `b`.

    Returns:
        (length, start in a, start in b), each [n] int64; of equally long runs the first in `a`, then the first in `b`.
        All three are 0 where no token is shared.
    """
    found = np.zeros((3, len(a)), np.int64)
    step = max(1, _SLAB_TOKENS // max(1, a.shape[1] + b.shape[1]))
    for begin in range(0, len(a), step):
        here = slice(begin, begin + step)
        a_Axn = np.where(np.arange(a.shape[1])[:, None] < a_length[here], a[here].T, -1).astype(np.int32)
        b_Bxn = np.where(np.arange(b.shape[1])[:, None] < b_length[here], b[here].T, -2).astype(np.int32)
        found[:, here] = _longest_runs(a_Axn, b_Bxn)
    return found[0], found[1], found[2]


def _longest_runs(a_Axn: np.ndarray, b_Bxn: np.ndarray) -> np.ndarray:
    """[3, n] int64: length, start in a, start in b. Pairs are the last axis, so every step runs along memory."""
    width, num_pairs = b_Bxn.shape
    run = np.zeros((width + 1, num_pairs), np.min_scalar_type(min(len(a_Axn), width) + 1))  # row 0: no run before b_0
    longer, longest = np.empty_like(run[1:]), np.zeros(num_pairs, run.dtype)
    end_a, end_b = np.zeros((2, num_pairs), np.int64)
    for position, token_n in enumerate(a_Axn):
        np.add(run[:-1], 1, out=longer)
        np.multiply(longer, b_Bxn == token_n, out=run[1:])
        best = run.max(axis=0)
        improved = np.flatnonzero(best > longest)
        longest[improved] = best[improved]
        end_a[improved] = position + 1
        end_b[improved] = run[:, improved].argmax(axis=0)
    length = longest.astype(np.int64)
    return np.stack([length, end_a - length, end_b - length])
