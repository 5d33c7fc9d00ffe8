"""Sums of branches over one value: which operands of an Add are affine in the same value, and their sum as one convolution."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core import convolution
from deploycc.core.affine import Link, per_channel, read_convolution, read_pointwise, read_pooling
from deploycc.core.between import shared
from deploycc.core.chains import composed, composed_geometry
from deploycc.core.convolution import Convolution, Geometry, Refusal
from deploycc.core.dimensions import dimensions
from deploycc.core.graph import is_constant, rank, sole_consumer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

_SUMS = frozenset({"Add", "Sum"})


@dataclass(frozen=True, slots=True)
class Branch:
    """One operand of a sum as a chain of links over ``source``; no links are a plain skip, a Conv makes it weighted."""

    value: ir.Value
    source: ir.Value
    links: tuple[Link, ...]
    is_weighted: bool = False
    refusal: Refusal | None = None

    @property
    def name(self) -> str:
        """Return the name of the last node, or what a skip is called in a report."""
        return f"'{self.links[-1].name}'" if self.links else "the skip"


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a sum that becomes one convolution.

    ``root`` is the outermost Add, ``inner`` are the sums flattened into it, ``rest`` the operands that stay, and ``behind`` the
    normalizations of the whole sum.
    """

    root: ir.Node
    inner: tuple[ir.Node, ...]
    branches: tuple[Branch, ...]
    shift: np.ndarray
    rest: tuple[ir.Value, ...]
    behind: tuple[Link, ...]

    @property
    def source(self) -> ir.Value:
        """Return the value that every branch reads."""
        return self.branches[0].source

    @property
    def links(self) -> list[Link]:
        """Return every link that disappears."""
        return [link for branch in self.branches for link in branch.links] + list(self.behind)

    @property
    def absorbed(self) -> list[ir.Node]:
        """Return every node that disappears, but for the last when nothing else is added to it."""
        nodes = [*self.inner, *(node for link in self.links for node in link.nodes)]
        return [node for node in (self.root, *nodes) if node is not self.last]

    @property
    def last(self) -> ir.Node:
        """Return the node whose output the whole sum is."""
        return self.behind[-1].nodes[0] if self.behind else self.root


def select(nodes: list[ir.Node]) -> Iterator[tuple[ir.Node, Selection | None, list[Refusal]]]:
    """Yield every outermost sum with what can be merged in it, and why some of its branches cannot."""
    for node in nodes:
        reader = sole_consumer(node.outputs[0]) if node.op_type in _SUMS else None
        if node.op_type not in _SUMS or (reader is not None and reader.op_type in _SUMS) or (rank(node.outputs[0]) or 0) < 3:
            continue
        inner: list[ir.Node] = []
        operands = list(_operands(node, inner))
        yield node, *_select(node, inner, operands)


def combined_geometry(selection: Selection) -> Geometry | Refusal:
    """Return the geometry of the one convolution, or why there is none."""
    geometries = [_geometry(branch, selection.shift.size) for branch in selection.branches]
    usable = [g for g in geometries if isinstance(g, Geometry)]
    total = convolution.add_geometry(usable)
    if isinstance(total, Refusal):
        return total
    return composed_geometry([total, *(link.geometry for link in selection.behind)])


def combined(selection: Selection) -> Convolution | Refusal:
    """Return the numbers of the one convolution."""
    axes, branches = selection.branches[0].source, []
    for branch in selection.branches:
        one = composed(branch.links) if branch.links else convolution.identity(selection.shift.size, rank=(rank(axes) or 2) - 2)
        if isinstance(one, Refusal):
            return one
        branches.append(one)
    total = convolution.add(branches)
    if isinstance(total, Refusal):
        return total
    total = Convolution(total.geometry, total.weight, total.bias + selection.shift)
    for link in selection.behind:
        merged = convolution.compose(total, link.load())
        if isinstance(merged, Refusal):
            return merged
        total = merged
    return total


