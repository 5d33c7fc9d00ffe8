"""Fuse the projections of offsets and masks into one product that writes the records DCNv3 reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.dcnv3 import MASK, OFFSET, DCNv3, attributes_of, nodes_of, replace_attributes
from deploycc.core.graph import add_initializer, constant, fresh_name, inherit_metadata, remove_dead_nodes, sole_consumer, taken_names
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite


@dataclass(frozen=True, slots=True)
class FuseDcnv3Projections:
    """Fuse the projections of offsets and masks into one product that writes the records DCNv3 reads.

    Why: one matrix product instead of two, and one aligned record per pixel and group, for K = 9 the 18 offsets, 9 logits and 5 zeros in 64
    bytes of FP16: the kernel reads four vectors where it read 18 scattered numbers.

    Before / After:
        ``DCNv3(x, Add(MatMul(q, Wo), bo), Add(MatMul(q, Wm), bm))`` / ``DCNv3<record=1>(x, r, r)`` with ``r = Add(MatMul(q, W), b)``,
        the columns of ``W`` and ``b`` in the order [group][2 K offsets, K masks, zeros]

    Declines when:
        SOURCE: the two projections read different values, or one is no product with constant weight and bias.
        MULTI_CONSUMER: something else reads the offsets or the masks.
        MASK: the masks are probabilities computed by something else than a projection.

    Options: none.

    See: ``deploycc.core.dcnv3``; rule D2.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity", "fuse-dcnv3-softmax")

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        taken = taken_names(model.graph)
        results = [_fuse(node, attributes_of(node), taken) for node in nodes_of(model)]
        declines = tuple(r for r in results if isinstance(r, Decline))
        return PassResult(tuple(r for r in results if isinstance(r, Rewrite)), declines)


@dataclass(frozen=True, slots=True)
class _Projection:
    """source weight + bias, by the nodes MatMul and Add."""

    nodes: tuple[ir.Node, ir.Node]
    source: ir.Value
    weight: np.ndarray
    bias: np.ndarray


def _fuse(node: ir.Node, what: DCNv3, taken: set[str]) -> Rewrite | Decline | None:
    if what.record:
        return None
    name = node.name or ""
    if not what.softmax and _is_softmax(node.inputs[MASK]):
        return Decline(name, "MASK", "the masks are not a projection's result; their softmax was not fused")
    offset, mask = (_projection(node.inputs[i]) for i in (OFFSET, MASK))
    if offset is None or mask is None or offset.source is not mask.source:
        return Decline(name, "SOURCE", "offsets and masks are not two projections of one value")
    if any(sole_consumer(each.nodes[1].outputs[0]) is not node for each in (offset, mask)):
        return Decline(name, "MULTI_CONSUMER", "something else reads the offsets or the masks")
    weight, bias = (_records(what, getattr(offset, part), getattr(mask, part)) for part in ("weight", "bias"))
    record = _project(node, offset, weight, bias, taken)
    node.replace_input_with(OFFSET, record)
    node.replace_input_with(MASK, record)
    replace_attributes(node, replace(what, record=1))
    remove_dead_nodes(_graph(node), [*offset.nodes, *mask.nodes])
    return Rewrite(name, f"'{offset.nodes[0].name}' and '{mask.nodes[0].name}' became one product of {weight.shape[-1]} columns")


def _is_softmax(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "Softmax"


def _projection(value: ir.Value | None) -> _Projection | None:
    """Return the product with a constant weight and bias that makes ``value``, or None."""
    add = value.producer() if value is not None else None
    if add is None or add.op_type != "Add":
        return None
    for product, shift in (add.inputs, add.inputs[::-1]):
        bias, linear = constant(shift), product.producer() if product is not None else None
        if bias is None or linear is None or linear.op_type != "MatMul" or sole_consumer(linear.outputs[0]) is not add:
            continue
        weight, source = constant(linear.inputs[1]), linear.inputs[0]
        if weight is not None and weight.ndim == 2 and bias.shape == weight.shape[1:] and source is not None:
            return _Projection((linear, add), source, weight, bias)
    return None


def _records(what: DCNv3, offset: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the last axis in the order [group][2 K offsets, K masks, zeros]."""
    head, group = offset.shape[:-1], what.group
    empty = np.zeros((*head, group, what.record_width - 3 * what.points), offset.dtype)
    parts = [offset.reshape(*head, group, -1), mask.reshape(*head, group, -1), empty]
    return np.concatenate(parts, axis=-1).reshape(*head, -1)


def _project(node: ir.Node, like: _Projection, weight: np.ndarray, bias: np.ndarray, taken: set[str]) -> ir.Value:
    """Write the joint projection before ``node`` and return its result."""
    graph, stem = _graph(node), f"{node.name}_record"
    held = [add_initializer(graph, fresh_name(f"{stem}_{n}", taken), a) for n, a in (("weight", weight), ("bias", bias))]
    product = ir.node("MatMul", [like.source, held[0]], name=f"{stem}_MatMul")
    shifted = ir.node("Add", [product.outputs[0], held[1]], name=f"{stem}_Add")
    for made, old in zip((product, shifted), like.nodes, strict=True):
        source = old.outputs[0]
        made.outputs[0].name, made.outputs[0].type = fresh_name(f"{made.name}_out", taken), source.type
        made.outputs[0].shape = None if source.shape is None else ir.Shape([*source.shape[:-1], weight.shape[1]])
        inherit_metadata(made, [old])
        graph.insert_before(node, made)
    return shifted.outputs[0]


def _graph(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"'{node.name}' belongs to no graph")
    return node.graph
