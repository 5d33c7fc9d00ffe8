"""Numbers in blocks: elements along K that share a scale (rule R6). INT4, NVFP4 and MXFP8 are such formats.

INT4: ``w = c s``, with ``s`` in the graph's base format. NVFP4: ``w = c (s g)``, ``s`` in E4M3 per block and one ``g`` per tensor, so that
the largest block has the largest ``s``. MXFP8: ``w = c 2^e``, the least power of two for which the block fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from deploycc.core.formats import INT4, MXFP8, NVFP4, Format
from deploycc.core.graph import is_constant
from deploycc.core.quantizers import activation_scale, largest_code, round_scale

# TensorRT's own operators for what the engine quantizes as it runs, in its domain of ONNX.
DOMAIN = "trt"
DYNAMIC = {NVFP4.name: "TRT_FP4DynamicQuantize", MXFP8.name: "TRT_MXFP8DynamicQuantize"}
DYNAMIC_OPERATORS = frozenset(DYNAMIC.values())
MX_DEQUANTIZE = "TRT_MXFP8DequantizeLinear"
BLOCK_OPERATORS = DYNAMIC_OPERATORS | {MX_DEQUANTIZE}
# The first opset whose DequantizeLinear reads the codes of the format in blocks (rule R9).
OPSETS = {INT4.name: 21, NVFP4.name: 23, MXFP8.name: 21}
_INT4_BLOCKS = (128, 64, 32)
# What a block's scale may reach, over its largest element. In E2M1, where the codes above 4 lie 2 apart, 1.5 puts that at 4 instead of 6.
TRIALS = {INT4.name: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), NVFP4.name: (1.0, 0.9, 1.15, 1.3, 1.5)}
_SCALE_BIAS = 127  # of E8M0
_LEAST = 2.0**-9  # of E4M3, above zero: TensorRT takes positive scales only (rule R2)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tensor in blocks along ``axis``.

    ``codes`` has the tensor's shape, ``scale`` a ``size``-th of it along ``axis``; both have their storage types. ``whole`` is the scale of
    the scales, a float32, where the format has one.
    """

    codes: np.ndarray
    scale: np.ndarray
    axis: int
    size: int
    whole: float | None = None

    def decoded(self) -> np.ndarray:
        """Return the numbers as float32."""
        scale = _exponents(self.scale) if self.scale.dtype == np.uint8 else self.scale.astype(np.float32)
        wide = np.repeat(scale * np.float32(1.0 if self.whole is None else self.whole), self.size, axis=self.axis)
        return np.asarray(self.codes.astype(np.float32) * wide, np.float32)


def block_size(format: Format, depth: int) -> int:
    """Return the size of the blocks of ``depth`` elements along K in ``format``; 0 where they do not fill whole blocks, at least two.

    Around a single block TensorRT-RTX 1.7 dequantizes the weight by a kernel of its own and computes in 16 bits.
    """
    sizes = _INT4_BLOCKS if format == INT4 else (format.block,)
    return next((size for size in sizes if depth % size == 0 and depth > size), 0)


def block_axis(weight_axis: int) -> int:
    """Return the axis of K in a matrix whose output channels lie along ``weight_axis``."""
    return 1 - weight_axis


def quantize_blocks(weight: np.ndarray, *, axis: int, format: Format, base: Format) -> Blocks:
    """Quantize a matrix in blocks along ``axis``.

    MXFP8 takes the scale that holds the largest element of a block; INT4 and NVFP4 take that of least squared error among ``TRIALS`` of it.

    Args:
        weight: two-dimensional, in floating point.
        axis: of K, the dimension over which the product sums.
        format: INT4, NVFP4 or MXFP8.
        base: the floating-point format in which the scales of INT4, and that of NVFP4's scales, are stored.

    Raises:
        ValueError: when the elements along ``axis`` do not fill whole blocks.
    """
    size = block_size(format, weight.shape[axis])
    if not size:
        raise ValueError(f"{weight.shape[axis]} elements along axis {axis} do not fill whole blocks of {format}")
    wide = weight.astype(np.float32)
    limits = np.abs(_grouped(wide, axis, size)).max(axis=axis + 1)
    whole = activation_scale(float(limits.max(initial=0.0)), format, base) if format == NVFP4 else None

    def scaled_to(limits: np.ndarray) -> Blocks:
        return _divided(wide, Blocks(wide, _scales(limits, format, base, whole), axis, size, whole), format)

    best, least = limits, np.full(limits.shape, np.inf, np.float32)
    for trial in TRIALS.get(format.name, ()):
        error = _grouped(np.square(scaled_to(limits * np.float32(trial)).decoded() - wide), axis, size).sum(axis=axis + 1)
        best, least = np.where(error < least, limits * np.float32(trial), best), np.minimum(error, least)
    return scaled_to(best)


def encode_blocks(scaled: np.ndarray, format: Format) -> np.ndarray:
    """Return the codes of numbers already divided by their scales: round half to even, saturate."""
    if format == INT4:
        return np.asarray(np.clip(np.rint(scaled), -8, 7)).astype(ml_dtypes.int4)
    top = largest_code(format)
    return np.asarray(np.clip(scaled, -top, top), ml_dtypes.float4_e2m1fn if format == NVFP4 else ml_dtypes.float8_e4m3fn)


