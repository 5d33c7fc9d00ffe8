"""Walks over ONNX protos. Nothing here knows onnx_ir: the child process of the loader starts faster without it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from collections.abc import Iterator


PROTOBUF_LIMIT = 2**31 - 1


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
