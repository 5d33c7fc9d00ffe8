"""Rewrite a model so that a CPU without 16-bit arithmetic computes what a 16-bit engine would.

Every value of type BFLOAT16 or FLOAT16 becomes a FLOAT value that holds only numbers of the 16-bit type: each node computes
in FLOAT and its result is rounded through ``Cast`` to the 16-bit type and back. ONNX Runtime's CPU provider has no BFLOAT16
kernels at all, and between consecutive FLOAT16 nodes it keeps FLOAT, which hides an overflow that the engine would have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import fresh_name, taken_names

if TYPE_CHECKING:
    from collections.abc import Iterator

EMULATED = frozenset({ir.DataType.BFLOAT16, ir.DataType.FLOAT16})
DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type", "precision", "softmax_precision"})
# These only move or select values: what enters rounded leaves rounded.
# fmt: off
MOVES = frozenset({
    "Abs", "Clip", "Compress", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "GlobalMaxPool", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape",
    "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze",
    "Where",
})
# fmt: on


def emulate(model: ir.Model) -> ir.Model:
    """Return a copy of ``model`` without 16-bit arithmetic; inputs and outputs of 16-bit types become FLOAT.

    Inputs are rounded on entry, constants hold rounded values. Model-local functions are inlined.
    """
    import onnx_ir.passes.common as common

    copy = model.clone()
    if copy.functions:
        common.InlinePass()(copy)
    if any(value.dtype is None for value in _computed(copy)):
        common.ShapeInferencePass()(copy)
    for graph in list(copy.graphs()):
        _emulate_graph(graph, is_main=graph is copy.graph)
    return copy


def uses_emulated_types(model: ir.Model) -> bool:
    """Return whether any value of ``model`` has a type that `emulate` rewrites."""
    if any(v.dtype in EMULATED for graph in model.graphs() for v in (*graph.inputs, *graph.initializers.values())):
        return True
    return any(v.dtype in EMULATED or v.dtype is None for v in _computed(model))


def _computed(model: ir.Model) -> Iterator[ir.Value]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from (v for v in node.outputs if v.name)


def _emulate_graph(graph: ir.Graph, *, is_main: bool) -> None:
    taken = taken_names(graph)
    for value in graph.initializers.values():
        _widen_constant(value)
    for value in graph.inputs:
        kind = _widen(value)
        if kind is not None and is_main:
            _round_after(value, kind, before=graph[0] if len(graph) else None, graph=graph, taken=taken)
    for node in list(graph):
        _widen_attributes(node)
        for value in node.outputs:
            kind = _widen(value)
            if kind is not None and node.op_type not in MOVES:
                _round_after(value, kind, before=None, graph=graph, taken=taken)


def _widen(value: ir.Value) -> ir.DataType | None:
    """Retype a 16-bit value as FLOAT and return the type it had, or None if there was nothing to do."""
    kind = value.dtype
    if kind not in EMULATED:
        return None
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return kind


def _widen_constant(value: ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype in EMULATED:
        value.const_value = _wide(value.const_value)
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in EMULATED:
            node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value))
        elif attribute.type == ir.AttributeType.INT and name in DTYPE_ATTRIBUTES and attribute.value in EMULATED:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))


def _round_after(value: ir.Value, kind: ir.DataType, *, before: ir.Node | None, graph: ir.Graph, taken: set[str]) -> None:
    """Let every reader of ``value`` (and the graph's output list) see it rounded to ``kind``."""
    producer = value.producer()
    down = ir.node("Cast", [value], attributes={"to": int(kind)})
    up = ir.node("Cast", [down.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)})
    rounded = up.outputs[0]
    down.name, up.name = f"{value.name}/round", f"{value.name}/widen"
    down.outputs[0].name = fresh_name(f"{value.name}_16", taken)
    down.outputs[0].type, down.outputs[0].shape = ir.TensorType(kind), value.shape
    rounded.type, rounded.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    rounded.name = fresh_name(f"{value.name}_rounded", taken)
    is_output = value.is_graph_output()
    if is_output and producer is not None:
        name, value.name = value.name, rounded.name
        rounded.name = name
    ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=is_output)
    down.replace_input_with(0, value)
    if producer is not None:
        graph.insert_after(producer, [down, up])
    elif before is not None:
        graph.insert_before(before, [down, up])
    else:
        graph.extend([down, up])