def is_block_operator(node: ir.Node) -> bool:
    """Return whether ``node`` is one of TensorRT's operators for numbers in blocks."""
    return node.domain == DOMAIN and node.op_type in BLOCK_OPERATORS


def dynamic_quantizer(value: ir.Value, *, format: Format, scale: ir.Value | None) -> tuple[ir.Node, ...]:
    """Return nodes, yet without names, that quantize ``value`` in blocks along its last axis as the engine runs, and dequantize it.

    Args:
        value: whose last dimension is a whole number of blocks.
        format: NVFP4 or MXFP8.
        scale: the calibrated scale of the scales of NVFP4, a scalar; None for MXFP8.
    """
    operator, shape = DYNAMIC[format.name], value.shape
    codes, size = getattr(ir.DataType, format.onnx_type), format.block
    along = {"axis": -1, "block_size": size}
    fewer = None if shape is None else ir.Shape([*shape[:-1], shape[-1] // size if isinstance(shape[-1], int) else None])
    if scale is None:
        quantize = ir.node(operator, [value], {**along, "output_dtype": int(codes)}, domain=DOMAIN, num_outputs=2)
        kind = value.dtype or ir.DataType.FLOAT
        back = ir.node(MX_DEQUANTIZE, [*quantize.outputs], {**along, "output_dtype": int(kind)}, domain=DOMAIN)
        nodes, scale_type = [quantize, back], ir.DataType.UINT8
    else:
        scale_type = ir.DataType.FLOAT8E4M3FN
        quantize = ir.node(operator, [value, scale], {**along, "scale_type": int(scale_type)}, domain=DOMAIN, num_outputs=2)
        scales = ir.node("DequantizeLinear", [quantize.outputs[1], scale])
        back = ir.node("DequantizeLinear", [quantize.outputs[0], scales.outputs[0]], along)
        scales.outputs[0].type, scales.outputs[0].shape = value.type, fewer
        nodes = [quantize, scales, back]
    for out, kind, dims in zip(quantize.outputs, (codes, scale_type), (shape, fewer), strict=True):
        out.type, out.shape = ir.TensorType(kind), dims
    back.outputs[0].type, back.outputs[0].shape = value.type, shape
    return tuple(nodes)


def stored_dequantizer(codes: ir.Value, scale: ir.Value, whole: ir.Value | None, *, blocks: Blocks, like: ir.Value) -> tuple[ir.Node, ...]:
    """Return nodes, yet without names, that dequantize a stored matrix: the last one gives it in the type of ``like``."""
    along = {"axis": blocks.axis, "block_size": blocks.size}
    if blocks.scale.dtype == np.uint8:
        kind = like.dtype or ir.DataType.FLOAT
        nodes = [ir.node(MX_DEQUANTIZE, [codes, scale], {**along, "output_dtype": int(kind)}, domain=DOMAIN)]
    elif whole is None:
        nodes = [ir.node("DequantizeLinear", [codes, scale], along)]
    else:
        scales = ir.node("DequantizeLinear", [scale, whole])
        scales.outputs[0].type, scales.outputs[0].shape = like.type, scale.shape
        nodes = [scales, ir.node("DequantizeLinear", [codes, scales.outputs[0]], along)]
    nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = like.type, like.shape
    return tuple(nodes)


def is_scale_of_blocks(value: ir.Value | None) -> bool:
    """Return whether ``value`` holds scales of blocks: stored as codes, or found as the engine runs."""
    source = value.producer() if value is not None else None
    codes = source.inputs[0] if source is not None and source.op_type == "DequantizeLinear" else None
    maker = codes.producer() if codes is not None else None
    return is_constant(codes) if maker is None else is_block_operator(maker)


def _divided(values: np.ndarray, by: Blocks, format: Format) -> Blocks:
    """Return ``values`` as codes with the scales of ``by``."""
    steps = replace(by, codes=np.ones(values.shape, np.float32)).decoded()
    codes = encode_blocks(np.divide(values, steps, out=np.zeros_like(values), where=steps > 0), format)
    return replace(by, codes=codes)


def _grouped(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return ``values`` with the blocks along ``axis`` as an axis of their own behind it."""
    shape = values.shape
    return values.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])


def _scales(limits: np.ndarray, format: Format, base: Format, whole: float | None) -> np.ndarray:
    if whole is not None:
        return np.clip(limits / np.float32(largest_code(format) * whole), _LEAST, 448.0).astype(ml_dtypes.float8_e4m3fn)
    if format == MXFP8:
        mantissa, exponent = np.frexp(limits / np.float32(largest_code(format)))
        exponent = np.where(mantissa == 0.5, exponent - 1, exponent)  # exact powers of two fit as they are
        return np.where(limits > 0, np.clip(exponent + _SCALE_BIAS, 0, 254), 0).astype(np.uint8)
    return round_scale(limits / largest_code(format), base)


def _exponents(codes: np.ndarray) -> np.ndarray:
    return np.asarray(np.ldexp(np.float32(1.0), codes.astype(np.int32) - _SCALE_BIAS), np.float32)
