"""Families X, T and D: several formats in one graph, what builders do with them, and decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycc.core.dcnv3 import OFFSET, is_dcnv3
from deploycc.core.formats import FORMATS
from deploycc.core.graph import int_attribute, sole_consumer
from deploycc.lint.findings import Place, rule
from deploycc.lint.subject import Subject, is_float_cast, settled, value_name, value_type
from deploycc.quant.islands import DECIDING_OPS

if TYPE_CHECKING:
    from collections.abc import Iterator

_NARROW = frozenset({"FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4", "FLOAT4E2M1"})


@rule(
    "X1",
    "note",
    why="TensorRT up to 10 refused INT8 and FP8 together; TensorRT-RTX 1.7 builds them for sm_89 on",
    fix="where the target refuses it, use one 8-bit format and 16 bits",
)
def one_eight_bit_format(subject: Subject) -> Iterator[Place]:
    """INT8 and FP8 do not occur in one graph."""
    first = {p.format: p.dequantize for p in reversed(subject.pairs)}
    if {"int8", "fp8"} <= set(first):
        yield Place(first["fp8"], "the graph holds INT8 and FP8")


@rule(
    "X2",
    "note",
    why="every border between 8 and 16 bits is a conversion",
    fix="quantize neighbours as well, or leave this one in 16 bits too",
)
def regions_do_not_stand_alone(subject: Subject) -> Iterator[Place]:
    """A quantized region has a quantized neighbour."""
    formats = ["", *(subject.format_of(r) for r in subject.regions), ""]
    alone = [r for i, r in enumerate(subject.regions, 1) if formats[i] and formats[i] not in (formats[i - 1], formats[i + 1])]
    if alone:
        yield Place(
            subject.anchors(alone[0])[0], f"{len(alone)} of {sum(map(bool, formats))} quantized regions have no neighbour in their format"
        )


@rule(
    "X3",
    "error",
    why="both operands of a product have one type; TensorRT refuses others or dequantizes both",
    fix="quantize activation and weight to one format, and all anchors of a region alike",
)
def one_format_per_region(subject: Subject) -> Iterator[Place]:
    """Both operands of a weighted op, and all that share a region, have one format."""
    for region in subject.regions:
        anchors = subject.anchors(region)
        # TensorRT reads UINT8 as INT8, which is another rule's matter (R3).
        asked = [{p.format.removeprefix("u") for i in (0, 1) if (p := subject.operand(n, i)) is not None} for n in anchors]
        for node, formats in zip(anchors, asked, strict=True):
            if len(formats) > 1:
                yield Place(node, f"its operands are quantized to {' and '.join(sorted(formats))}")
        if all(len(f) < 2 for f in asked) and len({*map(frozenset, asked)}) > 1 and region.kind != "attention":
            yield Place(anchors[0], f"the {len(anchors)} products of '{value_name(anchors[0].inputs[0])}' differ in format", "warning")


@rule(
    "X4",
    "error",
    why="the architecture has no units for this format: the builder refuses the file, or computes in floating point",
    fix="choose another format, or a target that has it (deploycc doctor lists them)",
)
def the_target_has_the_formats(subject: Subject) -> Iterator[Place]:
    """The target computes every format of the graph natively."""
    if subject.formats is None:
        return
    lacking = {name for name in FORMATS if name not in {f.name for f in subject.formats}}
    first = {p.format: p.dequantize for p in reversed(subject.pairs)}
    yield from (Place(node, f"{subject.target} does not compute {name} natively") for name, node in first.items() if name in lacking)


@rule(
    "X5",
    "warning",
    why="each Cast is a pass over the tensor",
    fix="drop both; --fix does so where the first only widens, so that no number changes",
    repair="drop_cast_pairs",
)
def casts_do_not_undo_each_other(subject: Subject) -> Iterator[Place]:
    """No Cast undoes the Cast before it."""
    for node in subject.graph:
        before = node.inputs[0].producer() if is_float_cast(node) and node.inputs[0] is not None else None
        if before is not None and is_float_cast(before) and value_type(before.inputs[0]) == value_type(node.outputs[0]):
            yield Place(node, f"it undoes '{before.name}'")


@rule(
    "T2",
    "error",
    why="with a scale of shape [1] TensorRT-RTX 1.7 dequantizes the weights at run time and computes in floating point, without a word",
    fix="give the scale and the zero point of an activation the shape []; --fix does so",
    repair="scalar_scales",
)
def scales_are_scalars(subject: Subject) -> Iterator[Place]:
    """The scale of an activation has no axis."""
    for pair in subject.activations:
        scale = settled(pair.dequantize.inputs[1])
        if scale is not None and scale.size == 1 and scale.ndim:
            yield Place(pair.quantize or pair.dequantize, f"the scale of '{value_name(pair.source)}' has the shape {list(scale.shape)}")


@rule(
    "T3",
    "warning",
    why="TensorRT-RTX 1.7 takes a joint q/k/v projection apart itself, and dequantizes its weights to do so",
    fix="split the projection into one product per part before quantizing; deploycc build does so",
)
def joint_projections_are_split(subject: Subject) -> Iterator[Place]:
    """No quantized product computes q, k and v at once."""
    for node in (n for n in subject.plain.graph if n.op_type in {"MatMul", "Gemm"}):
        seen = subject.nodes.get(node.name or "")
        if seen is not None and subject.operand(seen, 1) is not None and _is_taken_apart(node):
            yield Place(seen, "its output is taken apart into q, k and v")


def _is_taken_apart(node: ir.Node) -> bool:
    """Return whether the output of ``node``, behind bias, Reshape and Transpose, is read by a Split, or by two or more index ops."""
    value = node.outputs[0]
    while (after := sole_consumer(value)) is not None and after.op_type in {"Add", "Reshape", "Transpose"}:
        value = after.outputs[0]
    readers = [u.node for u in value.uses()]
    behind = [{u.node for v in n.outputs for u in v.uses()} for n in readers]
    if any(n.op_type == "Concat" for n in set.intersection(*behind or [set()])):
        return False  # A cyclic shift (torch.roll) takes a value apart and joins it again.
    return [n.op_type for n in readers] == ["Split"] or (len(readers) > 1 and {n.op_type for n in readers} <= {"Gather", "Slice"})


@rule(
    "T5",
    "error",
    why="TensorRT takes FP8 and 4-bit tensors from QuantizeLinear, constants and moves only",
    fix="use QuantizeLinear and DequantizeLinear in place of the Cast",
)
def no_casts_to_narrow_types(subject: Subject) -> Iterator[Place]:
    """No Cast leads to or from FP8 or 4 bits."""
    for node in (n for n in subject.graph if n.op_type == "Cast"):
        to = ir.DataType(int_attribute(node, "to", 1)).name
        for kind in {to, value_type(node.inputs[0])} & _NARROW:
            yield Place(node, f"a Cast {'to' if kind == to else 'from'} {kind}")


@rule(
    "D1",
    "warning",
    why="a comparison of rounded numbers decides otherwise, not a little otherwise",
    fix="leave what reaches comparisons and indices in FP32",
)
def decisions_read_floats(subject: Subject) -> Iterator[Place]:
    """No comparison, rounding or index op reads a dequantized value."""
    for pair in subject.activations:
        deciding = next((n for n, _ in subject.readers(pair) if n.op_type in DECIDING_OPS), None)
        if deciding is not None:
            yield Place(pair.dequantize, f"'{deciding.name}' ({deciding.op_type}) decides on a quantized value")


@rule(
    "D2",
    "warning",
    why="a sampling position that is off by a pixel reads another pixel",
    fix="keep offsets and grids in FP32, or offsets in FP16",
)
def positions_are_exact(subject: Subject) -> Iterator[Place]:
    """No sampling offsets or grids are quantized or BF16."""
    places = [(n, OFFSET if is_dcnv3(n) else 1) for n in subject.graph if is_dcnv3(n) or n.op_type == "GridSample"]
    for node, index in places:
        where = node.inputs[index]
        if subject.operand(node, index) is not None or value_type(where) == "BFLOAT16":
            yield Place(node, f"its positions '{value_name(where)}' are quantized or BF16")
