"""Split a joint projection (q, k and v in one product) into one product per part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import add_initializer, attribute, constant, remove_dead_nodes, replace_value, sole_consumer
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite


@dataclass(frozen=True, slots=True)
class SplitProjections:
    """Split ``MatMul`` with joint weights, whose output is taken apart along one axis, into one ``MatMul`` per part.

    Why: TensorRT-RTX takes a joint q/k/v projection apart itself, and dequantizes its INT8 or FP8 weights to do so: the engine then
    computes it in FP16. Three products over one quantized input stay quantized.
    Runs only when something will be quantized (phase ``prepare``).

    Before / After:
        ``t = Transpose(Reshape(x W + b)); q = t[0]; k = t[1]; v = t[2]`` / ``q = Transpose(Reshape(x W_q + b_q))``, k and v likewise;
        W_q are columns of W, so the numbers are the same.

    Declines when:
        READER: a reader does not take exactly one index of the axis.
        SHAPE: the shape of the reshape is computed.

    Options: none.

    See: rule T3 in ``deploycc.core.rules``.
    """

    phase: ClassVar[Phase] = "prepare"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        for node in list(model.graph):
            if node.op_type != "MatMul" or (weight := constant(node.inputs[1])) is None or weight.ndim != 2:
                continue
            found = _match(node, weight.shape[1])
            if isinstance(found, Decline):
                declines.append(found)
            elif found is not None:
                _rewrite(model.graph, node, weight, found)
                rewrites.append(Rewrite(node.name or "", f"{len(found.parts)} products over one input"))
        return PassResult(tuple(rewrites), tuple(declines))


@dataclass(frozen=True, slots=True)
class _Joint:
    """The nodes behind a joint projection: bias, reshape, transpose, and what each reader takes."""

    bias: np.ndarray | None
    reshape: ir.Node
    shape: np.ndarray
    transpose: ir.Node
    permutation: list[int]
    axis: int
    factors: tuple[int, ...]
    leading: int
    parts: list[tuple[int, ir.Value]]


def _match(product: ir.Node, columns: int) -> _Joint | Decline | None:
    reader, bias = sole_consumer(product.outputs[0]), None
    if reader is not None and reader.op_type == "Add":
        bias = next((c for v in reader.inputs if (c := constant(v)) is not None), None)
        if bias is None or bias.shape != (columns,):
            return None
        reader = sole_consumer(reader.outputs[0])
    if reader is None or reader.op_type != "Reshape":
        return None
    transpose = sole_consumer(reader.outputs[0])
    if transpose is None or transpose.op_type != "Transpose" or len(transpose.outputs[0].uses()) < 2:
        return None
    permutation = [int(p) for p in attribute(transpose, "perm", ())]  # type: ignore[attr-defined]
    readers = [use.node for use in transpose.outputs[0].uses()]
    taken = [_taken(node) for node in readers]
    if not any(taken) or transpose.outputs[0].is_graph_output() or not permutation:
        return None
    if any(t is None for t in taken) or len({t[0] for t in taken if t}) != 1:
        return Decline(product.name or "", "READER", f"a reader of '{transpose.outputs[0].name}' does not take one index of one axis")
    axis = permutation[taken[0][0] % len(permutation)] if taken[0] else 0
    shape, dims = constant(reader.inputs[1]), reader.outputs[0].shape
    factors = _factors(dims, columns)
    if shape is None or factors is None or attribute(reader, "allowzero", 0):
        return Decline(product.name or "", "SHAPE", f"the shape of '{reader.name}' is not constant")
    leading = len(permutation) - len(factors)
    if axis < leading or sorted(t[1] for t in taken if t) != list(range(factors[axis - leading])):
        return Decline(product.name or "", "READER", "the parts that are read are not the factors of the output columns")
    return _Joint(bias, reader, shape, transpose, permutation, axis, factors, leading, [(t[1], t[2]) for t in taken if t])


def _factors(dims: ir.Shape | None, columns: int) -> tuple[int, ...] | None:
    """Return the trailing dimensions whose product is the number of columns."""
    factors: tuple[int, ...] = ()
    for dim in reversed(list(dims) if dims is not None else []):
        if not isinstance(dim, int):
            return None
        factors = (dim, *factors)
        if int(np.prod(factors)) == columns:
            return factors
    return None


def _taken(node: ir.Node) -> tuple[int, int, ir.Value] | None:
    """Return ``(axis, index, value)`` when ``node`` takes one index of one axis and drops the axis."""
    if node.op_type == "Gather":
        index = constant(node.inputs[1])
        if index is not None and index.ndim == 0 and int(index) >= 0:
            return int(attribute(node, "axis", 0)), int(index), node.outputs[0]  # type: ignore[call-overload]
        return None
    squeeze = sole_consumer(node.outputs[0])
    if node.op_type != "Slice" or squeeze is None or squeeze.op_type != "Squeeze" or len(node.inputs) < 4:
        return None
    numbers = [constant(v) for v in (*node.inputs[1:4], squeeze.inputs[1] if len(squeeze.inputs) > 1 else None)]
    if any(n is None or n.size != 1 for n in numbers) or (len(node.inputs) > 4 and constant(node.inputs[4]) is None):
        return None
    start, end, axis, dropped = (int(n.reshape(-1)[0]) for n in numbers if n is not None)
    return (axis, start, squeeze.outputs[0]) if end == start + 1 and axis == dropped and start >= 0 and axis >= 0 else None


def _rewrite(graph: ir.Graph, product: ir.Node, weight: np.ndarray, joint: _Joint) -> None:
    columns = np.arange(weight.shape[1]).reshape(joint.factors)
    shape = np.delete(joint.shape, joint.axis)
    permutation = [p - (p > joint.axis) for p in joint.permutation if p != joint.axis]
    for index, value in joint.parts:
        chosen = columns.take(index, axis=joint.axis - joint.leading).reshape(-1)
        stem = f"{product.name}_part{index}"
        source = product.inputs[1]
        part = add_initializer(graph, f"{source.name if source else stem}_part{index}", weight[:, chosen])
        chain = [ir.node("MatMul", [product.inputs[0], part], name=stem)]
        if joint.bias is not None:
            offset = add_initializer(graph, f"{stem}_bias", joint.bias[chosen])
            chain.append(ir.node("Add", [chain[-1].outputs[0], offset], name=f"{stem}_Add"))
        to = add_initializer(graph, f"{stem}_shape", shape)
        chain.append(ir.node("Reshape", [chain[-1].outputs[0], to], name=f"{stem}_Reshape"))
        chain.append(ir.node("Transpose", [chain[-1].outputs[0]], {"perm": permutation}, name=f"{stem}_Transpose"))
        _describe(chain, product, joint, value, len(chosen))
        graph.insert_after(joint.transpose, chain)
        replace_value(value, chain[-1].outputs[0])
    remove_dead_nodes(graph)


def _describe(chain: list[ir.Node], product: ir.Node, joint: _Joint, value: ir.Value, width: int) -> None:
    """Give the new nodes names, types, shapes and the origin of the product."""
    rows, taken_apart = product.outputs[0].shape, joint.reshape.outputs[0].shape
    flat = ir.Shape([*list(rows)[:-1], width]) if rows is not None else None
    split = ir.Shape([d for i, d in enumerate(taken_apart) if i != joint.axis]) if taken_apart is not None else None
    for node in chain:
        node.metadata_props.update(product.metadata_props)
        output = node.outputs[0]
        output.name, output.type = f"{node.name}_out", value.type
        output.shape = {"Reshape": split, "Transpose": value.shape}.get(node.op_type, flat)
