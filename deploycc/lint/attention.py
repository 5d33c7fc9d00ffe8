"""Family F: attention that TensorRT can fuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.graph import scalar
from deploycc.lint.findings import Place, rule
from deploycc.lint.subject import Pair, Subject

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

_OPERANDS = ("Q", "K", "softmax output", "V")


def _cores(subject: Subject) -> Iterator[tuple[tuple[ir.Node, ir.Node], list[Pair | None], set[str]]]:
    """Yield the two products of each attention core, the pairs on their four operands, and the names of all of its nodes."""
    for region in (r for r in subject.regions if r.kind == "attention"):
        first, second = subject.anchors(region)
        pairs = [subject.operand(n, i) for n in (first, second) for i in (0, 1)]
        yield (first, second), pairs, set(region.nodes)


@rule(
    "F1",
    "warning",
    why="attention is fused in 8 bits only when all four operands are quantized; otherwise products and softmax are separate kernels",
    fix="quantize Q, K, V and the softmax output, or none of them",
)
def attention_is_quantized_whole(subject: Subject) -> Iterator[Place]:
    """All four operands of an attention core are quantized, or none is."""
    for (first, _), pairs, _ in _cores(subject):
        missing = [name for name, pair in zip(_OPERANDS, pairs, strict=True) if pair is None]
        if 0 < len(missing) < len(pairs):
            yield Place(first, f"attention is quantized but for {' and '.join(missing)}")


@rule(
    "F2",
    "warning",
    why="the FP8 attention kernel takes the scale before its first product only",
    fix="multiply Q (or its projection's weights) by the scale",
)
def the_scale_comes_first(subject: Subject) -> Iterator[Place]:
    """FP8 attention is scaled before its first product."""
    for (first, _), pairs, members in _cores(subject):
        scaled = [n for n in subject.graph if n.name in members and n.op_type in {"Mul", "Div"} and any(map(_is_number, n.inputs))]
        if scaled and all(p is not None and p.format == "fp8" for p in pairs):
            yield Place(scaled[0], f"the scores of '{first.name}' are scaled behind the product")


def _is_number(value: ir.Value | None) -> bool:
    return scalar(value) is not None


@rule(
    "F3",
    "warning",
    why="DequantizeLinear must feed the product directly to be fused with it",
    fix="transpose the key before it is quantized, and store constant weights transposed",
)
def transpositions_come_first(subject: Subject) -> Iterator[Place]:
    """No Transpose lies between a pair and an attention product, nor between stored codes and their product."""
    for (first, _), pairs, _ in _cores(subject):
        before = first.inputs[1].producer() if first.inputs[1] is not None else None
        if pairs[1] is not None and before is not None and before.op_type == "Transpose":
            yield Place(before, f"the key of '{first.name}' is transposed behind its pair")
    for pair in (p for p in subject.pairs if p.is_stored):
        turned = [u.node for u in pair.output.uses() if u.node.op_type == "Transpose"]
        if turned:
            yield Place(turned[0], "a dequantized weight is transposed", "note")


@rule(
    "F4",
    "warning",
    why="the softmax output lies in 0..1: another scale wastes codes of FP8, which has few",
    fix="use the scale 1/448",
)
def softmax_has_its_scale(subject: Subject) -> Iterator[Place]:
    """The FP8 scale of a softmax output is 1/448."""
    for pair in subject.activations:
        before = pair.source.producer() if pair.source is not None else None
        scale = pair.scale
        if before is None or before.op_type != "Softmax" or pair.format != "fp8" or scale is None:
            continue
        if not np.allclose(scale, 1 / 448, rtol=2**-8):  # Half a step of BF16, the coarsest type that scales have.
            yield Place(pair.dequantize, f"its scale is {float(scale.reshape(-1)[0]):.4g}, not 1/448 = {1 / 448:.4g}")


@rule(
    "F5",
    "warning",
    why="scores stay in registers between the first product and the softmax; a pair sends them through memory",
    fix="remove the pair",
)
def scores_stay_float(subject: Subject) -> Iterator[Place]:
    """No pair lies between the first product of an attention core and its softmax."""
    for (first, second), _, members in _cores(subject):
        inner = members - {first.name or "", second.name or ""}
        for pair in subject.activations:
            reader = next((n for n, _ in subject.readers(pair) if n.name in inner), None)
            before = pair.source.producer() if pair.source is not None else None
            if reader is not None and before is not None and (before is first or before.name in inner):
                yield Place(pair.dequantize, f"the scores are quantized before '{reader.name}' ({reader.op_type})")


@rule(
    "F9",
    "warning",
    why="inside the operator Attention nothing can be quantized, and TensorRT-RTX 1.7 does not build it in FP32",
    fix="export with opset 20 to 22, or let deploycc decompose it",
)
def attention_is_decomposed(subject: Subject) -> Iterator[Place]:
    """No operator Attention reads quantized values."""
    for node in (n for n in subject.graph if n.op_type == "Attention"):
        if any(subject.operand(node, i) is not None for i in range(min(3, len(node.inputs)))):
            yield Place(node, "Attention reads dequantized values")
