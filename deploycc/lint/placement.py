"""Family P: where pairs lie. A violation costs fusions; the numbers are those that the file asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycc.core.contract import STANDARD_DOMAINS
from deploycc.core.graph import is_constant
from deploycc.lint.findings import Place, rule
from deploycc.lint.fusion import inside
from deploycc.lint.storage import is_bias
from deploycc.lint.subject import DEQUANTIZE, QUANTIZE, WEIGHTED, Pair, Subject, value_name, weighted_origin
from deploycc.quant.regions import ACTIVATIONS, MOVES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

POINTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu"})
# Ops without weights that TensorRT can compute in 8 bits, when both sides are quantized.
EIGHT_BIT = POINTWISE | {"AveragePool", "GlobalAveragePool", "ReduceMean", "Concat", "Resize", "Upsample"}
_CLIPPING = (ACTIVATIONS - {"Sigmoid", "HardSigmoid"}) | {"BatchNormalization"}
_FUSED_WITH_ACTIVATION = WEIGHTED | {"Add", "BatchNormalization"}
_FOUR_BITS = ("int4", "uint4", "float4e2m1")


@rule(
    "P1",
    "warning",
    why="TensorRT then computes in floating point and dequantizes the other operand at every inference",
    fix="quantize both, or neither",
)
def both_operands_are_quantized(subject: Subject) -> Iterator[Place]:
    """Activation and weight of a weighted op are both quantized."""
    for region in (r for r in subject.regions if r.kind != "attention"):
        for node in subject.anchors(region):
            activation, weight = subject.operand(node, 0), subject.operand(node, 1)
            if activation is not None and weight is None:
                yield Place(node, "the activation is quantized, the weight is not")
            elif weight is not None and activation is None:
                fused = node.op_type in {"MatMul", "Gemm"}  # Weight-only products dequantize inside the kernel.
                if not (fused and weight.format in _FOUR_BITS):
                    yield Place(node, "the weight is quantized, the activation is not", "note" if fused else None)


@rule(
    "P2",
    "warning",
    why="the pair is one more kernel behind a kernel that could have written floating point",
    fix="quantize the input of the next weighted op instead, and only that",
)
def outputs_stay_float(subject: Subject) -> Iterator[Place]:
    """The output of a weighted op is not quantized where only floating-point ops read it."""
    yield from (
        Place(p.dequantize, f"the output '{value_name(p.source)}' is quantized for readers that compute in floating point")
        for p in _idle(subject)
        if weighted_origin(p.source) is not None
    )


@rule(
    "P3",
    "warning",
    why="the pair stands where TensorRT would fuse: convolution, normalization and activation become separate kernels",
    fix="fold the BatchNormalization, and quantize behind the activation",
)
def nothing_simulates_a_fusion(subject: Subject) -> Iterator[Place]:
    """No pair lies between a convolution and its normalization or activation."""
    for pair in subject.activations:
        after = _simulates(pair)
        if after is not None:
            yield Place(pair.dequantize, f"a pair lies between '{value_name(pair.source)}' and '{after.name}' ({after.op_type})")
    for node in (n for n in subject.graph if n.op_type == "BatchNormalization"):
        before = weighted_origin(node.inputs[0])
        if before is not None and subject.operand(before, 1) is not None:
            yield Place(node, f"the BatchNormalization behind '{before.name}' is not folded into its quantized weight")


@rule(
    "P4",
    "warning",
    why="with a floating-point skip the fused convolution writes floating point, and the pair behind the sum cannot fuse with it",
    fix="quantize the skip input of the sum too",
)
def skips_are_quantized(subject: Subject) -> Iterator[Place]:
    """The skip input of a residual sum is quantized where the sum is."""
    for (name, index), is_skip in subject.sums.items():
        node = subject.nodes[name]
        region = next(r for r in subject.regions if name in r.nodes)
        if is_skip and subject.format_of(region) and subject.operand(node, index) is None and _quantized_behind(subject, node):
            yield Place(node, f"the skip input '{value_name(node.inputs[index])}' of this sum is in floating point")


@rule("P5", "warning", why="it splits the fusion of convolution, sum and activation", fix="remove this pair and quantize the skip input")
def branches_stay_float(subject: Subject) -> Iterator[Place]:
    """No pair lies between a convolution and the sum that it is fused with."""
    for (name, index), is_skip in subject.sums.items():
        node = subject.nodes[name]
        before = node.inputs[index].producer() if node.inputs[index] is not None else None  # type: ignore[union-attr]
        if not is_skip and before is not None and before.op_type == DEQUANTIZE:
            yield Place(before, f"a pair lies between a convolution and the sum '{name}'")


@rule(
    "P6",
    "warning",
    why="the op computes in floating point and the pair before it is a kernel for nothing",
    fix="quantize the output as well, or do not quantize the input",
)
def quantized_on_both_sides(subject: Subject) -> Iterator[Place]:
    """An op without weights is quantized at its inputs and at its output, or not at all."""
    for pair in _idle(subject):
        readers = [n for n, _ in subject.readers(pair)]
        if weighted_origin(pair.source) is None and any(n.op_type in EIGHT_BIT for n in readers):
            node = next(n for n in readers if n.op_type in EIGHT_BIT)
            yield Place(pair.dequantize, f"the input of '{node.name}' ({node.op_type}) is quantized, its output is not")


@rule(
    "P7",
    "warning",
    why="quantization moves through such an op only with one scale; with two, codes are converted between them",
    fix="use one scale on both sides, or drop the pair behind the op",
)
def scales_are_equal_around_moves(subject: Subject) -> Iterator[Place]:
    """The scales before and behind an op that only moves numbers are equal."""
    for pair in subject.activations:
        before = pair.source.producer() if pair.source is not None else None
        if before is not None and before.op_type in MOVES:
            earlier = subject.operand(before, 0)
            if earlier is not None and not same_scale(earlier, pair):
                yield Place(before, f"its input has the scale {_shown(earlier)}, its output {_shown(pair)}")


@rule(
    "P8",
    "warning",
    why="inputs with other scales are converted one by one before they are joined",
    fix="give all inputs and the output one scale, or quantize none of them",
)
def concats_have_one_scale(subject: Subject) -> Iterator[Place]:
    """All inputs and the output of a Concat share one scale."""
    for node in (n for n in subject.graph if n.op_type == "Concat"):
        inputs = [subject.operand(node, i) for i, v in enumerate(node.inputs) if not is_constant(v)]
        behind = _behind(subject, node)
        known = [p for p in (*inputs, behind) if p is not None]
        if behind is not None and any(p is None for p in inputs) and any(p is not None for p in inputs):
            yield Place(node, f"{sum(p is None for p in inputs)} of {len(inputs)} inputs are not quantized")
        elif len(known) > 1 and not all(same_scale(known[0], p) for p in known[1:]):
            yield Place(node, f"its inputs and output have the scales {', '.join(dict.fromkeys(map(_shown, known)))}")


@rule(
    "P9",
    "warning",
    why="siblings that read one value through different pairs are not merged, and the value is quantized several times",
    fix="share one pair (ONNX Runtime: DedicatedQDQPair=False); --fix joins pairs that are equal",
    repair="share_pairs",
)
def pairs_are_shared(subject: Subject) -> Iterator[Place]:
    """A tensor is quantized once."""
    by_source: dict[ir.Value, dict[ir.Node, Pair]] = {}
    for pair in subject.activations:
        if pair.source is not None and pair.quantize is not None:
            by_source.setdefault(pair.source, {})[pair.quantize] = pair
    for source, found in by_source.items():
        kinds = {p.format for p in found.values()}
        if len(found) > len(kinds):
            equal = all(same_scale(next(iter(found.values())), p) for p in found.values())
            yield Place(next(iter(found)), f"'{source.name}' is quantized {len(found)} times, {'equally' if equal else 'differently'}")


@rule(
    "P10",
    "warning",
    why="every pair can split a fusion, and this one buys nothing",
    fix="remove it; --fix removes pairs that repeat the pair before them or that nothing reads",
    repair="drop_repeated_pairs",
)
def pairs_have_a_purpose(subject: Subject) -> Iterator[Place]:
    """No pair repeats another, is unread, or is read by floating-point ops only."""
    for pair in subject.activations:
        before = pair.source.producer() if pair.source is not None else None
        if before is not None and before.op_type == DEQUANTIZE:
            yield Place(pair.dequantize, f"it quantizes again what '{before.name}' has just dequantized")
        elif not pair.output.uses() and not pair.output.is_graph_output():
            yield Place(pair.dequantize, "nothing reads it")
    for pair in _idle(subject):
        readers = [n for n, _ in subject.readers(pair)]
        if weighted_origin(pair.source) is None and not any(n.op_type in EIGHT_BIT for n in readers):
            named = ", ".join(dict.fromkeys(n.op_type for n in readers))
            yield Place(pair.dequantize, f"'{value_name(pair.source)}' is quantized for {named}, which computes in floating point")


@rule(
    "P15",
    "warning",
    why="the op computes in floating point, and its constant is dequantized at every inference",
    fix="leave the constant in floating point; --fix dequantizes it once and for all",
    repair="fold_dequantized_constants",
)
def constants_of_pointwise_ops_stay_float(subject: Subject) -> Iterator[Place]:
    """No constant is quantized but weights."""
    for pair in (p for p in subject.pairs if p.is_stored):
        readers = subject.readers(pair)
        if readers and not any(is_weight(n, i) or is_bias(n, i) for n, i in readers) and pair.kind != ir.DataType.INT32:
            yield Place(pair.dequantize, f"the constant '{value_name(pair.source)}' of '{readers[0][0].name}' is quantized")


@rule("P16", "warning", why="a conversion at the very end, and the output loses precision", fix="leave outputs in floating point")
def outputs_of_the_network_stay_float(subject: Subject) -> Iterator[Place]:
    """Outputs of the network are not quantized, nor is the head of a vision transformer in FP8."""
    yield from (Place(p.dequantize, f"the output '{p.output.name}' is quantized") for p in subject.pairs if p.output.is_graph_output())
    for region in (r for r in subject.regions if "P16" in r.rules and subject.format_of(r) == "fp8"):
        yield Place(subject.anchors(region)[0], "the classifier of a vision transformer is quantized to FP8")


@rule(
    "P17",
    "warning",
    why="a plugin receives floating point unless it takes 8-bit values itself",
    fix="give the plugin the scales as attributes and drop its pairs, or keep everything around it in 16 bits",
)
def plugins_take_codes_themselves(subject: Subject) -> Iterator[Place]:
    """No pair lies directly before a custom operator."""
    for node in (n for n in subject.graph if n.domain not in STANDARD_DOMAINS and n.op_type not in {QUANTIZE, DEQUANTIZE}):
        if any(subject.operand(node, i) is not None for i in range(len(node.inputs))):
            yield Place(node, f"the custom operator {node.domain}::{node.op_type} reads a dequantized value")


@rule("P18", "warning", why="codes are converted from one scale to the other", fix="give the output the scale of the input")
def resizing_keeps_the_scale(subject: Subject) -> Iterator[Place]:
    """The scales before and behind a Resize are equal."""
    for node in (n for n in subject.graph if n.op_type in {"Resize", "Upsample"}):
        before, behind = subject.operand(node, 0), _behind(subject, node)
        if before is not None and behind is not None and not same_scale(before, behind):
            yield Place(node, f"its input has the scale {_shown(before)}, its output {_shown(behind)}")


def is_weight(node: ir.Node, index: int) -> bool:
    """Return whether a quantized constant at operand ``index`` makes ``node`` compute in 8 bits."""
    return (node.op_type in WEIGHTED and index < 2) or node.op_type in {"Concat", QUANTIZE} or node.domain not in STANDARD_DOMAINS


def same_scale(one: Pair, other: Pair) -> bool:
    """Return whether two pairs quantize alike: one type, one axis, the same constant scales."""
    a, b = one.scale, other.scale
    return one.kind == other.kind and a is not None and b is not None and a.shape == b.shape and bool((a == b).all())


def _idle(subject: Subject) -> Iterator[Pair]:
    """Yield the pairs all of whose readers compute in floating point, but for those that a rule of fusion tells of (P3, P11, P12, S9)."""
    for pair in subject.activations:
        readers = subject.readers(pair)
        if not readers or pair.output.is_graph_output() or any(_computes_in_8_bits(subject, n, i) for n, i in readers):
            continue
        if _simulates(pair) is None and not any(inside(n) for n, _ in readers):
            yield pair


def _computes_in_8_bits(subject: Subject, node: ir.Node, index: int) -> bool:
    if node.op_type in WEIGHTED or node.op_type == QUANTIZE or node.domain not in STANDARD_DOMAINS or (node.name, index) in subject.sums:
        return True
    return _quantized_behind(subject, node)


def _quantized_behind(subject: Subject, node: ir.Node) -> bool:
    """Return whether the output of ``node`` is quantized, directly or behind one activation."""
    after = [u.node for u in node.outputs[0].uses()]
    return subject.quantized_output(node) is not None or any(
        n.op_type in ACTIVATIONS and subject.quantized_output(n) is not None for n in after
    )


def _behind(subject: Subject, node: ir.Node) -> Pair | None:
    quantize = subject.quantized_output(node)
    return next((p for p in subject.activations if quantize is not None and p.quantize is quantize), None)


def _simulates(pair: Pair) -> ir.Node | None:
    """Return the normalization or activation behind the pair that TensorRT would fuse with what lies before the pair."""
    before = pair.source.producer() if pair.source is not None else None
    if before is None or before.op_type not in _FUSED_WITH_ACTIVATION:
        return None
    return next((u.node for u in pair.output.uses() if u.node.op_type in _CLIPPING), None)


def _shown(pair: Pair) -> str:
    scale: np.ndarray | None = pair.scale
    return "computed" if scale is None else f"{scale.reshape(-1)[0]:.4g}" + (" ..." if scale.size > 1 else "")
