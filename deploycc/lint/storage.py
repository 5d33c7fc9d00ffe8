"""Family R, continued: what is stored, and which operators and opsets say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import int_attribute, opset
from deploycc.lint.findings import Place, rule
from deploycc.lint.subject import DEQUANTIZE, QUANTIZE, Subject, before_pairs, value_name, value_type

if TYPE_CHECKING:
    from collections.abc import Iterator

_BOTH = (QUANTIZE, DEQUANTIZE)
# The opset from which on QuantizeLinear knows a type.
_SINCE = {
    "INT8": 10,
    "UINT8": 10,
    "FLOAT8E4M3FN": 19,
    "FLOAT8E5M2": 19,
    "INT4": 21,
    "UINT4": 21,
    "INT16": 21,
    "UINT16": 21,
    "FLOAT4E2M1": 23,
}
# fmt: off
_OPERATORS = frozenset({
    "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearAdd", "QLinearMul", "QLinearConcat",
    "QLinearSigmoid", "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearLeakyRelu", "QLinearSoftmax", "QGemm", "QAttention",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM", "MatMulNBits", "MatMulBnb4",
})
# fmt: on


@rule(
    "R9",
    "error",
    why="the operator does not exist in the opset that the file declares, so that readers disagree about it",
    fix="raise the opset: 13 for scales per axis, 19 for FP8 and 16-bit scales, 21 for INT4 and blocks, 22 for BF16 Conv, 23 for FP4",
)
def opset_knows_the_types(subject: Subject) -> Iterator[Place]:
    """The opset has the types that the pairs use."""
    has = opset(subject.model)
    for node in subject.graph:
        wanted = _needed_opset(node)
        if wanted > has and node.domain in ("", "ai.onnx"):
            yield Place(node, f"{node.op_type} as written here needs opset {wanted}, the file declares {has}")


def _needed_opset(node: ir.Node) -> int:
    if node.op_type in {"Conv", "ConvTranspose"} and value_type(node.inputs[0]) == "BFLOAT16":
        return 22
    if node.op_type not in _BOTH:
        return 0
    codes = node.outputs[0] if node.op_type == QUANTIZE else node.inputs[0]
    needs = [_SINCE.get(value_type(codes), 10), 21 if int_attribute(node, "block_size", 0) else 10]
    needs.append(19 if value_type(node.inputs[1]) in {"FLOAT16", "BFLOAT16"} else 10)
    scale = node.inputs[1]
    needs.append(
        13 if scale is not None and scale.shape is not None and scale.shape.is_static() and np.prod(scale.shape.numpy()) > 1 else 10
    )
    return max(needs)


@rule(
    "R10",
    "error",
    why="TensorRT's parser knows QuantizeLinear and DequantizeLinear of ONNX only",
    fix="write the model in QDQ form (ONNX Runtime: quant_format=QuantFormat.QDQ, and types that need no com.microsoft operators)",
)
def precision_is_written_as_pairs(subject: Subject) -> Iterator[Place]:
    """Nothing but Q/DQ of ONNX says what is quantized."""
    for node in subject.graph:
        if node.op_type in _OPERATORS:
            yield Place(node, f"{node.op_type} is not parsed")
        elif node.op_type in _BOTH and node.domain not in ("", "ai.onnx"):
            yield Place(node, f"{node.op_type} is that of domain '{node.domain}'")


@rule(
    "R12",
    "error",
    why="DequantizeLinear of INT32 is refused by the parser; a quantized bias gains nothing",
    fix="leave the bias in floating point (ONNX Runtime: extra option QuantizeBias=False); --fix dequantizes it once and for all",
    repair="fold_dequantized_constants",
)
def biases_stay_float(subject: Subject) -> Iterator[Place]:
    """The bias is not quantized."""
    for pair in subject.pairs:
        if pair.kind == ir.DataType.INT32:
            yield Place(pair.dequantize, f"'{value_name(pair.source)}' is stored as INT32")
        elif pair.is_stored and all(is_bias(n, i) for n, i in subject.readers(pair)) and subject.readers(pair):
            yield Place(pair.dequantize, f"the bias '{value_name(pair.source)}' is quantized", "warning")


def is_bias(node: ir.Node, index: int) -> bool:
    """Return whether operand ``index`` of ``node`` is the bias of a weighted op."""
    if node.op_type in {"Conv", "ConvTranspose", "Gemm"}:
        return index == 2
    other = before_pairs(node.inputs[1 - index]) if node.op_type == "Add" and len(node.inputs) == 2 else None
    producer = other.producer() if other is not None else None
    return producer is not None and producer.op_type in {"MatMul", "Conv", "ConvTranspose"}


@rule(
    "R13",
    "note",
    why="TensorRT quantizes the weight when it builds; the file is two or four times as large as it need be",
    fix="store the codes, followed by DequantizeLinear only; --fix does so, with the same numbers",
    repair="store_codes",
)
def weights_are_stored_as_codes(subject: Subject) -> Iterator[Place]:
    """Weights are stored quantized."""
    found = [p for p in subject.pairs if p.is_stored and p.quantize is not None]
    saved = sum(_bytes(p.source) * (1 - _bits(p.kind) / _bits(p.source.dtype)) for p in found if p.source is not None)
    if found and found[0].quantize is not None:
        first = max(found, key=lambda p: _bytes(p.source))
        yield Place(
            first.quantize or first.dequantize, f"{len(found)} constants are stored in floating point; codes would save {saved:.0f} bytes"
        )


@rule(
    "R14",
    "note",
    why="scales that are equal by chance stop being equal when the engine is refitted, and the fusion with them",
    fix="let the pairs of one Concat or one residual sum share one scale constant",
)
def equal_scales_are_one_constant(subject: Subject) -> Iterator[Place]:
    """Equal scales around one Concat are one constant."""
    for node in (n for n in subject.graph if n.op_type == "Concat"):
        found = [p for i in range(len(node.inputs)) if (p := subject.operand(node, i)) is not None and p.scale is not None]
        scales = {id(p.dequantize.inputs[1]) for p in found}
        if len(found) > 1 and len(scales) > 1 and len({p.scale.tobytes() for p in found if p.scale is not None}) == 1:
            yield Place(node, f"{len(scales)} constants hold the one scale of its inputs")


def _bits(dtype: ir.DataType | None) -> int:
    return int(dtype.bitwidth) if dtype is not None else 32


def _bytes(value: ir.Value | None) -> int:
    return int(value.const_value.nbytes) if value is not None and value.const_value is not None else 0
