"""The arithmetic of ``QuantizeLinear``: scales of activations and weights, symmetric, zero point 0 (rule R1)."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from deploycc.core.formats import FORMATS, INT8, Format

SCALE_FLOOR = {"fp32": 1e-12, "fp16": 1e-6, "bf16": 1e-12}
_SCALE_TYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_CODE_TYPES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


def round_scale(scale: np.ndarray | float, base: Format) -> np.ndarray:
    """Return ``scale`` as float32 values that ``base`` represents exactly, finite and none below its floor (rules R2 and R7)."""
    bounded = np.clip(np.asarray(scale, np.float32), SCALE_FLOOR[base.name], largest(base))
    return np.asarray(bounded.astype(_SCALE_TYPES[base.name]), np.float32)


def largest_code(format: Format) -> float:
    """Return the largest value that ``QuantizeLinear`` produces in ``format``.

    Raises:
        TypeError: for a format that is not quantized.
    """
    if format.max_value is None:
        raise TypeError(f"{format} is not a quantized format")
    return format.max_value


def activation_scale(limit: float, format: Format, base: Format) -> float:
    """Return the per-tensor scale that maps ``limit`` to the largest magnitude: ``limit / reach``.

    Raises:
        TypeError: for a format whose activations have no calibrated scale.
    """
    if format.reach is None:
        raise TypeError(f"{format} has no calibrated scale")
    return float(round_scale(limit / format.reach, base))


def scale_like(values: np.dtype, scale: np.ndarray | float) -> np.ndarray:
    """Return ``scale`` in the type of the values it scales (rule R7): a model may come in 16 bits."""
    base = next(FORMATS[name] for name, dtype in _SCALE_TYPES.items() if dtype == values)
    return round_scale(scale, base).astype(values)


def quantize_weight(weight: np.ndarray, *, axis: int, format: Format, base: Format) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight with one scale per index of ``axis`` (rule R5).

    Returns:
        The codes in the storage type of ``format`` and the float32 scales of shape ``[weight.shape[axis]]``.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    limit = np.abs(weight).max(axis=others)
    scale = round_scale(limit / largest_code(format), base)
    shape = [1] * weight.ndim
    shape[axis] = -1
    return encode(weight, scale.reshape(shape), format), scale


def encode(values: np.ndarray, scale: np.ndarray, format: Format) -> np.ndarray:
    """Return the codes of ``values``: round half to even, saturate."""
    scaled = values.astype(np.float32) / scale
    if format == INT8:
        return np.asarray(np.clip(np.rint(scaled), -128, 127), np.int8)
    top = largest_code(format)
    return np.asarray(np.clip(scaled, -top, top), _CODE_TYPES[format.name])


def decode(codes: np.ndarray, scale: np.ndarray, *, axis: int | None = None) -> np.ndarray:
    """Return float32 values ``codes * scale``."""
    if axis is not None:
        shape = [1] * codes.ndim
        shape[axis] = -1
        scale = scale.reshape(shape)
    return np.asarray(codes.astype(np.float32) * scale, np.float32)


def largest(format: Format) -> float:
    """Return the largest finite value of a floating-point format."""
    return {"fp16": 65504.0, "bf16": 3.3895e38, "fp32": 3.4028e38}[format.name]
