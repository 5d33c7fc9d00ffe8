"""Conversion to and from ONNX protos, and the walks over protos that the loader needs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


PROTOBUF_LIMIT = 2**31 - 1


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Return a self-contained proto: external weights are copied into it.

    Raises:
        UsageError: when the weights exceed what one proto can hold (2 GB); ``save_model`` writes those.
    """
    held = [(v, v.const_value) for v in model.graph.initializers.values() if v.const_value is not None]
    total = sum(tensor.nbytes for _, tensor in held)
    if total > PROTOBUF_LIMIT:
        raise UsageError(
            f"the weights take {total / 1e9:.1f} GB, more than the 2 GB of one ONNX proto",
            at=f"graph '{model.graph.name}'",
            fix="write it with save_model, which keeps weights in external data",
        )
    try:
        for value, tensor in held:
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=value.name)
        return ir.to_proto(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor


def to_bytes(model: ir.Model) -> bytes:
    """Return the self-contained, serialized proto, as onnxruntime and TensorRT read it."""
    return bytes(to_proto(model).SerializeToString(deterministic=True))


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """Return the model of a proto as it stands: nothing is checked, converted or inferred."""
    return ir.from_proto(proto)


def parse_proto(data: bytes) -> onnx.ModelProto:
    """Return the proto of serialized bytes.

    Raises:
        DecodeError: when the bytes are no message.
    """
    proto = onnx.ModelProto()
    proto.ParseFromString(data)
    return proto


def graphs(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto]:
    """Yield ``graph`` and every subgraph under it, outermost first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of ``graph`` and of its subgraphs."""
    for each in graphs(graph):
        yield from each.node


def definitions(graph: onnx.GraphProto) -> Counter[str]:
    """Return how often each value name is defined in ``graph`` and its subgraphs."""
    names: Counter[str] = Counter()
    for each in graphs(graph):
        fed = {v.name for v in each.input}
        names.update(fed)
        names.update(t.name for t in each.initializer if t.name not in fed)
        names.update(name for node in each.node for name in node.output if name)
    return names


def anchor(node: onnx.NodeProto) -> str:
    """Return the words that name a node in a message."""
    if node.name:
        return f"node '{node.name}' ({node.op_type})"
    return f"the unnamed {node.op_type} node that produces '{next(iter(node.output), '')}'"


def elements(tensor: onnx.TensorProto) -> int:
    """Return the number of elements that a tensor declares."""
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count
