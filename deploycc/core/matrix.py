"""Matrix products by constants, with the bias behind them, read as convolutions without spatial axes and written back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.affine import Link, computed, per_channel, write_constant
from deploycc.core.convolution import Convolution, Geometry, Refusal
from deploycc.core.graph import constant, float_attribute, fresh_name, int_attribute, is_constant, rank, sole_consumer, substitute

if TYPE_CHECKING:
    from collections.abc import Sequence


def read_linear(node: ir.Node) -> Link | Refusal | None:
    """Return a Gemm, or a MatMul with the Add of its bias, as a link; why it cannot be one; or None for another node.

    A MatMul that only such an Add reads is part of that link and none of its own.
    """
    if node.op_type == "Gemm":
        return _gemm(node)
    if node.op_type == "MatMul":
        reader = sole_consumer(node.outputs[0])
        return None if reader is not None and _bias_of(reader, node) is not None else _product(node)
    if node.op_type == "Add":
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.op_type == "MatMul" and sole_consumer(producer.outputs[0]) is node:
                bias = _bias_of(node, producer)
                return _product(producer, node, bias) if bias is not None else None
    return None


def write_linear(
    last: ir.Node, source: ir.Value, merged: Convolution, *, form: str, absorbed: Sequence[ir.Node], dtype: ir.DataType, taken: set[str]
) -> ir.Node:
    """Replace ``last`` and the nodes it absorbs by one ``form``, Gemm or MatMul, of ``source``, and the Add of a bias behind a MatMul."""
    stem = last.outputs[0].name
    inputs = [source, write_constant(last, f"{stem}_merged", merged.weight.T, dtype=dtype, taken=taken)]
    bias = write_constant(last, f"{stem}_bias", merged.bias, dtype=dtype, taken=taken) if np.any(merged.bias) else None
    if form == "Gemm" or bias is None:
        return substitute(last, form, inputs if bias is None else [*inputs, bias], absorbed=absorbed)
    product = ir.node("MatMul", inputs, name=fresh_name(f"{last.name}_product", taken))
    value = product.outputs[0]
    value.name, value.type, value.shape = fresh_name(f"{stem}_product", taken), last.outputs[0].type, last.outputs[0].shape
    if isinstance(last.graph, ir.Graph):
        last.graph.insert_before(last, product)
    return substitute(last, "Add", [value, bias], absorbed=absorbed)


def form_of(links: Sequence[Link]) -> str:
    """Return the operator that a chain of products is written as."""
    return "Gemm" if all(link.nodes[0].op_type == "Gemm" for link in links) else "MatMul"


def _gemm(node: ir.Node) -> Link | Refusal | None:
    if node.inputs[0] is None or int_attribute(node, "transA", 0):
        return None
    if refusal := computed(node):
        return refusal
    weight = node.inputs[1]
    sizes = _sizes(weight)
    outputs, inputs = sizes if int_attribute(node, "transB", 0) else sizes[::-1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    shift = np.zeros(outputs) if bias is None else per_channel(bias, outputs, 2)
    if shift is None:
        return None
    shift = shift * float_attribute(node, "beta", 1.0)
    geometry = Geometry(outputs, inputs, (), (), (), (), (), biased=bool(np.any(shift)))

    def load() -> Convolution:
        matrix = _array(weight) if int_attribute(node, "transB", 0) else _array(weight).T
        return Convolution(geometry, matrix * float_attribute(node, "alpha", 1.0), shift)

    return Link((node,), node.inputs[0], geometry, load)


def _product(node: ir.Node, addition: ir.Node | None = None, bias: np.ndarray | None = None) -> Link | Refusal | None:
    source, weight = node.inputs
    if source is None or is_constant(source) or (rank(source) or 0) < 2 or rank(weight) != 2:
        return None
    if refusal := computed(node):
        return refusal
    inputs, outputs = _sizes(weight)
    shift = np.zeros(outputs) if bias is None else bias
    geometry = Geometry(outputs, inputs, (), (), (), (), (), biased=bool(np.any(shift)))
    return Link((node, addition) if addition else (node,), source, geometry, lambda: Convolution(geometry, _array(weight).T, shift))


def _bias_of(addition: ir.Node, product: ir.Node) -> np.ndarray | None:
    """Return the vector that an Add puts on a product, if that is what it does."""
    sizes = product.inputs[1].shape if product.inputs[1] is not None else None
    axes = rank(product.outputs[0])
    if addition.op_type != "Add" or sizes is None or axes is None or rank(product.inputs[1]) != 2 or not isinstance(sizes[1], int):
        return None
    other = next((v for v in addition.inputs if v is not product.outputs[0]), None)
    return per_channel(other, sizes[1], axes, axis=axes - 1)


def _sizes(value: ir.Value | None) -> tuple[int, int]:
    if value is None or value.const_value is None:
        raise TypeError("a constant was expected")
    rows, columns = value.const_value.shape.numpy()
    return int(rows), int(columns)


def _array(value: ir.Value | None) -> np.ndarray:
    found = constant(value)
    if found is None:
        raise TypeError("a constant was expected")
    return found.astype(np.float64)
