"""The number formats a region may compute in.

``max_value`` is the largest magnitude that ``QuantizeLinear`` can produce; scales are ``limit / max_value``. Simulated formats belong to
paper mode: weights and activations of n bits whose codes are computed in floating point (``deploycc.core.simulation``).
"""

from __future__ import annotations

from dataclasses import dataclass

from deploycc.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: its name, the width of a code in bits and, for quantized formats, its ONNX type and largest value.

    Attributes:
        phrase: what it is, in a few words.
        block: elements along K that share a scale; 0 where a scale holds for a tensor or, in a weight, for an output channel.
        scale_bits: the width of a block's scale.
        activations: how activations get their codes: by a calibrated scale (``static``), by a scale that the engine computes per block
            (``dynamic``), or not at all (``none``).
        reach: the largest magnitude at the calibrated scale 1; None where nothing is calibrated.
    """

    name: str
    bits: int
    onnx_type: str
    max_value: float | None = None
    phrase: str = ""
    block: int = 0
    scale_bits: int = 0
    activations: str = "static"
    reach: float | None = None

    @property
    def is_quantized(self) -> bool:
        """Return whether weights are stored as codes of this format."""
        return self.max_value is not None

    @property
    def codes_activations(self) -> bool:
        """Return whether activations are codes of this format as well as weights."""
        return self.is_quantized and self.activations != "none"

    @property
    def weight_bits(self) -> float:
        """Return the bits per weight with the share of its block's scale."""
        return self.bits + (self.scale_bits / self.block if self.block else 0.0)

    @property
    def is_simulated(self) -> bool:
        """Return whether no engine computes in this format."""
        return self.name in SIMULATED

    def __str__(self) -> str:
        return self.name


FP32 = Format("fp32", 32, "FLOAT", phrase="32 bits")
FP16 = Format("fp16", 16, "FLOAT16", phrase="16 bits")
BF16 = Format("bf16", 16, "BFLOAT16", phrase="16 bits with the range of 32")
INT8 = Format("int8", 8, "INT8", 127.0, "8-bit integers, calibrated", reach=127.0)
FP8 = Format("fp8", 8, "FLOAT8E4M3FN", 448.0, "8-bit floats (E4M3), calibrated", reach=448.0)
INT4 = Format("int4", 4, "INT4", 7.0, "weights of matrix products alone, in blocks", block=128, scale_bits=16, activations="none")
NVFP4 = Format(
    "nvfp4", 4, "FLOAT4E2M1", 6.0, "4-bit floats (E2M1) in blocks of 16", block=16, scale_bits=8, activations="dynamic", reach=6.0 * 448.0
)
MXFP8 = Format("mxfp8", 8, "FLOAT8E4M3FN", 448.0, "8-bit floats (E4M3) in blocks of 32", block=32, scale_bits=8, activations="dynamic")

FORMATS: dict[str, Format] = {f.name: f for f in (FP32, FP16, BF16, INT8, FP8, INT4, NVFP4, MXFP8)}
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
