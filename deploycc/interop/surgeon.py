"""The door to onnx-graphsurgeon, which speaks the vocabulary of TensorRT engineers and forgets some of ours.

Graphsurgeon has no place for metadata, for types and shapes of values that are also constants, for the opsets of domains
that no node uses at the moment, or for the producer of a model. Coming back, what it dropped is taken from the model that
went in, matched by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploycc.interop.conversion import from_proto, to_proto

if TYPE_CHECKING:
    import onnx_graphsurgeon


def to_graphsurgeon(model: ir.Model) -> onnx_graphsurgeon.Graph:
    """Return the model as a graphsurgeon graph; the model is left as it is."""
    import onnx_graphsurgeon

    return onnx_graphsurgeon.import_onnx(to_proto(model))


def from_graphsurgeon(graph: onnx_graphsurgeon.Graph, *, like: ir.Model) -> ir.Model:
    """Return the model of an edited graphsurgeon graph, with what graphsurgeon dropped restored from ``like``.

    A node keeps its metadata if a node of that name and operator was in ``like``; a value its type, shape and metadata if a
    value of that name was, unless the graph says otherwise.
    """
    import onnx_graphsurgeon

    model = from_proto(onnx_graphsurgeon.export_onnx(graph, do_type_check=False))
    _restore_header(model, like)
    nodes = {node.name: node for node in ir.traversal.RecursiveGraphIterator(like.graph)}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        source = nodes.get(node.name)
        if source is not None and source.op_type == node.op_type:
            _restore_notes(node, source)
    values = _values(like.graph)
    for name, value in _values(model.graph).items():
        if name in values:
            _restore_value(value, values[name])
    return model


def _restore_header(model: ir.Model, like: ir.Model) -> None:
    model.ir_version = max(model.ir_version or 0, like.ir_version or 0)
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    model.domain, model.model_version = like.domain, like.model_version
    for domain, version in like.graph.opset_imports.items():
        model.graph.opset_imports.setdefault(domain, version)
    for key, function in like.functions.items():
        if key not in model.functions:
            model.functions[key] = function.clone()
    model.graph.name = model.graph.name or like.graph.name
    _restore_notes(model, like)
    _restore_notes(model.graph, like.graph)


def _restore_value(value: ir.Value, source: ir.Value) -> None:
    if value.type is None:
        value.type = source.type
    if value.shape is None and source.shape is not None and value.dtype == source.dtype:
        value.shape = source.shape.copy()
    _restore_notes(value, source)


def _restore_notes(target: Any, source: Any) -> None:
    target.doc_string = target.doc_string or source.doc_string
    for key, text in source.metadata_props.items():
        target.metadata_props.setdefault(key, text)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return every named value of the graph and its subgraphs."""
    values = {v.name: v for v in (*graph.inputs, *graph.initializers.values())}
    values.update((v.name, v) for node in ir.traversal.RecursiveGraphIterator(graph) for v in node.outputs)
    return {name: value for name, value in values.items() if name}
