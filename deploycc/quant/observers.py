"""Streamed statistics of one tensor: exact extremes, and a histogram of sampled magnitudes.

The histogram covers ``[0, 2^e)`` with a fixed number of bins. When a larger magnitude arrives, ``e`` grows and bins merge in
pairs, which is exact: the result depends neither on the order of the data nor on the batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

BINS = 4096


@dataclass(slots=True)
class Histogram:
    """Counts of magnitudes in ``[0, 2^exponent)``."""

    exponent: int = -24
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, magnitudes: np.ndarray) -> None:
        """Count non-negative finite ``magnitudes``."""
        if magnitudes.size == 0:
            return
        top = float(magnitudes.max())
        while top >= 2.0**self.exponent:
            self._grow(max(1, math.frexp(top)[1] - self.exponent))
        # A product with a power of two is exact, so that the index of what is below 2^exponent is below BINS.
        index = (magnitudes * np.float32(BINS * 2.0**-self.exponent)).astype(np.intp)
        self.counts += np.bincount(index.reshape(-1), minlength=BINS)

    def _grow(self, steps: int) -> None:
        for _ in range(min(steps, 13)):
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
        self.exponent += steps

    @property
    def width(self) -> float:
        """Return the width of a bin."""
        return float(2.0**self.exponent / BINS)


@dataclass(slots=True)
class Observer:
    """Extremes over every element, and a histogram over a fixed sample of elements per row."""

    low: float = math.inf
    high: float = -math.inf
    histogram: Histogram = field(default_factory=Histogram)

    @property
    def limit(self) -> float:
        """Return the largest magnitude seen."""
        return max(abs(self.low), abs(self.high)) if self.low <= self.high else 0.0

    def extend(self, low: float, high: float) -> None:
        """Take in the extremes of another batch."""
        self.low, self.high = min(self.low, low), max(self.high, high)


@dataclass(frozen=True, slots=True)
class Channels:
    """Extremes per channel ``[C]`` over every element, and rows ``[rows, C]`` of channels of a sample of positions of some images."""

    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray

    def moved(self, scale: np.ndarray, shift: np.ndarray) -> Channels:
        """Return what is known of ``(x - shift) * scale``, both of one number per channel."""
        return Channels(*((each - shift) * scale for each in (self.low, self.high, self.rows)))

    def observer(self) -> Observer:
        """Return the statistics of all channels together."""
        found = Observer()
        found.extend(float(self.low.min()), float(self.high.max()))
        found.histogram.add(np.abs(self.rows).reshape(-1))
        return found
