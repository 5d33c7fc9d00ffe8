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
        the columns of ``W`` and ``b`` in the order [group][2 K offsets, K masks, zeros]; a bias may be absent

    Declines when:
        SOURCE: the two projections read different values, or one is no product with a constant weight.
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
    """source weight + bias, by the nodes MatMul and, where there is a bias, Add."""

    nodes: tuple[ir.Node, ...]
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
    if any(sole_consumer(each.nodes[-1].outputs[0]) is not node for each in (offset, mask)):
        return Decline(name, "MULTI_CONSUMER", "something else reads the offsets or the masks")
    record = _project(node, (offset, mask), what, taken)
    node.replace_input_with(OFFSET, record)
    node.replace_input_with(MASK, record)
    replace_attributes(node, replace(what, record=1))
    remove_dead_nodes(_graph(node), [*offset.nodes, *mask.nodes])
    columns = what.group * what.record_width
    return Rewrite(name, f"'{offset.nodes[0].name}' and '{mask.nodes[0].name}' became one product of {columns} columns")


def _is_softmax(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "Softmax"


def _projection(value: ir.Value | None) -> _Projection | None:
    """Return the product with a constant weight, and the constant bias behind it, that makes ``value``, or None."""
    last = value.producer() if value is not None else None
    if last is None or last.op_type == "MatMul":
        return None if last is None else _linear((last,), np.float32(0))
    for product, shift in (last.inputs, last.inputs[::-1]) if last.op_type == "Add" else ():
        bias, linear = constant(shift), product.producer() if product is not None else None
        if bias is not None and linear is not None and linear.op_type == "MatMul" and sole_consumer(linear.outputs[0]) is last:
            return _linear((linear, last), bias)
    return None


def _linear(nodes: tuple[ir.Node, ...], bias: np.ndarray | np.float32) -> _Projection | None:
    weight, source = constant(nodes[0].inputs[1]), nodes[0].inputs[0]
    if weight is None or weight.ndim != 2 or source is None or bias.shape not in ((), weight.shape[1:]):
        return None
    return _Projection(nodes, source, weight, np.broadcast_to(bias, weight.shape[1:]).astype(weight.dtype))


def _records(what: DCNv3, offset: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the last axis in the order [group][2 K offsets, K masks, zeros]."""
    head, group = offset.shape[:-1], what.group
    empty = np.zeros((*head, group, what.record_width - 3 * what.points), offset.dtype)
    parts = [offset.reshape(*head, group, -1), mask.reshape(*head, group, -1), empty]
    return np.concatenate(parts, axis=-1).reshape(*head, -1)


def _project(node: ir.Node, parts: tuple[_Projection, _Projection], what: DCNv3, taken: set[str]) -> ir.Value:
    """Write the joint projection before ``node`` and return its result."""
    graph, stem = _graph(node), f"{node.name}_record"
    weight, bias = (_records(what, *(getattr(part, name) for part in parts)) for name in ("weight", "bias"))
    like = parts[0].nodes[0]
    value = parts[0].source
    for operator, array in (("MatMul", weight), ("Add", bias)):
        if operator == "Add" and not bias.any():
            break
        held = add_initializer(graph, fresh_name(f"{stem}_{operator}_constant", taken), array)
        made = ir.node(operator, [value, held], name=f"{stem}_{operator}")
        value, shape = made.outputs[0], like.outputs[0].shape
        value.name, value.type = fresh_name(f"{made.name}_out", taken), like.outputs[0].type
        value.shape = None if shape is None else ir.Shape([*shape[:-1], weight.shape[1]])
        inherit_metadata(made, [like])
        graph.insert_before(node, made)
    return value


def _graph(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"'{node.name}' belongs to no graph")
    return node.graph
