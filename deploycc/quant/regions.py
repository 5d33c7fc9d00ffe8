"""Partition a CANONICAL graph into the regions that TensorRT fuses, and say which formats the rules allow in each.

A region is grown forward from its anchors: convolution or matrix product, bias, activation, residual Add. Projections that read
one value are tied into one region (P13), and an attention core (two products around a softmax) is one region (F1).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.dcnv3 import PLAIN, X, is_dcnv3
from deploycc.core.dimensions import dimensions
from deploycc.core.graph import constant, is_constant, sole_consumer
from deploycc.core.identity import scope_of
from deploycc.core.plan import Crossing, Region
from deploycc.quant.eligibility import attention_formats, conv_formats, linear_formats

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import onnx_ir as ir

ACTIVATIONS = frozenset(
    {"Relu", "Clip", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Tanh", "Elu", "Softplus", "Mish", "PRelu"}
)
_TRANSPARENT = frozenset(
    {"Mul", "Div", "Add", "Sub", "Reshape", "Cast", "Where", "Identity", "Transpose", "Unsqueeze", "Squeeze", "Dropout"}
)
# What only moves elements, so that TensorRT may quantize before it or behind it.
MOVES = frozenset({"MaxPool", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Gather", "Split", "Expand"})
_PER_SAMPLE = ("macs", "activation_elements", "output_elements")


def partition(model: ir.Model, *, samples_codes: bool = False, batch: int = 0) -> tuple[Region, ...]:
    """Return the regions of ``model`` in topological order; no node belongs to two of them. Work is counted per sample.

    ``samples_codes`` says that DCNv3 is computed by a kernel that reads INT8: then the projection behind it takes it into its region.
    ``batch`` is what a dynamic batch is tuned for, 0 where nobody said: it decides which products have too few rows (S1).
    """
    order = {node: i for i, node in enumerate(model.graph)}
    taken: set[ir.Node] = set()
    cores = _attention_cores(model.graph, taken)
    depth = _anchor_depth(model.graph)
    transformer = bool(cores)
    regions = [(order[anchors[-1]], _attention_region(anchors, nodes)) for anchors, nodes in cores]
    for group in _linear_groups(model.graph, taken):
        taken.update(group)
        members = [*group]
        residuals: list[str] = []
        for anchor in group:
            grown, skips = _grow(anchor, taken, depth)
            taken.update(grown)
            members.extend(grown)
            residuals.extend(skips)
        if samples_codes and (sampler := _sampler_before(group)):
            members.append(sampler)
            residuals.append(sampler.inputs[X].name or "")  # type: ignore[union-attr]
        members.sort(key=order.__getitem__)
        regions.append((order[group[0]], _weighted_region(group, members, residuals, transformer=transformer, batch=batch)))
    ordered = [region for _, region in sorted(regions, key=lambda pair: pair[0])]
    samples = _static_batch(model.graph)
    counted = [replace(r, **{name: getattr(r, name) // samples for name in _PER_SAMPLE}) for r in ordered]
    return _bordering(model.graph, counted, samples)


def weight_of(node: ir.Node) -> ir.Value | None:
    """Return the constant weight of a weighted op; for MatMul the second operand only."""
    if node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"} and len(node.inputs) > 1 and is_constant(node.inputs[1]):
        return node.inputs[1]
    return None


def _bordering(graph: ir.Graph, regions: list[Region], batch: int) -> tuple[Region, ...]:
    """Return ``regions`` with their crossings."""
    home = {node: r for r in regions for node in r.nodes}
    values = {v.name: v for n in graph for v in n.outputs}
    operands = [(r.anchors, r.activations) for r in regions] + [(r.nodes, r.residuals) for r in regions]
    coded = {(node, value) for nodes, names in operands for node in nodes for value in names}

    def crossing(region: Region, name: str) -> Crossing | None:
        value = values.get(name)
        while value is not None and (node := value.producer()) is not None and node.name not in home and node.op_type in MOVES:
            value = node.inputs[0]
        producer = home.get(node.name or "") if value is not None and (node := value.producer()) is not None else None
        if value is None or producer is None or producer is region:
            return None
        return Crossing(value.name or "", producer.name, _elements(value) // batch, _is_read_in_full(value, home, coded))

    def crossings(region: Region) -> tuple[Crossing, ...]:
        names = dict.fromkeys((*region.activations, *region.residuals))
        return tuple(dict.fromkeys(found for name in names if (found := crossing(region, name)) is not None))

    return tuple(replace(r, crossings=crossings(r)) for r in regions)


def _is_read_in_full(value: ir.Value, home: Collection[str], coded: Collection[tuple[str, str]]) -> bool:
    """Return whether a node reads ``value``, or what only moves its elements, whose operand is never quantized (not in ``coded``)."""
    if value.is_graph_output():
        return True
    for node in dict.fromkeys(use.node for use in value.uses()):
        if node.name not in home and node.op_type in MOVES:
            if any(_is_read_in_full(v, home, coded) for v in node.outputs):
                return True
        elif (node.name, value.name) not in coded:
            return True
    return False


def _is_anchor(node: ir.Node) -> bool:
    weight = weight_of(node)
    if weight is None or weight.shape is None:
        return False
    return node.op_type != "MatMul" or len(weight.shape) == 2


def _attention_cores(graph: ir.Graph, taken: set[ir.Node]) -> list[tuple[list[ir.Node], list[ir.Node]]]:
    cores = []
    for softmax in graph:
        if softmax.op_type != "Softmax":
            continue
        after = _only_path(softmax.outputs[0])
        before = _product_before(softmax.inputs[0], depth=10)
        if after is None or before is None:
            continue
        nodes = [*before, softmax, *after]
        if taken.isdisjoint(nodes):
            taken.update(nodes)
            cores.append(([before[0], after[-1]], nodes))
    return cores


def _only_path(value: ir.Value) -> list[ir.Node] | None:
    """Return the nodes from a softmax to the product that reads it as its first operand."""
    path: list[ir.Node] = []
    while len(path) < 4:
        node = sole_consumer(value)
        if node is None:
            return None
        path.append(node)
        if node.op_type == "MatMul":
            return path if node.inputs[0] is value and not is_constant(node.inputs[1]) else None
        if node.op_type not in _TRANSPARENT:
            return None
        value = node.outputs[0]
    return None


def _product_before(value: ir.Value | None, depth: int) -> list[ir.Node] | None:
    """Return the nodes from a product of two computed operands to ``value``, product first."""
    node = value.producer() if value is not None else None
    if node is None or depth == 0 or value is None or sole_consumer(value) is None:
        return None
    if node.op_type == "MatMul":
        return [node] if not any(is_constant(v) for v in node.inputs) else None
    if node.op_type not in _TRANSPARENT:
        return None
    for operand in node.inputs:
        found = _product_before(operand, depth - 1)
        if found is not None:
            return [*found, node]
    return None


def _linear_groups(graph: ir.Graph, taken: set[ir.Node]) -> Iterable[list[ir.Node]]:
    """Yield anchors, those projections together that read the same value."""
    siblings: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node in taken or not _is_anchor(node) or node.inputs[0] is None:
            continue
        if node.op_type in {"MatMul", "Gemm"}:
            siblings.setdefault(node.inputs[0], []).append(node)
    for node in graph:
        if node in taken or not _is_anchor(node) or node.inputs[0] is None:
            continue
        group = siblings.get(node.inputs[0], [node]) if node.op_type in {"MatMul", "Gemm"} else [node]
        if group[0] is node:
            yield group


def _grow(anchor: ir.Node, taken: set[ir.Node], depth: dict[ir.Node, int]) -> tuple[list[ir.Node], list[str]]:
    """Follow the only consumer of each value through bias, residual Add and activation."""
    grown: list[ir.Node] = []
    residuals: list[str] = []
    value = anchor.outputs[0]
    while (node := _next(value)) is not None and node not in taken:
        if node.op_type == "Add":
            other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            if other is not None and not is_constant(other):
                if residuals or not _is_main_branch(value, other, depth):
                    break
                residuals.append(other.name or "")
        elif node.op_type == "Mul" and value.producer() in grown[-1:] and _gated(node, value) in (anchor, *grown[:-1]):
            pass  # The gate of a SiLU: x * Sigmoid(x).
        elif node.op_type not in ACTIVATIONS:
            break
        grown.append(node)
        value = node.outputs[0]
    return grown, residuals if anchor.op_type == "Conv" else []


def _sampler_before(group: list[ir.Node]) -> ir.Node | None:
    """Return the node of DCNv3 that only the one projection in ``group`` reads."""
    value = group[0].inputs[0]
    node = value.producer() if value is not None and len(group) == 1 else None
    is_sampler = node is not None and is_dcnv3(node) and node.op_type == PLAIN and sole_consumer(node.outputs[0]) is group[0]
    return node if is_sampler else None


def _gated(product: ir.Node, gate: ir.Value) -> ir.Node | None:
    """Return the node whose output ``product`` multiplies with ``gate``."""
    other = product.inputs[1] if product.inputs[0] is gate else product.inputs[0]
    return other.producer() if other is not None else None


def _next(value: ir.Value) -> ir.Node | None:
    """Return the sole consumer, or the gate of a SiLU (``Sigmoid`` and ``Mul`` both read the value)."""
    only = sole_consumer(value)
    if only is not None or value.is_graph_output():
        return only
    users = {u.node for u in value.uses()}
    gates = [n for n in users if n.op_type in {"Sigmoid", "HardSigmoid"}]
    if len(users) == 2 and len(gates) == 1 and sole_consumer(gates[0].outputs[0]) in users:
        return gates[0]
    return None


def _is_main_branch(value: ir.Value, other: ir.Value, depth: dict[ir.Node, int]) -> bool:
    """Return whether ``value`` comes by the longer path (rule P4): more weighted ops lie behind it."""
    mine, theirs = value.producer(), other.producer()
    return mine is not None and (theirs is None or depth.get(mine, 0) > depth.get(theirs, 0))


def _anchor_depth(graph: ir.Graph) -> dict[ir.Node, int]:
    depth: dict[ir.Node, int] = {}
    for node in graph:
        before = [depth[p] for v in node.inputs if v is not None and (p := v.producer()) in depth and p is not None]
        depth[node] = max(before, default=0) + (1 if _is_anchor(node) else 0)
    return depth


def _weighted_region(group: list[ir.Node], members: list[ir.Node], residuals: list[str], *, transformer: bool, batch: int) -> Region:
    first = group[0]
    weights = [w for n in group if (w := weight_of(n)) is not None]
    kind = {"Conv": "conv", "ConvTranspose": "conv_transpose"}.get(first.op_type, "linear")
    written = sum(_elements(n.outputs[0]) for n in group)
    region = Region(
        name=first.name or "",
        kind=kind,
        anchors=tuple(n.name or "" for n in group),
        nodes=tuple(n.name or "" for n in members),
        activations=(first.inputs[0].name or "",) if first.inputs[0] is not None else (),
        weights=tuple(w.name or "" for w in weights),
        residuals=tuple(residuals),
        parameters=sum(int(np.prod(w.shape.numpy())) for w in weights if w.shape is not None),
        macs=sum(_macs(n) for n in group),
        activation_elements=_elements(first.inputs[0]) + written,
        output_elements=written,
        source=scope_of(first),
    )
    formats, rules = conv_formats(first) if kind != "linear" else linear_formats(group, transformer=transformer, batch=batch)
    return replace(region, formats=formats, rules=rules)


def _attention_region(anchors: list[ir.Node], nodes: list[ir.Node]) -> Region:
    first, second = anchors
    operands = [v for v in (*first.inputs, *second.inputs) if v is not None]
    formats, rules = attention_formats(first)
    return Region(
        name=first.name or "",
        kind="attention",
        anchors=tuple(n.name or "" for n in anchors),
        nodes=tuple(n.name or "" for n in nodes),
        activations=tuple(v.name or "" for v in operands),
        formats=formats,
        rules=rules,
        macs=sum(_macs(n) for n in anchors),
        activation_elements=sum(_elements(v) for v in (*operands, second.outputs[0])),
        output_elements=_elements(second.outputs[0]),
        source=scope_of(first),
    )


def _macs(node: ir.Node) -> int:
    """Return multiply-accumulates; unknown dimensions count as one. A transposed convolution spends them on its inputs."""
    out = _elements(node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0])
    weight = constant(node.inputs[1]) if node.op_type != "MatMul" or is_constant(node.inputs[1]) else None
    if weight is not None:
        per_output = weight.size // weight.shape[0] if node.op_type == "Conv" else weight.size // max(_linear_width(node, weight), 1)
        return out * per_output
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    inner = shape[-1] if shape is not None and len(shape) and isinstance(shape[-1], int) else 1
    return out * int(inner)


def _linear_width(node: ir.Node, weight: np.ndarray) -> int:
    if node.op_type == "ConvTranspose":
        return int(weight.shape[0])
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].value
    return int(weight.shape[0 if transposed else -1])


def _elements(value: ir.Value | None) -> int:
    """Return the number of elements with every dynamic dimension 1; a dimension ``64*batch`` counts as 64."""
    sizes = dimensions(value) if value is not None else None
    return math.prod(d if isinstance(d, int) else max(1, sum(c for _, c in d.terms)) for d in sizes or ())


def _static_batch(graph: ir.Graph) -> int:
    """Return the batch that all shapes already contain, 1 where it is dynamic."""
    shape = graph.inputs[0].shape if graph.inputs else None
    return shape[0] if shape is not None and len(shape) and isinstance(shape[0], int) else 1