def _operands(node: ir.Node, inner: list[ir.Node]) -> Iterator[ir.Value]:
    """Yield what a sum adds up, sums that only it reads flattened."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if value is None:
            continue
        nested = producer is not None and producer.op_type in _SUMS and producer.graph is node.graph and sole_consumer(value) is node
        if producer is not None and nested and rank(value) == rank(node.outputs[0]):
            inner.append(producer)
            yield from _operands(producer, inner)
        else:
            yield value


def _select(root: ir.Node, inner: list[ir.Node], operands: list[ir.Value]) -> tuple[Selection | None, list[Refusal]]:
    sizes = dimensions(root.outputs[0]) or ()
    channels = sizes[1] if len(sizes) > 1 else None
    if not isinstance(channels, int):
        return None, []
    constants = {v: a for v in operands if (a := per_channel(v, channels, len(sizes))) is not None}
    paths = [list(_path(v)) for v in operands if not is_constant(v) and rank(v) == len(sizes)]
    source, refusals = _common_source(paths), []
    chosen = [next((b for b in path if b.source is source and b.refusal is None), None) for path in paths]
    branches = []
    for branch in (b for b in chosen if b is not None):
        geometry = _geometry(branch, channels)
        if isinstance(geometry, Refusal):
            refusals.append(geometry)
        else:
            branches.append(branch)
    refusals += _blocked(paths, source)
    rest = [v for v in operands if v not in constants and v not in {b.value for b in branches}]
    same = all(dimensions(v) == sizes for v in operands if v not in constants)
    if len(branches) < 2 or not any(b.is_weighted for b in branches) or (rest and not same):
        return None, refusals
    if len({b.value for b in branches}) < len(branches):
        return None, refusals
    shift = np.sum([*constants.values(), np.zeros(channels)], axis=0)
    behind = () if rest else _behind(root)
    return Selection(root, tuple(inner), tuple(branches), shift, tuple(rest), behind), refusals


def _path(value: ir.Value) -> Iterator[Branch]:
    """Yield ``value`` as a branch over itself, over what its producer reads, and so on; unclean ones carry their refusal."""
    links: tuple[Link, ...] = ()
    source, refusal, weighted = value, None, False
    yield Branch(value, source, links)
    while (node := source.producer()) is not None:
        refusal, weighted = refusal or shared(source), weighted or node.op_type == "Conv"
        found = read_convolution(node) or read_pointwise(node) or read_pooling(node)
        if isinstance(found, Refusal) and node.inputs[0] is not None:
            yield Branch(value, node.inputs[0], links, weighted, refusal or found)
        if not isinstance(found, Link):
            return
        links, source = (found, *links), found.source
        yield Branch(value, source, links, weighted, refusal)


def _common_source(paths: list[list[Branch]]) -> ir.Value | None:
    """Return the value over which most operands are branches, the nearest one of several, if that makes a convolution and more."""
    clean = [[b for b in path if b.refusal is None] for path in paths]
    counts = Counter(b.source for path in clean for b in path)
    weighted = {b.source for path in clean for b in path if b.is_weighted}
    order = [b.source for path in clean for b in path if b.source in weighted]
    return max(order, key=lambda v: (counts[v], -order.index(v)), default=None)


def _blocked(paths: list[list[Branch]], source: ir.Value | None) -> list[Refusal]:
    """Return why operands are no branches over the value that the others read, where that is all that keeps them from it."""
    counts = Counter(b.source for path in paths for b in path)
    clean = {b.source for path in paths for b in path if b.refusal is None}
    weighted = {b.source for path in paths for b in path if b.is_weighted}
    wanted = {source} if source is not None and counts[source] > 1 else {v for v, n in counts.items() if n > 1 and v in clean & weighted}
    found = []
    for path in paths:
        if any(b.source in wanted and b.refusal is None for b in path):
            continue
        found += [b.refusal for b in path if b.source in wanted and b.refusal is not None][:1]
    return found


def _geometry(branch: Branch, channels: int) -> Geometry | Refusal:
    if not branch.links:
        return convolution.identity(channels, rank=(rank(branch.source) or 2) - 2).geometry
    return composed_geometry([link.geometry for link in branch.links])


def _behind(root: ir.Node) -> tuple[Link, ...]:
    """Return the normalization of the sum, if that is all that is done with it."""
    reader = sole_consumer(root.outputs[0])
    link = read_pointwise(reader) if reader is not None and reader.graph is root.graph else None
    return (link,) if isinstance(link, Link) and link.source is root.outputs[0] else ()
