"""Compare two executors output by output: signal-to-noise, cosine, largest error, agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from deploycc.core.backend import Executor
    from deploycc.core.data import Dataset

Progress = Callable[[int, int], None]
PERFECT_DB = 200.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one output of a built model compares with the FP32 original.

    ``sqnr_db`` is ``10 log10(||y||^2 / ||y' - y||^2)``, at most 200. ``agreement`` is the share of equal decisions: the class
    (argmax of the last axis) for outputs of rank 2, the side of 0.5 for maps in 0..1, None where neither applies. ``finite`` says
    that the built model is finite wherever the original is.
    """

    output: str
    sqnr_db: float
    cosine: float
    max_abs: float
    agreement: float | None
    finite: bool
    samples: int


@dataclass(slots=True)
class _Sums:
    signal: float = 0.0
    other: float = 0.0
    cross: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    agreed: float = 0.0
    decisions: int = 0
    is_map: bool = True
    finite: bool = True
    samples: int = 0

    def add(self, reference: np.ndarray, built: np.ndarray) -> None:
        """Take in one batch; where the reference itself is not finite there is nothing to compare."""
        a, b = reference.astype(np.float64), built.astype(np.float64)
        self.samples += len(a) if a.ndim else 1
        if a.shape != b.shape:  # The number of results depends on the data: every number of both counts as noise.
            a, b = np.append(a, np.zeros(b.size)), np.append(np.zeros(a.size), b)
            self.is_map = False
        comparable = np.isfinite(a)
        self.finite &= bool(np.all(np.isfinite(b[comparable])))
        a, b = np.where(comparable, a, 0.0), np.where(comparable & np.isfinite(b), b, 0.0)
        self.signal += float(np.vdot(a, a))
        self.other += float(np.vdot(b, b))
        self.cross += float(np.vdot(a, b))
        self.noise += float(np.sum((a - b) ** 2))
        self.largest = max(self.largest, float(np.abs(a - b).max(initial=0.0)))
        if a.ndim == 2 and a.shape[1] > 1:
            self.agreed += float((a.argmax(1) == b.argmax(1)).sum())
            self.decisions += len(a)
        elif self.is_map and a.size and a.min() >= 0.0 and a.max() <= 1.0:
            self.agreed += float(((a > 0.5) == (b > 0.5)).sum())
            self.decisions += a.size
        else:
            self.is_map, self.agreed, self.decisions = False, 0.0, 0

    def result(self, name: str) -> Comparison:
        sqnr = PERFECT_DB if self.noise == 0 else (10 * math.log10(self.signal / self.noise) if self.signal else -PERFECT_DB)
        norm = math.sqrt(self.signal * self.other)
        cosine = 1.0 if self.noise == 0 else (self.cross / norm if norm else 0.0)
        agreement = self.agreed / self.decisions if self.decisions else None
        return Comparison(name, min(sqnr, PERFECT_DB), cosine, self.largest, agreement, self.finite, self.samples)


def compare(
    reference: Executor, built: Executor, data: Dataset, *, batch: int, progress: Progress = lambda done, total: None
) -> list[Comparison]:
    """Run both on the same batches and return one Comparison per floating-point output."""
    sums: dict[str, _Sums] = {}
    done = 0
    for feeds in data.batches(batch):
        expected, found = reference(feeds), built(feeds)
        for name, value in _floats(expected).items():
            sums.setdefault(name, _Sums()).add(value, found[name])
        done += len(next(iter(feeds.values())))
        progress(done, data.samples)
    return [s.result(name) for name, s in sums.items()]


def _floats(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v for k, v in outputs.items() if np.issubdtype(v.dtype, np.floating) or np.issubdtype(v.dtype, np.integer)}
