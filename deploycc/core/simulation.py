"""The n-bit quantizers of LRP-QViT and RepQ-ViT, simulated in floating point: no engine computes in them.

Uniform, asymmetric, b bits:   s = (high - low) / (2^b - 1),  z = round(-low / s)
                               q = clip(round(x / s) + z, 0, 2^b - 1),  x^ = s (q - z)
Logarithm to base sqrt 2:      q = round(-2 log2(x / s)),  x^ = s 2^(-q / 2), and 0 where q >= 2^b

``s 2^(-q/2)`` is what RepQ-ViT writes as log2 with a scale per parity, ``s (sqrt 2 if q is odd else 1) 2^(-ceil(q / 2))``: shifts only.
``high`` and ``low`` are percentiles of the values: of 0.999, 0.9999 and 0.99999 the one with the least squared error.
(LRP-QViT, arXiv 2401.11243, section 3; RepQ-ViT, arXiv 2212.08254, sections 3.2 and 3.3, and its public code.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (0.999, 0.9999, 0.99999)


@dataclass(frozen=True, slots=True)
class Uniform:
    """A uniform quantizer; ``scale`` and ``zero_point`` hold one number, or one per channel."""

    bits: int
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]

    @property
    def top(self) -> int:
        """Return the largest code."""
        return int(2**self.bits - 1)

    def codes(self, values: np.ndarray, *, axis: int = -1) -> np.ndarray:
        """Return the codes of ``values``, whose channels lie along ``axis``."""
        scale, zero = self._aligned(values, axis)
        return np.asarray(np.clip(np.rint(values / scale) + zero, 0, self.top))

    def apply(self, values: np.ndarray, *, axis: int = -1) -> np.ndarray:
        """Return what ``values`` become."""
        scale, zero = self._aligned(values, axis)
        return np.asarray(scale * (self.codes(values, axis=axis) - zero), values.dtype)

    def _aligned(self, values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        shape = [1] * values.ndim
        if len(self.scale) > 1:
            shape[axis] = -1
        return (np.array(numbers, values.dtype).reshape(shape) for numbers in (self.scale, self.zero_point))  # type: ignore[return-value]

    def to_json(self) -> dict[str, Any]:
        """Return the quantizer as plain data."""
        return {"law": "uniform", "bits": self.bits, "scale": list(self.scale), "zero_point": list(self.zero_point)}


@dataclass(frozen=True, slots=True)
class Logarithmic:
    """A quantizer of values in (0, 1] to powers of sqrt 2 below ``scale``."""

    bits: int
    scale: float

    @property
    def top(self) -> int:
        """Return the largest code that is not zero's."""
        return int(2**self.bits - 1)

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Return the codes of ``values``; ``top + 1`` stands for zero."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.clip(np.rint(-2 * np.log2(values / values.dtype.type(self.scale))), 0, self.top + 1))

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return what ``values`` become."""
        codes = self.codes(values)
        return np.asarray(np.where(codes > self.top, 0, self.scale * np.exp2(-codes / 2)), values.dtype)

    def to_json(self) -> dict[str, Any]:
        """Return the quantizer as plain data."""
        return {"law": "log sqrt 2", "bits": self.bits, "scale": self.scale}


Quantizer = Uniform | Logarithmic


def quantizer_from_json(body: dict[str, Any]) -> Quantizer:
    """Read what ``to_json`` wrote."""
    if body["law"] == "uniform":
        return Uniform(body["bits"], tuple(body["scale"]), tuple(body["zero_point"]))
    return Logarithmic(body["bits"], body["scale"])


def fit_uniform(values: np.ndarray, bits: int, *, axis: int | None = None) -> Uniform:
    """Return the uniform quantizer of ``values``.

    Args:
        values: of any shape.
        bits: of the codes.
        axis: along which every channel gets a quantizer of its own; None for one quantizer.
    """
    rows = values.reshape(-1, 1) if axis is None else np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    best, least = None, np.full(rows.shape[1], np.inf)
    ends = np.quantile(rows, [*PERCENTILES, *(1 - p for p in PERCENTILES)], axis=0)
    for high, low in zip(ends[: len(PERCENTILES)], ends[len(PERCENTILES) :], strict=True):
        scale, zero = _range(high, low, bits)
        error = np.sum((Uniform(bits, tuple(scale), tuple(zero)).apply(rows) - rows) ** 2, axis=0, dtype=np.float64)
        better = error < least
        best = (scale, zero) if best is None else (np.where(better, scale, best[0]), np.where(better, zero, best[1]))
        least = np.minimum(error, least)
    if best is None:
        raise TypeError("there are no percentiles")
    return Uniform(bits, tuple(best[0].tolist()), tuple(best[1].astype(np.int64).tolist()))


def fit_logarithmic(values: np.ndarray, bits: int) -> Logarithmic:
    """Return the logarithmic quantizer of non-negative ``values``."""
    trials = [Logarithmic(bits, max(float(np.float32(s)), 1e-12)) for s in np.quantile(values, PERCENTILES)]
    return min(trials, key=lambda trial: float(np.sum((trial.apply(values) - values) ** 2, dtype=np.float64)))


def _range(high: np.ndarray, low: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scale (a float32 number) and zero point; a range without extent is widened to hold zero."""
    flat = high - low <= 1e-6 * np.maximum(np.abs(high), np.abs(low))
    high, low = np.where(flat, np.maximum(high, 0), high), np.where(flat, np.minimum(low, 0), low)
    scale = np.where(high > low, (high - low) / (2**bits - 1), 1.0).astype(np.float32).astype(np.float64)
    return scale, np.rint(-low / scale)
