"""Raise the GridSample decomposition of DCNv3 to the operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.dcnv3 import DCNv3, make_node, provide_functions
from deploycc.core.dimensions import dimensions, is_anonymous
from deploycc.core.graph import (
    add_initializer,
    attribute,
    axes_of,
    inherit_metadata,
    int_attribute,
    is_constant,
    opset,
    remove_dead_nodes,
    replace_value,
    sole_consumer,
)
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite
from deploycc.core.sampling import Positions, fitted
from deploycc.core.tracing import Trace, counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycc.core.dimensions import Dim

_LAYOUT = frozenset({"Cast", "Flatten", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_AFFINE = _LAYOUT | {"Add", "Concat", "Div", "Gather", "Mul", "Slice", "Split", "Sub"}
_BATCH = 2


@dataclass(frozen=True, slots=True)
class RaiseDcnv3:
    """Raise the GridSample decomposition of DCNv3 to the operator.

    Why: a plain export writes DCNv3 as some forty nodes around a GridSample of nine times the size of the image. As one node it is computed
    by the plugin where there is one, and its offsets and positions keep the precision they need.

    Before / After:
        ``ReduceSum(Mul(GridSample(layout(x), positions(offset)), layout(mask)))`` / ``DCNv3(x, offset, mask)``

    The match is proved, not guessed: the layouts of x, mask and result by tracing 1, 2, 3, ... through them, the positions by tracing
    zeros and a generic argument through the arithmetic, which is affine, and comparing with the operator's formula.

    Declines when:
        MODE: GridSample is not bilinear with zeros outside and align_corners=0.
        FORM: the samples are not summed with weights over the kernel points, or a layout is not the operator's.
        SHAPE: a size other than the batch is unknown.
        POSITIONS: the sample positions are not those of DCNv3 for any kernel, stride, padding, dilation and scale.

    Options: none.

    See: ``deploycc.core.dcnv3``; ONNX GridSample-16, GridSample-20.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity")

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        results = [_raise(model, node) for node in list(model.graph) if node.op_type == "GridSample" and not node.domain]
        rewrites = tuple(r for r in results if isinstance(r, Rewrite))
        if rewrites:
            provide_functions(model)
        return PassResult(rewrites, tuple(r for r in results if isinstance(r, Decline)))


def _raise(model: ir.Model, node: ir.Node) -> Rewrite | Decline:
    name = node.name or ""
    if not _is_bilinear(node):
        return Decline(name, "MODE", "it is not bilinear with zeros outside and align_corners=0")
    tail = _weighted_sum(node)
    if tail is None:
        return Decline(name, "FORM", "the samples are not summed with weights over their last axis")
    product, weights, total = tail
    found = _Match(model, node, weights, total.outputs[0]).find()
    if isinstance(found, Decline):
        return found
    last = found.result.producer() or total
    writer = _Writer(model.graph, last, found)
    writer.write(node, product, total)
    remove_dead_nodes(model.graph)
    what = found.what
    return Rewrite(name, f"{what.kernel_h}x{what.kernel_w} points in {what.group} groups", "positions and sums in FP32, to a few roundings")


def _is_bilinear(node: ir.Node) -> bool:
    mode, padding = attribute(node, "mode", "linear"), attribute(node, "padding_mode", "zeros")
    return mode in ("linear", "bilinear") and padding == "zeros" and not int_attribute(node, "align_corners", 0)


