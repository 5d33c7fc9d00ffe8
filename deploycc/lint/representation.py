"""Family R: how quantization is written. A violation is refused by TensorRT, or computes something else than the file says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.blocks import is_scale_of_blocks
from deploycc.core.graph import attribute, int_attribute, opset, rank
from deploycc.core.placement import weight_axis
from deploycc.core.quantizers import SCALE_FLOOR
from deploycc.lint.findings import Place, rule
from deploycc.lint.subject import DEQUANTIZE, QUANTIZE, WEIGHTED, Pair, Subject, is_float_cast, settled, value_name, value_type

if TYPE_CHECKING:
    from collections.abc import Iterator

_BOTH = (QUANTIZE, DEQUANTIZE)
_CODES = frozenset({"INT8", "FLOAT8E4M3FN", "INT4", "FLOAT4E2M1", "FLOAT8E8M0"})
_FLOAT_OF = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


def _quantizers(subject: Subject) -> Iterator[ir.Node]:
    """Yield Q and DQ nodes, but no DequantizeLinear that shares its constants with the QuantizeLinear before it."""
    for node in subject.graph:
        before = node.inputs[0].producer() if node.op_type == DEQUANTIZE and node.inputs[0] is not None else None
        paired = before is not None and before.op_type == QUANTIZE and list(before.inputs[1:]) == list(node.inputs[1:])
        if node.op_type in _BOTH and not paired:
            yield node


def zero_points_of(node: ir.Node) -> np.ndarray | None:
    """Return the zero points of a Q or DQ node as float32: None where they are computed, a zero where there are none."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if given is None:
        return np.zeros((), np.float32)
    found = settled(given)
    return None if found is None else found.astype(np.float32)


@rule(
    "R1",
    "error",
    why="TensorRT quantizes symmetrically; its parser refuses every other zero point",
    fix="quantize again with symmetric activations and weights (ONNX Runtime: ActivationSymmetric and WeightSymmetric, type QInt8); "
    "--fix turns UINT8 with a zero point of 128 into INT8",
    repair="uint8_to_int8",
)
def zero_points_are_zero(subject: Subject) -> Iterator[Place]:
    """Zero points are constant zeros."""
    for node in _quantizers(subject):
        zeros = zero_points_of(node)
        if zeros is None:
            yield Place(node, "the zero point is computed, not constant")
        elif np.any(zeros):
            yield Place(node, f"the zero point is {zeros.reshape(-1)[np.argmax(zeros != 0)]:g}, not 0")


@rule(
    "R2",
    "error",
    why="TensorRT refuses scales that are not positive, and takes infinite or denormal ones without a word",
    fix="give dead channels the floor of the scale's type (1e-12, in FP16 1e-6) and quantize again",
)
def scales_are_positive(subject: Subject) -> Iterator[Place]:
    """Scales are constant, finite and positive, and no smaller than their type can divide by."""
    for node in _quantizers(subject):
        scale = settled(node.inputs[1])
        if scale is None:
            if not is_scale_of_blocks(node.inputs[1]):
                yield Place(node, "the scale is computed, not constant", "warning")
            continue
        wide, floor = scale.astype(np.float64), SCALE_FLOOR.get(_FLOAT_OF.get(value_type(node.inputs[1]), "fp32"), 0.0)
        if not np.all(np.isfinite(wide)):
            yield Place(node, "a scale is infinite or not a number")
        elif np.any(wide <= 0):
            yield Place(node, f"{int((wide <= 0).sum())} of {wide.size} scales are zero or negative")
        elif np.any(wide < floor):
            yield Place(node, f"the scale {wide.min():.3g} is below {floor:g}, where its type begins to lose bits", "warning")


@rule(
    "R3",
    "error",
    why="TensorRT has kernels for INT8, FP8 E4M3, INT4 and FP4; it reads UINT8 as INT8 with a warning, so that codes above 127 saturate",
    fix="quantize to INT8 or FP8 E4M3, with a zero point that says so; --fix turns UINT8 with a zero point of 128 into INT8",
    repair="uint8_to_int8",
)
def codes_have_a_knownvalue_type(subject: Subject) -> Iterator[Place]:
    """The codes have a type that TensorRT computes with, and the file says which."""
    for node in _quantizers(subject):
        codes = node.outputs[0] if node.op_type == QUANTIZE else node.inputs[0]
        kind = value_type(codes)
        unsaid = (
            node.op_type == QUANTIZE and (len(node.inputs) < 3 or node.inputs[2] is None) and not int_attribute(node, "output_dtype", 0)
        )
        if unsaid:
            yield Place(node, "no zero point says the type: ONNX takes it for UINT8, TensorRT for INT8")
        elif kind and kind not in _CODES and kind != "INT32":
            yield Place(node, f"the codes are {kind}")


