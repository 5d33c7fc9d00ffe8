"""Take the weights out of a proto before a child process sees it, and put them back afterwards.

A skeleton is the model in which every large tensor has become a typed graph input: checking, inlining, version conversion
and shape inference need its type and shape but never its numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from deploycc.interop.protos import definitions, elements, graphs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LARGE = 1024


def detach(proto: onnx.ModelProto, folder: Path) -> dict[str, ir.TensorProtocol]:
    """Turn ``proto`` into a skeleton in place and return the tensors it lost, by value name.

    Large initializers and Constants of subgraphs move to the main graph, where they are visible under the same name.
    Data that is external stays on disk, memory-mapped on first use.
    """
    main, defined = proto.graph, definitions(proto.graph)
    outputs = {v.name for v in main.output}
    held: dict[str, ir.TensorProtocol] = {}
    _drop_inputs(main, {t.name for t in main.initializer})
    for graph in graphs(main):
        for tensor in _take_large(graph, {name for name, count in defined.items() if count > 1} | outputs):
            held[tensor.name] = tensor_of(tensor, folder)
            main.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        _embed_small(graph, folder)
    return held


def attach(model: ir.Model, held: Mapping[str, ir.TensorProtocol]) -> None:
    """Turn the stand-in inputs of a skeleton back into initializers, in place."""
    graph = model.graph
    stand_ins = [value for value in graph.inputs if value.name in held]
    kept = [value for value in graph.inputs if value.name not in held]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    for value in stand_ins:
        if not value.uses() and not value.is_graph_output():
            continue
        value.const_value = held[value.name or ""]
        graph.register_initializer(value)


def tensor_of(proto: onnx.TensorProto, folder: Path) -> ir.TensorProtocol:
    """Return the tensor of a proto without keeping the proto alive: memory-mapped where external, else one read-only array."""
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        return ir.serde.deserialize_tensor(proto, folder)
    wrapped = ir.serde.TensorProtoTensor(proto)
    if proto.HasField("raw_data") and ir.DataType(proto.data_type).bitwidth >= 8:
        dtype = ir.DataType(proto.data_type).numpy()
        array = np.frombuffer(proto.raw_data, dtype=np.dtype(dtype).newbyteorder("<") if np.dtype(dtype).isbuiltin else dtype)
        return ir.Tensor(array.reshape(tuple(proto.dims)), dtype=ir.DataType(proto.data_type), name=proto.name)
    return wrapped


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the tensor of a Constant node, if it holds one in its attribute ``value``."""
    if node.op_type != "Constant" or node.domain not in {"", "ai.onnx"}:
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


def _take_large(graph: onnx.GraphProto, pinned: set[str]) -> Iterator[onnx.TensorProto]:
    """Remove the large tensors of one graph, yielding each under the name of its value."""
    for index in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[index]
        if tensor.name not in pinned and elements(tensor) > LARGE:
            yield tensor
            del graph.initializer[index]
    for index in reversed(range(len(graph.node))):
        value = constant_tensor(graph.node[index])
        if value is not None and graph.node[index].output[0] not in pinned and elements(value) > LARGE:
            value.name = graph.node[index].output[0]
            yield value
            del graph.node[index]


def _drop_inputs(graph: onnx.GraphProto, names: set[str]) -> None:
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in names:
            del graph.input[index]


def _embed_small(graph: onnx.GraphProto, folder: Path) -> None:
    """Read what is external but stays in the skeleton: shape inference needs the numbers of small constants."""
    constants = (constant_tensor(node) for node in graph.node)
    for tensor in (*graph.initializer, *(c for c in constants if c is not None)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            data = ir.serde.deserialize_tensor(tensor, folder).tobytes()
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = data
