"""Statistics of repeated measurements: how sure a mean is, and whether two orders agree."""

from __future__ import annotations

import numpy as np


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


def standard_error(rows: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the first axis, NaN for a single row."""
    count = len(rows)
    return rows.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full(rows.shape[1:], np.nan)
