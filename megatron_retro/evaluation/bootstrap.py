"""95 % intervals by drawing documents with replacement: the tokens of a document are not independent of one another."""

import math
from collections.abc import Hashable
from typing import TypeVar

import numpy as np

ROUNDS = 2000

Name = TypeVar("Name", bound=Hashable)


def resampled(columns: dict[Name, np.ndarray], groups: np.ndarray, seed: int = 0) -> dict[Name, np.ndarray]:
    """Sums of columns over the whole, and over rounds in which as many groups are drawn as there are.

    All columns share the draws, so that whatever is computed from several of them is paired.

    Args:
        columns: name -> [n].
        groups: [n], the group (document) of each row.

    Returns:
        name -> [1 + ROUNDS] float64; the first number is the sum over the whole. Fewer than two groups: [1].
    """
    numbers, group = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(group, weights=column) for column in columns.values()], axis=1)
    rows, draw = [sums.sum(0)], np.random.default_rng(seed)
    for _ in range(ROUNDS if len(numbers) > 1 else 0):
        drawn = np.bincount(draw.integers(len(numbers), size=len(numbers)), minlength=len(numbers))
        rows.append(drawn @ sums)
    return dict(zip(columns, np.stack(rows, axis=1), strict=True))


def ratio(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """total / weight, elementwise; nan where the weight is 0."""
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)


def estimate(values: np.ndarray) -> tuple[float | None, list[float] | None]:
    """(value, 95 % percentile interval) of what was computed from `resampled`; None for what cannot be known."""
    rounds = values[1:][np.isfinite(values[1:])]
    interval = [float(bound) for bound in np.percentile(rounds, [2.5, 97.5])] if len(rounds) else None
    return (float(values[0]) if math.isfinite(values[0]) else None), interval
