"""The number formats a region may compute in.

``max_value`` is the largest magnitude that ``QuantizeLinear`` can produce; scales are ``limit / max_value``. Simulated formats belong to
paper mode: weights and activations of n bits whose codes are computed in floating point (``deploycc.core.simulation``).
"""

from __future__ import annotations

from dataclasses import dataclass

from deploycc.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: its name, its width in bits and, for quantized formats, its ONNX type and largest value."""

    name: str
    bits: int
    onnx_type: str
    max_value: float | None = None

    @property
    def is_quantized(self) -> bool:
        """Return whether values enter this format through ``QuantizeLinear``."""
        return self.max_value is not None

    @property
    def is_simulated(self) -> bool:
        """Return whether no engine computes in this format."""
        return self.name in SIMULATED

    def __str__(self) -> str:
        return self.name


FP32 = Format("fp32", 32, "FLOAT")
FP16 = Format("fp16", 16, "FLOAT16")
BF16 = Format("bf16", 16, "BFLOAT16")
INT8 = Format("int8", 8, "INT8", 127.0)
FP8 = Format("fp8", 8, "FLOAT8E4M3FN", 448.0)

FORMATS: dict[str, Format] = {f.name: f for f in (FP32, FP16, BF16, INT8, FP8)}
SIMULATED: dict[str, Format] = {f"w{n}a{n}": Format(f"w{n}a{n}", n, "FLOAT") for n in range(3, 9)}
# Paper mode: the bits of most layers; "mp" moves one bit from the least relevant layers to the first blocks.
SIMULATIONS = {"w4a4": 4, "mp4": 4, "w6a6": 6, "mp6": 6}
PRECISIONS = (*FORMATS, "mixed", *SIMULATIONS)


def parse_precision(text: str) -> str:
    """Return ``text`` if it names a precision.

    Raises:
        UsageError: for an unknown name.
    """
    if text not in PRECISIONS:
        raise UsageError(f"unknown precision '{text}'", at="--precision", fix=f"use one of {', '.join(PRECISIONS)}")
    return text
