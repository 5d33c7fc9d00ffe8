"""Topological order of a proto's nodes."""

from __future__ import annotations

import heapq

import onnx

from deploycc.core.errors import UsageError
from deploycc.interop.protos import anchor, definitions, graphs


def sort_nodes(graph: onnx.GraphProto, path: str) -> None:
    """Bring the nodes of ``graph`` and its subgraphs into topological order, changing as little as possible.

    Raises:
        UsageError: when there is a cycle, naming a node of it.
    """
    for each in graphs(graph):
        order = _order(each, path)
        if order != list(range(len(each.node))):
            ordered = [onnx.NodeProto.FromString(each.node[i].SerializeToString()) for i in order]
            del each.node[:]
            each.node.extend(ordered)


def _order(graph: onnx.GraphProto, path: str) -> list[int]:
    producer = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    waiting, readers = [0] * len(graph.node), [[] for _ in graph.node]  # type: tuple[list[int], list[list[int]]]
    for index, node in enumerate(graph.node):
        for source in {producer[name] for name in _reads(node) if name in producer}:
            waiting[index] += 1
            readers[source].append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(graph.node):
        stuck = graph.node[min(set(range(len(graph.node))) - set(order))]
        raise UsageError("the graph has a cycle", at=f"{anchor(stuck)} of '{path}' waits for its own result", fix="export the model again")
    return order


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the names a node reads, those read by its subgraphs from outside included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            read = {n for each in graphs(inner) for n in (*(i for x in each.node for i in x.input), *(o.name for o in each.output))}
            names |= read - set(definitions(inner))
    return names