@rule(
    "R4",
    "error",
    why="only weights may have scales per axis; TensorRT refuses others or computes the op in floating point",
    fix="quantize activations per tensor (ONNX Runtime: per_channel concerns weights only; NNCF and ModelOpt: per-tensor activations)",
)
def activations_are_per_tensor(subject: Subject) -> Iterator[Place]:
    """Activations have one scale."""
    for pair in subject.activations:
        scale = pair.scale
        if scale is not None and scale.size > 1 and not int_attribute(pair.dequantize, "block_size", 0):
            yield Place(pair.dequantize, f"the activation '{value_name(pair.source)}' has {scale.size} scales")


@rule(
    "R5",
    "error",
    why="with scales along any other axis TensorRT dequantizes the weight at every inference and computes in floating point",
    fix="quantize along axis 0 for Conv and for Gemm with transB, axis 1 for ConvTranspose, the last axis for MatMul",
)
def weights_have_their_axis(subject: Subject) -> Iterator[Place]:
    """Scales of a weight lie along its output channels."""
    for node, pair in _weights(subject):
        scale = pair.scale
        if scale is None or scale.size < 2 or int_attribute(pair.dequantize, "block_size", 0):
            continue
        wanted, found = weight_axis(node), _axis_seen_by(node, pair)
        if found is not None and found != wanted:
            yield Place(pair.dequantize, f"the weight of '{node.name}' has its scales along axis {found}, not {wanted}")


@rule(
    "R6",
    "error",
    why="the parser refuses other block shapes",
    fix="block along the last or second-last axis, by a size that divides it (16 for NVFP4, 32 for MXFP8, 16 to 256 for INT4)",
)
def blocks_are_whole(subject: Subject) -> Iterator[Place]:
    """Block scales have the rank of what they scale, and blocks divide their axis."""
    for node in _quantizers(subject):
        size = int_attribute(node, "block_size", 0)
        shape, scale = node.inputs[0].shape if node.inputs[0] is not None else None, node.inputs[1]
        if not size or shape is None or scale is None or scale.shape is None:
            continue
        axis = int_attribute(node, "axis", 1) % max(len(shape), 1)
        length = shape[axis] if len(shape) else 1
        if len(scale.shape) != len(shape):
            yield Place(node, f"block scales have {len(scale.shape)} axes, what they scale has {len(shape)}")
        elif axis < len(shape) - 2:
            yield Place(node, f"blocks lie along axis {axis} of {len(shape)}")
        elif isinstance(length, int) and length % size:
            yield Place(node, f"blocks of {size} do not divide the {length} elements of axis {axis}")


@rule(
    "R7",
    "error",
    why="networks are strongly typed: a scale has the type of what it scales, and a Cast beside a pair is one more kernel",
    fix="store the scale in the type of the values (FP16 scales in an FP16 graph, from opset 19 on) and drop the Cast",
)
def scales_have_the_type_of_values(subject: Subject) -> Iterator[Place]:
    """A scale has the type of the values it scales."""
    for node in (n for n in subject.graph if n.op_type == QUANTIZE):
        value, scale = value_type(node.inputs[0]), value_type(node.inputs[1])
        if value and scale and value != scale and opset(subject.model) < 23:
            yield Place(node, f"the scale is {scale}, the value {value}")
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        if before is not None and is_float_cast(before) and not before.inputs[0].is_graph_input():  # type: ignore[union-attr]
            yield Place(node, f"'{before.name}' casts the value before it is quantized", "warning")
    for pair in subject.pairs:
        after = [u.node for u in pair.output.uses()]
        if after and all(is_float_cast(n) and not n.outputs[0].is_graph_output() for n in after):
            yield Place(pair.dequantize, f"'{after[0].name}' casts the value after it was dequantized", "warning")


@rule("R8", "error", why="TensorRT quantizes no scalar tensors", fix="leave scalars in floating point")
def quantized_values_have_axes(subject: Subject) -> Iterator[Place]:
    """What is quantized is no scalar."""
    yield from (
        Place(p.quantize, f"'{value_name(p.source)}' is a scalar") for p in subject.pairs if p.quantize is not None and rank(p.source) == 0
    )


def _weights(subject: Subject) -> Iterator[tuple[ir.Node, Pair]]:
    for node in subject.graph:
        pair = subject.operand(node, 1) if node.op_type in WEIGHTED else None
        if pair is not None and pair.is_stored:
            yield node, pair


def _axis_seen_by(node: ir.Node, pair: Pair) -> int | None:
    """Return the axis of the scales as the weighted op sees it, behind a Transpose if there is one."""
    before = node.inputs[1].producer() if node.inputs[1] is not None else None
    if before is pair.dequantize:
        return pair.axis
    if before is None or before.op_type != "Transpose" or (before.inputs[0] or pair.output).producer() is not pair.dequantize:
        return None
    length = rank(pair.source) or 2
    order = [int(a) for a in attribute(before, "perm", tuple(range(length))[::-1])]  # type: ignore[attr-defined]
    return order.index(pair.axis)
