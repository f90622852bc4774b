"""The longest common run equals a loop over all pairs of positions."""

import numpy as np
import pytest

from megatron_retro.data import overlap
from megatron_retro.data.overlap import longest_common_run


def naive(a: list[int], b: list[int]) -> tuple[int, int, int]:
    best = (0, 0, 0)
    for i in range(len(a)):
        for j in range(len(b)):
            size = 0
            while i + size < len(a) and j + size < len(b) and a[i + size] == b[j + size]:
                size += 1
            if size > best[0]:
                best = (size, i, j)
    return best


def found(a: np.ndarray, b: np.ndarray, a_length: np.ndarray, b_length: np.ndarray) -> list[tuple[int, ...]]:
    return list(zip(*(part.tolist() for part in longest_common_run(a, b, a_length, b_length)), strict=True))


@pytest.mark.parametrize("vocab_size", [2, 5, 30, 1 << 31])
@pytest.mark.parametrize("shape", [(11, 7), (7, 13), (1, 5)])
def test_equals_a_loop(shape: tuple[int, int], vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_SLAB_TOKENS", 100)  # several slabs
    generator = np.random.default_rng(vocab_size)
    num_pairs, (width_a, width_b) = 43, shape
    a = generator.integers(0, vocab_size, (num_pairs, width_a))
    b = generator.integers(0, vocab_size, (num_pairs, width_b))
    copied = min(width_a, width_b) // 2
    b[::3, :copied] = a[::3, width_a - copied :]
    a_length = generator.integers(0, width_a + 1, num_pairs)
    b_length = generator.integers(0, width_b + 1, num_pairs)
    expected = [naive(a[row, : a_length[row]].tolist(), b[row, : b_length[row]].tolist()) for row in range(num_pairs)]
    assert found(a, b, a_length, b_length) == expected


def test_of_equally_long_runs_the_first_in_a_then_in_b() -> None:
    a, b = np.array([[7, 8, 1, 7, 8, 2]]), np.array([[3, 7, 8, 4, 7, 8]])
    assert found(a, b, np.array([6]), np.array([6])) == [(2, 0, 1)]
    assert found(b, a, np.array([6]), np.array([6])) == [(2, 1, 0)]


@pytest.mark.parametrize("width", [64, 255, 256, 300])
def test_identical_rows_share_all(width: int) -> None:
    """Also where a row is longer than a byte counts; one token over and over is the longest table of runs."""
    rows = np.stack([np.arange(width), np.full(width, 3)])
    length = np.array([width, width])
    assert found(rows, rows, length, length) == [(width, 0, 0)] * 2


def test_padding_is_never_shared() -> None:
    rows = np.array([[5, 0, 0], [0, 0, 0]])
    assert found(rows, rows, np.array([1, 0]), np.array([1, 3])) == [(1, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize(("num_pairs", "width_a", "width_b"), [(0, 4, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing_to_compare(num_pairs: int, width_a: int, width_b: int) -> None:
    a, b = np.zeros((num_pairs, width_a), np.int64), np.zeros((num_pairs, width_b), np.int64)
    lengths = np.full(num_pairs, width_a), np.full(num_pairs, width_b)
    assert found(a, b, *lengths) == [(0, 0, 0)] * num_pairs
