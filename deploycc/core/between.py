"""What stands between two linear nodes: nothing, or the reason why they do not follow each other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from deploycc.core.affine import Link, is_unit_activation
from deploycc.core.convolution import Refusal
from deploycc.core.graph import is_constant, sole_consumer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import onnx_ir as ir

    Read = Callable[[ir.Node], Link | Refusal | None]

_SLOPED = frozenset({"LeakyRelu", "PRelu"})
_STATISTICS = frozenset({"LayerNormalization", "GroupNormalization", "InstanceNormalization"})
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})
_LINEAR = frozenset({"Conv", "Gemm", "MatMul", "Add"})
_SHUFFLE = ("Reshape", "Transpose", "Reshape")


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A linear node that would follow another, were it not for the refusal; a link is None where the node cannot be read as one."""

    node: ir.Node
    first: Link | None
    second: Link | None
    refusal: Refusal


def chains(nodes: Iterable[ir.Node], read: Read) -> tuple[list[list[Link]], list[Obstacle]]:
    """Return the maximal chains of links, each the only reader of the one before it, and what keeps others from being longer."""
    tails: dict[ir.Value, list[Link]] = {}
    found: list[list[Link]] = []
    obstacles: list[Obstacle] = []
    for node in nodes:
        link = read(node)
        if isinstance(link, Refusal):
            first = _producing(node.inputs[0], read)
            if isinstance(first, Link):
                obstacles.append(Obstacle(node, first, None, link))
        if not isinstance(link, Link):
            continue
        before = _before(link, read)
        if isinstance(before, Obstacle):
            obstacles.append(before)
        chain = tails.pop(before.output, None) if isinstance(before, Link) else None
        if chain is None:
            found.append(chain := [])
        chain.append(link)
        tails[link.output] = chain
    return found, obstacles


def nodes_between(links: Sequence[Link]) -> list[ir.Node]:
    """Return the nodes of a chain and the identities between them, all but the last."""
    inner = [node for link in links for node in link.nodes][:-1]
    for one, other in pairwise(links):
        node = sole_consumer(one.output)
        while node is not None and node not in other.nodes:
            inner.append(node)
            node = sole_consumer(node.outputs[0])
    return inner


def _before(link: Link, read: Read) -> Link | Obstacle | None:
    """Return the link that ``link`` follows, what keeps it from following one, or None."""
    path = [link.source]
    producer = link.source.producer()
    while producer is not None and is_unit_activation(producer) and producer.inputs[0] is not None:
        path.append(producer.inputs[0])
        producer = producer.inputs[0].producer()
    if producer is None or producer.graph is not link.nodes[0].graph:
        return None
    first = read(producer)
    if isinstance(first, Refusal):
        return Obstacle(link.nodes[0], None, link, first)
    if first is None:
        return _obstacle(producer, link, read)
    for value in path:
        if refusal := shared(value):
            return Obstacle(link.nodes[0], first, link, refusal)
    return first


def shared(value: ir.Value) -> Refusal | None:
    """Return why ``value`` cannot disappear into the one node that is to read it."""
    if value.is_graph_output():
        return Refusal("GRAPH_OUTPUT", f"'{value.name}' is an output of the graph")
    if len(value.uses()) > 1:
        return Refusal("MULTI_CONSUMER", f"'{value.name}' is read {len(value.uses())} times")
    return None


def _obstacle(node: ir.Node, link: Link, read: Read) -> Obstacle | None:
    """Recognise what is between ``link`` and a linear node one or a few nodes before it."""
    kinds = [_activation, _statistic, _gate, _conversion, _shuffle]
    for kind in kinds:
        found = kind(node)
        if found is None:
            continue
        value, refusal = found
        first = _producing(value, read)
        if isinstance(first, Link):
            return Obstacle(link.nodes[0], first, link, refusal)
    return None


Found = tuple["ir.Value | None", Refusal] | None


def _activation(node: ir.Node) -> Found:
    if node.op_type not in _SLOPED:
        return None
    return node.inputs[0], Refusal("ACTIVATION_BETWEEN", f"the slope of '{node.name}' is not 1")


def _statistic(node: ir.Node) -> Found:
    if node.op_type not in _STATISTICS:
        return None
    return node.inputs[0], Refusal("DATA_DEPENDENT", f"'{node.name}' normalizes by statistics of the data")


def _gate(node: ir.Node) -> Found:
    """Recognise a product of a linear node's output with something computed that is not just an activation of it (SiLU)."""
    if node.op_type != "Mul" or any(is_constant(v) or v is None for v in node.inputs):
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        scaled = value.producer() if value is not None else None
        gate = other.producer() if other is not None else None
        if other is None or scaled is None or scaled.op_type not in _LINEAR or (gate is not None and value in gate.inputs):
            continue
        return value, Refusal("DATA_DEPENDENT", f"'{node.name}' scales by '{other.name}', which is computed")
    return None


def _conversion(node: ir.Node) -> Found:
    if node.op_type not in _CONVERSIONS:
        return None
    value, reason = node.inputs[0], f"'{node.name}' converts the type between them"
    while value is not None and (producer := value.producer()) is not None and producer.op_type in _CONVERSIONS:
        value = producer.inputs[0]
    return value, Refusal("DTYPE", reason)


def _shuffle(node: ir.Node) -> Found:
    value: ir.Value | None = node.outputs[0]
    for wanted in _SHUFFLE:
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != wanted:
            return None
        value = producer.inputs[0]
    return value, Refusal("SHUFFLE", f"channels are shuffled up to '{node.name}'")


def _producing(value: ir.Value | None, read: Read) -> Link | Refusal | None:
    producer = value.producer() if value is not None else None
    return read(producer) if producer is not None else None
