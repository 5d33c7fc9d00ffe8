"""Statistics of repeated measurements: how sure a mean is, and whether two orders agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CHECKPOINTS: tuple[int, ...] = tuple(2**k * base for k in range(3, 24) for base in (2, 3))
Order = Callable[[np.ndarray], np.ndarray]


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of two vectors, None where one is constant or shorter than three."""
    if len(first) < 3:
        return None
    a, b = (_ranks(v) - (len(v) - 1) / 2 for v in (first, second))
    scale = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[places])


def agreement(rows: np.ndarray, order: Order = np.asarray) -> float | None:
    """Return the rank correlation between the means of the even and of the odd rows, each turned into what is ordered by ``order``."""
    return spearman(*(order(rows[start::2].mean(axis=0)) for start in (0, 1))) if len(rows) > 1 else None


def agreement_of(rows: np.ndarray, order: Order = np.asarray) -> tuple[tuple[int, float], ...]:
    """Return pairs of a number of rows and the ``agreement`` of that many: at every checkpoint, and of all."""
    counts = [*(c for c in CHECKPOINTS if c < len(rows)), len(rows)]
    found = ((count, agreement(rows[:count], order)) for count in counts)
    return tuple((count, value) for count, value in found if value is not None)


def standard_error(rows: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the first axis, NaN for a single row."""
    count = len(rows)
    return rows.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full(rows.shape[1:], np.nan)
