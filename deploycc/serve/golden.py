"""Golden inputs and outputs: what a server must reproduce before it serves, and how exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.errors import BackendError
from deploycc.verify.numerics import PERFECT_DB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploycc.core.backend import Executor

# Rounding units: half the distance of 1 to the next number. TensorRT multiplies FP32 matrices in TF32 unless told otherwise.
FP32_UNIT, TF32_UNIT = 2.0**-24, 2.0**-11
# Noise power that the sums inside a node may add to the rounding of its result.
SLACK = 64.0
# Two independent roundings of one model differ by the sum of both noises (3 dB); few samples estimate it to about as much.
TWO_ROUNDINGS_DB = 6.0


@dataclass(frozen=True, slots=True)
class Golden:
    """Outputs by name for the golden inputs, and the least SQNR in dB that a runtime must reach against each."""

    outputs: Mapping[str, np.ndarray]
    minimum_sqnr_db: Mapping[str, float]


def rounding_limit_db(nodes: int, unit: float) -> float:
    """Return the SQNR to expect of a runtime that rounds in another order.

    Each of ``nodes`` results carries relative noise of power ``SLACK * unit**2``, and independent noises add up.
    """
    return -10 * math.log10(max(nodes, 1) * SLACK * unit**2)


def limits(measured: Mapping[str, float], *, nodes: int, unit: float) -> dict[str, float]:
    """Return the least SQNR per output, from what the build measured against the original.

    The quantized model and an engine of it are two roundings of the same function: their distance is about the sum of both
    noises, and never expected to be below what plain rounding in another order explains.
    """
    ceiling = rounding_limit_db(nodes, unit)
    return {name: round(min(db - TWO_ROUNDINGS_DB, ceiling), 2) for name, db in measured.items()}


def sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Return ``10 log10(||y||^2 / ||y' - y||^2)``, at most 200, and minus 200 for another shape or numbers that are not finite."""
    if expected.shape != found.shape:
        return -PERFECT_DB
    wanted, got = expected.astype(np.float64), found.astype(np.float64)
    noise, signal = float(np.sum((wanted - got) ** 2)), float(np.vdot(wanted, wanted))
    if noise == 0.0:
        return PERFECT_DB
    return min(10 * math.log10(signal / noise), PERFECT_DB) if signal and math.isfinite(noise) else -PERFECT_DB


def run(executor: Executor, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the outputs of ``executor`` in the model's order.

    Raises:
        BackendError: when an output is not finite: such a model cannot be checked by its outputs.
    """
    outputs = executor(feeds, names)
    for name, value in outputs.items():
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise BackendError(f"the output '{name}' is not finite on the golden inputs", at="golden outputs", fix="give other --data")
    return outputs


def check(golden: Golden, found: Mapping[str, np.ndarray]) -> list[str]:
    """Return one sentence per output that misses its limit."""
    missed = []
    for name, least in golden.minimum_sqnr_db.items():
        db = sqnr_db(golden.outputs[name], found[name])
        if db < least:
            missed.append(f"output '{name}' has {db:.1f} dB against the golden output, {least:.1f} dB are needed")
    return missed


def save(arrays: Mapping[str, np.ndarray], folder: Path, prefix: str) -> dict[str, str]:
    """Write one ``.npy`` per array and return file names by array name; names of tensors are no names of files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for index, (name, array) in enumerate(arrays.items()):
        files[name] = f"{prefix}-{index}.npy"
        np.save(folder / files[name], np.ascontiguousarray(array), allow_pickle=False)
    return files
