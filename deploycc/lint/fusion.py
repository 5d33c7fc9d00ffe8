"""Family P, continued, and S9: pairs inside what TensorRT fuses into one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycc.lint.findings import Place, rule
from deploycc.lint.subject import Pair, Subject, before_pairs, value_name, weighted_origin
from deploycc.quant.regions import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

NORMS = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "Softmax", "LogSoftmax"})
_BODIES = frozenset({"Erf", "Pow", "Sqrt", "Reciprocal"})
_GLUE = frozenset({"Add", "Sub", "Mul", "Div"})


def inside(node: ir.Node) -> bool:
    """Return whether ``node`` is part of a GELU, a normalization, a softmax or a SiLU, written as one node or as several."""
    return node.op_type in NORMS or _in_body(node) or _in_silu(node)


def _in_body(node: ir.Node) -> bool:
    """Return whether ``node`` is one of the ops of a decomposed GELU or LayerNorm, or next to one (Div before Erf, Add behind)."""
    if node.op_type in _BODIES or node.op_type == "Gelu":
        return True
    if node.op_type not in _GLUE:
        return False
    before = [_producer(v) for v in node.inputs]
    return any(n is not None and n.op_type in _BODIES for n in (*before, *_through_pairs(node)))


def _in_silu(node: ir.Node) -> bool:
    """Return whether ``node`` is the Sigmoid or the Mul of ``x * Sigmoid(x)``."""
    if node.op_type in {"Sigmoid", "HardSigmoid"}:
        return any(_in_silu(n) for n in _through_pairs(node) if n.op_type == "Mul")
    if node.op_type != "Mul":
        return False
    gates = [n for v in node.inputs if (n := _producer(v)) is not None and n.op_type in {"Sigmoid", "HardSigmoid"}]
    sources = [before_pairs(v) for v in node.inputs]
    return any(before_pairs(gate.inputs[0]) in sources for gate in gates)


def _producer(value: ir.Value | None) -> ir.Node | None:
    source = before_pairs(value)
    return source.producer() if source is not None else None


def _through_pairs(node: ir.Node) -> list[ir.Node]:
    """Return the readers of the first output of ``node``, looking through pairs."""
    found, pending = [], [node.outputs[0]]
    while pending:
        for use in pending.pop().uses():
            if use.node.op_type in {"QuantizeLinear", "DequantizeLinear"} and use.idx == 0:
                pending.append(use.node.outputs[0])
            else:
                found.append(use.node)
    return found


def _read_by(subject: Subject, pair: Pair) -> list[ir.Node]:
    return [n for n, _ in subject.readers(pair)]


@rule(
    "P11",
    "warning",
    why="convolution, Sigmoid and Mul are one kernel only without pairs between them",
    fix="quantize behind the Mul only; where the gate of a depthwise convolution does not fuse, before the Sigmoid",
)
def silu_stays_whole(subject: Subject) -> Iterator[Place]:
    """No pair lies inside ``x * Sigmoid(x)``."""
    for pair in subject.activations:
        within = [n for n in _read_by(subject, pair) if _in_silu(n)]
        if within:
            yield Place(pair.dequantize, f"a pair lies before '{within[0].name}' ({within[0].op_type}) of a SiLU")


@rule(
    "P12",
    "warning",
    why="the body is one kernel only without pairs in it, and it computes in floating point anyway",
    fix="quantize at the input of the next weighted op only",
)
def bodies_stay_whole(subject: Subject) -> Iterator[Place]:
    """No pair lies inside a GELU or a decomposed LayerNorm."""
    for pair in subject.activations:
        within = [n for n in _read_by(subject, pair) if _in_body(n)]
        if within:
            yield Place(pair.dequantize, f"a pair lies before '{within[0].name}' ({within[0].op_type}), inside a GELU or a norm")


@rule(
    "P13",
    "warning",
    why="projections of one value are merged into one kernel only when they read it through one pair",
    fix="quantize all of them, from one shared pair",
)
def projections_share_a_pair(subject: Subject) -> Iterator[Place]:
    """Projections of one LayerNorm output are all quantized, or none is."""
    for region in (r for r in subject.regions if r.kind == "linear" and len(r.anchors) > 1):
        anchors = subject.anchors(region)
        source = _producer(anchors[0].inputs[0])
        formats = [(p.format if (p := subject.operand(n, 0)) is not None else "") for n in anchors]
        if source is not None and source.op_type == "LayerNormalization" and len(set(formats)) > 1:
            named = ", ".join(f"'{n.name}' in {f or 'floating point'}" for n, f in zip(anchors, formats, strict=True))
            yield Place(source, f"the projections of its output differ: {named}")


@rule(
    "P14",
    "warning",
    why="the stem is one kernel only without a pair in it",
    fix="quantize behind the MaxPool; --fix moves the pair there, which changes no number",
    repair="move_pairs_behind_pooling",
)
def stems_stay_whole(subject: Subject) -> Iterator[Place]:
    """No pair lies between a convolution and the MaxPool behind it."""
    for pair in subject.activations:
        after = [u.node for u in pair.output.uses() if u.node.op_type == "MaxPool"]
        before = pair.source.producer() if pair.source is not None else None
        source = before.inputs[0] if before is not None and before.op_type in ACTIVATIONS | {"BatchNormalization"} else pair.source
        origin = weighted_origin(source)
        if after and origin is not None and origin.op_type == "Conv":
            yield Place(pair.dequantize, f"a pair lies between '{origin.name}' and '{after[0].name}' (MaxPool)")


@rule(
    "S9",
    "warning",
    why="they compute in floating point whatever the file says; in FP16, squares of a decomposed norm overflow at 65504",
    fix="quantize behind them; export norms as LayerNormalization (opset 17 on), or keep their squares in FP32",
)
def norms_and_softmax_stay_float(subject: Subject) -> Iterator[Place]:
    """LayerNorm and softmax read floating point, and no squares are summed in FP16."""
    for pair in subject.activations:
        within = [n for n in _read_by(subject, pair) if n.op_type in NORMS]
        if within:
            yield Place(pair.dequantize, f"the input of '{within[0].name}' ({within[0].op_type}) is quantized")
    for node in (n for n in subject.graph if n.op_type == "Pow"):
        summed = [u.node for u in node.outputs[0].uses() if u.node.op_type in {"ReduceMean", "ReduceSum"}]
        if summed and node.outputs[0].dtype == ir.DataType.FLOAT16:
            yield Place(node, f"'{value_name(node.outputs[0])}' is squared in FP16 and summed by '{summed[0].name}'")
