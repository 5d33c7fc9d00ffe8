"""Bring the core of attention to one form: one scale on the query, one transposition of the key."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.dimensions import dimensions
from deploycc.core.graph import (
    add_initializer,
    inherit_metadata,
    int_attribute,
    ints_attribute,
    rank,
    replace_value,
    scalar,
    sole_consumer,
    substitute,
)
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

_MOVES = frozenset({"Transpose", "Reshape", "Identity", "Unsqueeze", "Squeeze"})


@dataclass(frozen=True, slots=True)
class CanonicalizeAttention:
    """Bring the core of attention to one form: one scale on the query, one transposition of the key.

    Why: exporters divide the scores, or multiply the query, or spread the root of the scale over query and key; they transpose the
    key through three nodes. Quantization and TensorRT's fusion look for one form, in which the scale comes before the first product.

    Before / After:
        ``Softmax(MatMul(q, k) / 8 + m)`` / ``Softmax(MatMul(q * 0.125, k) + m)``
        ``MatMul(q * 0.354, k * 0.354)`` / ``MatMul(q * 0.125, k)``
        ``Reshape(Transpose(Reshape(k, [-1, n, d]), [0, 2, 1]), [b, h, d, n])`` / ``Transpose(k, [0, 1, 3, 2])``

    Declines when:
        MULTI_CONSUMER: the scores, or a value between a scale and the first product, are read elsewhere or are a graph output.
        MASK_SCALED: a scale comes after the mask was added, so that it scales the mask as well.
        NUMERIC: the product of the scales is not a finite number other than zero.

    Options: none.

    See: Vaswani et al., arXiv 1706.03762, equation 1; rule F2.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity", "decompose-attention", "fuse-softmax")

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        for softmax in [n for n in model.graph if n.op_type == "Softmax" and _is_over_the_last_axis(n)]:
            core = _Core.before(softmax)
            if core is None:
                continue
            for result in (_turn(core.product), _gather(core, model.graph)):
                if isinstance(result, Rewrite):
                    rewrites.append(result)
                elif result is not None:
                    declines.append(result)
        return PassResult(tuple(rewrites), tuple(declines))


@dataclass(slots=True)
class _Core:
    """The first product of an attention core, and the scales around it: on the scores, the query and the key."""

    product: ir.Node
    scores: list[ir.Node] = field(default_factory=list)
    query: list[ir.Node] = field(default_factory=list)
    key: list[ir.Node] = field(default_factory=list)
    late: ir.Node | None = None
    shared: ir.Value | None = None

    @classmethod
    def before(cls, softmax: ir.Node) -> _Core | None:
        """Walk from a softmax whose result is multiplied back to the product of query and key."""
        if not any(use.node.op_type == "MatMul" and use.idx == 0 for use in softmax.outputs[0].uses()):
            return None
        scales: list[ir.Node] = []
        late: ir.Node | None = None
        value, shared = softmax.inputs[0], None
        while value is not None and (node := value.producer()) is not None:
            if shared is None and sole_consumer(value) is None:
                shared = value
            if node.op_type == "MatMul":
                core = cls(node, scales, late=late, shared=shared)
                core.query, core.key = (_scales_before(node, i) for i in (0, 1))
                return core
            if (scaled := _scaled(node)) is not None:
                scales.append(node)
                value = scaled
            elif node.op_type == "Add":
                if scales:
                    late, scales = scales[0], []
                value = _towards_product(node)
            else:
                return None
        return None


def _is_over_the_last_axis(softmax: ir.Node) -> bool:
    size = rank(softmax.inputs[0])
    return int_attribute(softmax, "axis", -1) in ({-1} if size is None else {-1, size - 1})


def _factor(node: ir.Node) -> float | None:
    """Return by what a Mul or Div with a constant number multiplies its other operand, else None."""
    if node.op_type not in {"Mul", "Div"} or len(node.inputs) != 2:
        return None
    number = scalar(node.inputs[1])
    if number is None and node.op_type == "Mul":
        return scalar(node.inputs[0])
    return number if node.op_type == "Mul" or not number else 1.0 / number


def _scaled(node: ir.Node) -> ir.Value | None:
    """Return what a Mul or Div by a constant number scales; a constant of more dimensions than it would change the shape."""
    if _factor(node) is None:
        return None
    kept = 0 if scalar(node.inputs[1]) is not None else 1
    value, number = node.inputs[kept], node.inputs[1 - kept]
    sizes = rank(value), rank(number)
    return value if sizes[1] == 0 or (sizes[0] is not None and sizes[1] is not None and sizes[1] <= sizes[0]) else None