def _weighted_sum(node: ir.Node) -> tuple[ir.Node, ir.Value, ir.Node] | None:
    """Return the product of the samples with weights, the weights, and the sum of the product over its last axis."""
    product = sole_consumer(node.outputs[0])
    total = sole_consumer(product.outputs[0]) if product is not None and product.op_type == "Mul" else None
    if product is None or total is None or total.op_type != "ReduceSum" or axes_of(total) not in ((3,), (-1,)):
        return None
    weights = product.inputs[1] if product.inputs[0] is node.outputs[0] else product.inputs[0]
    return None if weights is None else (product, weights, total)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the new node is made of; ``rows`` and ``columns`` are those of the result."""

    what: DCNv3
    x: ir.Value
    offset: ir.Value
    mask: ir.Value
    result: ir.Value
    rows: int
    columns: int


class _Match:
    """The search for x, offset, mask and result around one GridSample, on images of ``_BATCH``."""

    def __init__(self, model: ir.Model, node: ir.Node, weights: ir.Value, total: ir.Value) -> None:
        self.version, self.name, self.weights, self.total = opset(model), node.name or "", weights, total
        self.image, self.grid = node.inputs
        names = [v.shape[0].value for v in model.graph.inputs if v.shape is not None and len(v.shape) and not isinstance(v.shape[0], int)]
        self.sizes = dict.fromkeys(map(str, names), _BATCH)

    def find(self) -> _Found | Decline:
        """Return the attributes and the operands, or why there is no match."""
        points = self.grid.shape[2] if self.grid is not None and self.grid.shape is not None and len(self.grid.shape) == 4 else None
        if not isinstance(points, int):
            return self.decline("SHAPE", "the number of kernel points is unknown")
        found = next(self.images(), None)
        if found is None:
            return self.decline("FORM", "the image is not laid out by groups of channels of an [N, H, W, C] value of known size")
        x, (batch, height, width, channels), group, pads = found
        result = next(self.results(batch, channels, group), None)
        if result is None:
            return self.decline("FORM", "the sums are not laid out as [N, Ho, Wo, C]")
        _, rows, columns, _ = self.shape(result)
        mask = next(self.masks((batch, rows, columns, group, points)), None)
        if mask is None:
            return self.decline("FORM", "the weights are not laid out as [N, Ho, Wo, G, K]")
        for offset, positions in self.offsets((batch, rows, columns, group, points, 2), (height + 2 * pads[0], width + 2 * pads[1])):
            what = fitted(positions.moved(pads), (height, width))
            if what is not None:
                return _Found(what, x, offset, mask, result, rows, columns)
        return self.decline("POSITIONS", "the positions are not those of a DCNv3 of any attributes")

    def decline(self, code: str, reason: str) -> Decline:
        return Decline(self.name, code, reason)

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Return the shape of ``value`` for ``_BATCH`` images, () where it is unknown.

        A first dimension without a name is taken for the batch, which the traced layout confirms or refutes.
        """
        sizes = dimensions(value)
        if value is None or not sizes:
            return ()
        found = [d if isinstance(d, int) else self._number(d) for d in sizes]
        found[0] = _BATCH if is_anonymous(sizes[0]) else found[0]
        return () if None in found else tuple(d for d in found if d is not None)

    def _number(self, size: Dim) -> int | None:
        total = 0
        for names, factor in size.terms:
            if any(name not in self.sizes for name in names):
                return None
            total += factor * math.prod(self.sizes[name] for name in names)
        return total

    def trace(self, given: ir.Value, array: np.ndarray, wanted: ir.Value | None) -> np.ndarray | None:
        """Return what ``wanted`` becomes when ``given`` is ``array``."""
        return Trace({given: array}, self.version, self.sizes).of(wanted)

    def images(self) -> Iterator[tuple[ir.Value, tuple[int, ...], int, tuple[int, int]]]:
        """Yield x, its shape, the number of groups and the padding for each value that is laid out as the image."""
        for x in _sources(self.image, _LAYOUT):
            shape = self.shape(x)
            if len(shape) != 4 or math.prod(shape) > 2**24:
                continue
            numbers = counted(shape)
            image = self.trace(x, numbers, self.image)
            if image is None or image.ndim != 4 or shape[3] % image.shape[1] or image.shape[0] != shape[0] * (shape[3] // image.shape[1]):
                continue
            group = shape[3] // image.shape[1]
            pads = (image.shape[2] - shape[1]) // 2, (image.shape[3] - shape[2]) // 2
            split = numbers.reshape(*shape[:3], group, -1).transpose(0, 3, 4, 1, 2).reshape(*image.shape[:2], *shape[1:3])
            if min(pads) >= 0 and np.array_equal(np.pad(split, ((0, 0), (0, 0), *((p, p) for p in pads))), image):
                yield x, shape, group, pads

    def results(self, batch: int, channels: int, group: int) -> Iterator[ir.Value]:
        """Yield each value behind the sums that is laid out [N, Ho, Wo, C]."""
        value = self.total
        while (node := sole_consumer(value)) is not None and node.op_type in _LAYOUT and node.inputs[0] is value:
            value = node.outputs[0]
            shape = self.shape(value)
            if len(shape) != 4 or (shape[0], shape[3]) != (batch, channels):
                continue
            numbers = counted((batch * group, channels // group, shape[1] * shape[2]))
            given = numbers if len(self.shape(self.total)) == 3 else numbers[..., None]
            wanted = numbers.reshape(batch, group, channels // group, *shape[1:3]).transpose(0, 3, 4, 1, 2).reshape(shape)
            found = self.trace(self.total, given, value)
            if found is not None and np.array_equal(found, wanted):
                yield value

    def masks(self, sizes: tuple[int, ...]) -> Iterator[ir.Value]:
        """Yield each value whose numbers, in the order [N, Ho, Wo, G, K], become the weights."""
        numbers = counted(sizes)
        wanted = numbers.transpose(0, 3, 1, 2, 4).reshape(sizes[0] * sizes[3], 1, sizes[1] * sizes[2], sizes[4])
        for value in _sources(self.weights, _LAYOUT):
            shape = self.shape(value)
            if math.prod(shape) == numbers.size and shape[:1] == sizes[:1]:
                found = self.trace(value, numbers.reshape(shape), self.weights)
                if found is not None and found.shape == wanted.shape and np.array_equal(found, wanted):
                    yield value

    def offsets(self, sizes: tuple[int, ...], image: tuple[int, int]) -> Iterator[tuple[ir.Value, Positions]]:
        """Yield each value of which the grid is an affine function, and the positions that it gives on the image."""
        for value in _sources(self.grid, _AFFINE):
            shape = self.shape(value)
            if math.prod(shape) != math.prod(sizes) or shape[:1] != sizes[:1]:
                continue
            arguments = [np.zeros(sizes, np.float32), np.random.default_rng(0).uniform(0.5, 1.5, sizes).astype(np.float32)]
            grids = [self.trace(value, argument.reshape(shape), self.grid) for argument in arguments]
            if all(g is not None and g.shape == (sizes[0] * sizes[3], sizes[1] * sizes[2], sizes[4], 2) for g in grids):
                still, moved = (_pixels(g, sizes, image) for g in grids if g is not None)
                yield value, Positions(still, moved, arguments[1].astype(np.float64))


def _sources(value: ir.Value | None, through: frozenset[str]) -> list[ir.Value]:
    """Return the computed values from which ``value`` comes by operators of ``through``, the farthest first."""
    found: dict[ir.Value, None] = {}
    pending = [value]
    while pending:
        current = pending.pop(0)
        if current is None or current in found or is_constant(current):
            continue
        found[current] = None
        node = current.producer()
        if node is not None and node.op_type in through and not node.domain:
            pending.extend(node.inputs[:1] if through is _LAYOUT else node.inputs)
    return list(found)[::-1]


def _pixels(grid: np.ndarray, sizes: tuple[int, ...], image: tuple[int, int]) -> np.ndarray:
    """Return normalized positions [N G, Ho Wo, K, 2] as pixels [N, Ho, Wo, G, K, 2]."""
    batch, rows, columns, group, points, _ = sizes
    pixels = ((grid.astype(np.float64) + 1) * np.array([image[1], image[0]]) - 1) / 2
    return np.asarray(pixels.reshape(batch, group, rows, columns, points, 2).transpose(0, 2, 3, 1, 4, 5))


@dataclass(slots=True)
class _Writer:
    """Writes the node behind ``last``, which makes the value that the node's result replaces."""

    graph: ir.Graph
    last: ir.Node
    found: _Found

    def write(self, *replaced: ir.Node) -> None:
        """Write the node, with what takes its operands to four dimensions."""
        operands = [self.found.x, *(self.four(value) for value in (self.found.offset, self.found.mask))]
        made = make_node(operands, self.found.what, name=f"{replaced[0].name}_dcnv3")
        output = made.outputs[0]
        output.name, output.type, output.shape = f"{made.name}_out", self.found.x.type, self.found.result.shape
        inherit_metadata(made, replaced)
        self.insert(made)
        replace_value(self.found.result, output)

    def four(self, value: ir.Value) -> ir.Value:
        """Return ``value`` as [N, Ho, Wo, -1]; its numbers are in that order."""
        if value.shape is None or len(value.shape) == 4:
            return value
        width = math.prod(d for d in value.shape[1:] if isinstance(d, int)) // (self.found.rows * self.found.columns)
        target = np.array([-1, self.found.rows, self.found.columns, width], np.int64)
        node = ir.node("Reshape", [value, add_initializer(self.graph, f"{value.name}_nhwc", target)], name=f"{value.name}_nhwc_Reshape")
        output = node.outputs[0]
        output.name, output.type = f"{node.name}_out", value.type
        output.shape = ir.Shape([value.shape[0], *target[1:].tolist()])
        self.insert(node)
        return output

    def insert(self, node: ir.Node) -> None:
        self.graph.insert_after(self.last, node)
        self.last = node
