"""Small questions about an onnx_ir graph, and the few edits that every pass needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np
import onnx_ir as ir

FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of an initializer, or None for anything computed, fed or absent."""
    if value is None or value.const_value is None or not is_constant(value):
        return None
    return value.const_value.numpy()


def widened(value: ir.Value | None) -> np.ndarray | None:
    """Return a float64 copy of an initializer; external data is unmapped again, so that its pages do not stay in memory."""
    array = constant(value)
    if array is None or value is None:
        return None
    wide: np.ndarray = np.array(array, dtype=np.float64)
    del array
    if isinstance(value.const_value, ir.ExternalTensor):
        # An array that somebody else still holds keeps the pages; they go with it.
        with suppress(BufferError):
            value.const_value.release()
    return wide


def is_constant(value: ir.Value | None) -> bool:
    """Return whether ``value`` is an initializer with data, without reading the data."""
    return value is not None and value.const_value is not None and value.is_initializer() and not value.is_graph_input()


def scalar(value: ir.Value | None) -> float | None:
    """Return the number held by a one-element constant, else None."""
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(-1)[0])


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """Return the only node that reads ``value`` if there is exactly one and the value is not a graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """Return the plain value of an attribute, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return the integer held by an attribute, or ``default``."""
    return node.attributes[name].as_int() if name in node.attributes else default


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """Return the integers held by an attribute, or None if it is absent."""
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else None


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Return the number held by an attribute, or ``default``."""
    return node.attributes[name].as_float() if name in node.attributes else default


def rank(value: ir.Value | None) -> int | None:
    """Return the number of dimensions if it is known."""
    return None if value is None or value.shape is None else len(value.shape)


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape if every dimension is a known integer."""
    if value is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def axes_of(node: ir.Node) -> tuple[int, ...] | None:
    """Return the axes given as an attribute or as a constant second input, else None."""
    if "axes" in node.attributes:
        return tuple(node.attributes["axes"].as_ints())
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if given is None else tuple(int(a) for a in given.reshape(-1))


def taken_names(graph: ir.Graph) -> set[str]:
    """Return every value name of the graph and of its subgraphs."""
    names = {v.name for v in graph.inputs if v.name} | set(graph.initializers)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        names.update(v.name for v in node.outputs if v.name)
    return names


def fresh_name(wanted: str, taken: set[str]) -> str:
    """Return ``wanted`` or the first free ``wanted_N``, and mark it as taken."""
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """Register a constant under a name derived from ``name`` that is free in the graph."""
    fed, wanted, number = {v.name for v in graph.inputs}, name, 1
    while name in graph.initializers or name in fed:
        name, number = f"{wanted}_{number}", number + 1
    tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def reduction(op: str, value: ir.Value, axes: Sequence[int], graph: ir.Graph, name: str) -> ir.Node:
    """Return a node that reduces ``value`` over ``axes`` and drops them, as the opset of ``graph`` writes it; it is in no graph yet."""
    if graph.opset_imports.get("", 0) < 18:
        return ir.node(op, [value], {"keepdims": 0, "axes": list(axes)}, name=name)
    return ir.node(op, [value, add_initializer(graph, f"{name}_axes", np.array(axes, np.int64))], {"keepdims": 0}, name=name)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``; a graph output keeps its name, type and shape."""
    graph = new.graph or old.graph
    if old.is_graph_output() and graph is not None:
        name = old.name
        for position, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[position] = new
        old.name = f"{name}_replaced"
        new.name = name
        if new.type is None:
            new.type = old.type
        if old.shape is not None:
            new.shape = old.shape
    old.replace_all_uses_with(new)


def remove_dead_nodes(graph: ir.Graph, candidates: Iterable[ir.Node] | None = None) -> list[str]:
    """Remove nodes none of whose outputs are read, walking backwards; return their names."""
    removed: list[str] = []
    for node in reversed(list(candidates if candidates is not None else graph)):
        if node.graph is not graph or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        graph.remove(node, safe=True)
        removed.append(node.name or node.op_type)
    return removed


def remove_unused_initializers(graph: ir.Graph) -> None:
    """Drop initializers that nobody reads."""
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]


def opset(model: ir.Model) -> int:
    """Return the version of the default ONNX domain."""
    return model.graph.opset_imports.get("", 0)


def can_take_name(value: ir.Value) -> bool:
    """Return whether ``value`` may be renamed, as ``replace_value`` does where it replaces a graph output."""
    return value.producer() is not None and not value.is_graph_output() and not value.is_graph_input()


def inherit_metadata(node: ir.Node, sources: Iterable[ir.Node]) -> None:
    """Give ``node`` the metadata of the nodes whose work it took over; what it already has stays."""
    for source in sources:
        for key, text in source.metadata_props.items():
            node.metadata_props.setdefault(key, text)


def substitute(
    last: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    *,
    attributes: Sequence[ir.Attr] = (),
    absorbed: Sequence[ir.Node] = (),
) -> ir.Node:
    """Replace ``last``, and the ``absorbed`` nodes that only it needs, by one node that keeps its name and output name."""
    graph, old = last.graph, last.outputs[0]
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"'{last.name}' belongs to no graph")
    node = ir.Node("", operator, inputs, attributes, num_outputs=1, name=last.name)
    new = node.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    inherit_metadata(node, [last, *absorbed])
    graph.insert_before(last, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(last, safe=True)
    while remove_dead_nodes(graph, absorbed):
        pass
    return node


def escapes(region: Iterable[ir.Node], last: ir.Node) -> ir.Value | None:
    """Return a value of ``region`` that something outside reads, the outputs of ``last`` aside, or None."""
    inside = {*region, last}
    for node in inside - {last}:
        for value in node.outputs:
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                return value
    return None