def _towards_product(node: ir.Node) -> ir.Value | None:
    """Return the operand of an Add that is, perhaps after scales and another Add, a product; the other one is a mask."""
    for value in node.inputs:
        maker = value.producer() if value is not None else None
        while maker is not None and (inner := _scaled(maker)) is not None:
            maker = inner.producer()
        if maker is not None and (maker.op_type == "MatMul" or (maker.op_type == "Add" and _towards_product(maker) is not None)):
            return value
    return None


def _scales_before(product: ir.Node, i: int) -> list[ir.Node]:
    """Return the scales of an operand, as far as only this product reads them, through operators that move elements."""
    found: list[ir.Node] = []
    value = product.inputs[i]
    while value is not None and sole_consumer(value) is not None and (node := value.producer()) is not None:
        scaled = _scaled(node)
        if scaled is not None:
            found.append(node)
        elif node.op_type not in _MOVES:
            break
        value = scaled if scaled is not None else node.inputs[0]
    return found


def _gather(core: _Core, graph: ir.Graph) -> Rewrite | Decline | None:
    """Put the product of all scales on the query, unless that is where the only one already is."""
    anchor, scales = core.product.name or "", [*core.scores, *core.query, *core.key]
    if core.late is not None:
        return Decline(core.late.name or "", "MASK_SCALED", "it scales the sum of scores and mask")
    if not scales or (scales == core.query and len(scales) == 1 and scales[0].op_type == "Mul"):
        return None
    if core.shared is not None and core.scores:
        return Decline(anchor, "MULTI_CONSUMER", f"'{core.shared.name}' is read outside the attention")
    factor = math.prod(_factor(node) or 0.0 for node in scales)
    query = core.product.inputs[0]
    if not math.isfinite(factor) or factor == 0 or query is None or query.dtype is None:
        return Decline(anchor, "NUMERIC", f"the scales multiply to {factor}")
    dtype = query.dtype
    number = add_initializer(graph, f"{anchor}_scale", np.array(factor, dtype.numpy()), dtype)
    names = ", ".join(f"'{n.name}'" for n in scales)
    for node in scales:
        _remove(node)
    query = core.product.inputs[0]
    if query is None:
        raise TypeError(f"'{anchor}' lost its query")
    new = ir.node("Mul", [query, number], name=f"{anchor}_query_scale")
    inherit_metadata(new, [core.product])
    scaled = new.outputs[0]
    scaled.name, scaled.type, scaled.shape = f"{anchor}_scaled_query", query.type, query.shape
    graph.insert_before(core.product, new)
    core.product.replace_input_with(0, scaled)
    return Rewrite(anchor, f"the scales {names} became one of {factor:.6g} on the query", f"{len(scales) + 1} roundings of one element")


def _remove(node: ir.Node) -> None:
    source = _scaled(node)
    if source is None or not isinstance(node.graph, ir.Graph):
        raise TypeError(f"'{node.name}' is no scale")
    graph = node.graph
    if source.shape is None:
        source.shape = node.outputs[0].shape
    replace_value(node.outputs[0], source)
    graph.remove(node, safe=True)


def _turn(product: ir.Node) -> Rewrite | None:
    """Replace Reshape, Transpose, Reshape that only swap the last two axes of the key by one Transpose."""
    last = _first_of(product.inputs[1], "Reshape")
    middle = _first_of(last.inputs[0], "Transpose") if last is not None else None
    first = _first_of(middle.inputs[0], "Reshape") if middle is not None else None
    if last is None or middle is None or first is None:
        return None
    before, flat, after = dimensions(first.inputs[0]), dimensions(first.outputs[0]), dimensions(last.outputs[0])
    if before is None or flat is None or after is None or len(before) < 3 or len(flat) < 3:
        return None
    order, kept = list(range(len(flat))), list(range(len(before)))
    if ints_attribute(middle, "perm") != (*order[:-2], order[-1], order[-2]):
        return None
    # Equal last axes leave equal leading counts; row-major order does the rest.
    if before[-2:] != flat[-2:] or after != (*before[:-2], before[-1], before[-2]):
        return None
    perm = ir.AttrInt64s("perm", [*kept[:-2], kept[-1], kept[-2]])
    name = last.name or ""
    substitute(last, "Transpose", [first.inputs[0]], attributes=[perm], absorbed=[middle, first])
    return Rewrite(name, "three nodes that swap the last two axes became one")


def _first_of(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the producer of ``value`` if it is an ``operator`` with one reader, scales aside."""
    while value is not None and (node := value.producer()) is not None and sole_consumer(value) is not None:
        if node.op_type == operator:
            return node
        value = _scaled(node)
    return None
