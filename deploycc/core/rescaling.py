"""Per-channel affine values and the linear nodes that read them: where a scale and a shift per channel can move from one to the other.

With x = gamma * n + beta and y = x W + b, any r > 0 and d per channel give the same y from x' = (x - d) r:
gamma' = gamma r, beta' = (beta - d) r, W' = W / r along the channels, b' = b + d W. Every reader of x must follow, so each is found,
through operators that only move elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.convolution import Refusal
from deploycc.core.dimensions import dimensions, product
from deploycc.core.graph import attribute, axes_of, constant, int_attribute, ints_attribute, is_constant, rank, sole_consumer

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Rescale:
    """What to do with the channels of one value: ``x' = (x - shift) * scale``, both of one number per channel.

    ``gain_db`` is the measured gain in signal to noise of the readers' outputs, and ``k`` the threshold it was found with.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    k: float = 0.0
    gain_db: float = 0.0


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear node that reads the channels along ``axis`` of its weight; ``padded`` if zeros are put beside the channels' values."""

    node: ir.Node
    axis: int
    padded: bool = False

    def matrix(self) -> np.ndarray:
        """Return the weight as float64 ``[channels, outputs * taps]``."""
        weight = constant(self.node.inputs[1])
        if weight is None:
            raise TypeError(f"the weight of '{self.node.name}' is computed")
        return np.moveaxis(weight.astype(np.float64), self.axis, 0).reshape(weight.shape[self.axis], -1)


@dataclass(frozen=True, slots=True)
class Site:
    """A per-channel affine operation whose last node is ``source``, the channel axis of its value, and every linear reader.

    ``carriers`` are the values that carry the channels to the readers, its own first, each with the axis on which it has them.
    """

    source: ir.Node
    axis: int
    channels: int
    readers: tuple[Reader, ...]
    carriers: tuple[tuple[ir.Value, int], ...]

    @property
    def value(self) -> ir.Value:
        """Return what the readers read."""
        return self.source.outputs[0]

    @property
    def is_centrable(self) -> bool:
        """Return whether a shift can be made up for: no reader sees zeros beside shifted values, and there is a place for it."""
        return not any(reader.padded for reader in self.readers) and self.source.op_type != "Mul"


def find_site(node: ir.Node) -> Site | Refusal | None:
    """Return the site at ``node``, why its channels cannot be rescaled, or None if it is no per-channel affine operation.

    A site is a LayerNormalization over the last axis, a BatchNormalization, or a product with a vector, with the sum behind it.
    """
    found = _affine(node)
    if found is None or found[0].outputs[0].name is None:
        return None
    source, axis, channels = found
    walk = _Walk()
    readers = walk.readers(source.outputs[0], axis)
    if isinstance(readers, Refusal):
        # An affine of which nothing linear is a reader was never a candidate.
        return readers if node.op_type in {"LayerNormalization", "BatchNormalization"} else None
    return Site(source, axis, channels, readers, tuple((value, at) for value, (at, _) in walk.reached.items()))


def vector(value: ir.Value | None, like: ir.Value) -> tuple[int, int] | None:
    """Return the axis of ``like`` along which a constant varies and its size there, if it varies along exactly one."""
    if not is_constant(value) or value is None or value.shape is None:
        return None
    size = rank(like)
    shape = [int(d) for d in value.shape]  # type: ignore[arg-type]
    long = [i for i, d in enumerate(shape) if d > 1]
    if size is None or len(shape) > size or len(long) != 1:
        return None
    return size - len(shape) + long[0], shape[long[0]]


def _affine(node: ir.Node) -> tuple[ir.Node, int, int] | None:
    """Return the node whose output is the affine value, the channel axis and the number of channels."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return None
    size = rank(node.inputs[0])
    if node.op_type == "LayerNormalization":
        scale = constant(node.inputs[1])
        last = int_attribute(node, "axis", -1) in ({-1} if size is None else {-1, size - 1})
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if scale is None or size is None or not last or scale.ndim != 1 or (bias is not None and not is_constant(bias)):
            return None
        return node, size - 1, scale.size
    if node.op_type == "BatchNormalization":
        scale = constant(node.inputs[1])
        is_fixed = scale is not None and is_constant(node.inputs[2]) and not int_attribute(node, "training_mode", 0)
        return (node, 1, scale.size) if is_fixed and scale is not None else None
    if node.op_type != "Mul":
        return None
    number, other = (1, 0) if is_constant(node.inputs[1]) else (0, 1)
    value = node.inputs[other]
    place = vector(node.inputs[number], node.outputs[0]) if value is not None else None
    if place is None:
        return None
    following = sole_consumer(node.outputs[0])
    if following is not None and following.op_type == "Add":
        shift = next((v for v in following.inputs if v is not node.outputs[0]), None)
        if vector(shift, following.outputs[0]) == place:
            return following, *place
    return node, *place


@dataclass(slots=True)
class _Walk:
    """Follows a value through operators that move elements, and remembers where its channels are."""

    reached: dict[ir.Value, tuple[int, bool]] = field(default_factory=dict)
    found: list[Reader] = field(default_factory=list)
    joined: list[ir.Node] = field(default_factory=list)

    def readers(self, start: ir.Value, axis: int) -> tuple[Reader, ...] | Refusal:
        """Return every linear node at the ends, or why there is another kind of end."""
        todo = [(start, axis, False)]
        while todo:
            value, axis, padded = todo.pop()
            if value in self.reached:
                continue
            self.reached[value] = (axis, padded)
            if value.is_graph_output():
                return Refusal("GRAPH_OUTPUT", f"'{value.name}' is an output of the graph")
            for use in value.uses():
                step = self._step(use.node, use.idx, axis, padded)
                if isinstance(step, Refusal):
                    return step
                todo += step
        for node in self.joined:
            places = {self.reached.get(v, (None, False))[0] for v in node.inputs if v is not None}
            if len(places) != 1 or None in places:
                return Refusal("JOINED", f"'{node.name}' joins the channels with others")
        if not self.found:
            return Refusal("NO_READER", "no linear node reads the channels")
        return tuple(dict.fromkeys(self.found))

    def _step(self, node: ir.Node, i: int, axis: int, padded: bool) -> list[tuple[ir.Value, int, bool]] | Refusal:
        reader = _reader(node, i, axis, padded)
        if isinstance(reader, Refusal):
            return reader
        if reader is not None:
            self.found.append(reader)
            return []
        if node.op_type == "Shape":
            return []
        rule = _MOVES.get(node.op_type)
        is_moved = rule is not None and (i == 0 or node.op_type == "Concat")
        after = rule(node, axis) if rule is not None and is_moved else None
        if after is None:
            code = "POST_NORM" if node.op_type == "Add" else "READER"
            return Refusal(code, f"'{node.name}' ({node.op_type}) reads the channels and is not linear in constants")
        if node.op_type == "Concat":
            self.joined.append(node)
        return [(node.outputs[0], after, padded or node.op_type == "Pad")]


def _reader(node: ir.Node, i: int, axis: int, padded: bool) -> Reader | Refusal | None:
    """Return ``node`` as a reader of the channels, why it cannot be one, or None if it is not linear."""
    if node.op_type not in {"MatMul", "Gemm", "Conv"}:
        return None
    weight, size = node.inputs[1], rank(node.inputs[0])
    if i != 0 or not is_constant(weight) or rank(weight) is None:
        return Refusal("NONCONST_WEIGHT", f"'{node.name}' multiplies the channels by something computed")
    if node.op_type == "Conv":
        pads, is_grouped = ints_attribute(node, "pads") or (), int_attribute(node, "group", 1) != 1
        if axis != 1 or is_grouped:
            return Refusal("GROUP_MISMATCH", f"'{node.name}' does not sum over all channels")
        automatic = attribute(node, "auto_pad", "NOTSET") not in {"NOTSET", "VALID"}
        return Reader(node, 1, padded or any(pads) or bool(automatic))
    transposed = node.op_type == "Gemm" and int_attribute(node, "transA", 0)
    if size is None or axis != size - 1 or transposed or rank(weight) != 2:
        return Refusal("AXIS", f"'{node.name}' does not sum over the channels")
    return Reader(node, int(node.op_type == "Gemm" and bool(int_attribute(node, "transB", 0))), padded)


def _same(node: ir.Node, axis: int) -> int | None:
    return axis


def _turned(node: ir.Node, axis: int) -> int | None:
    order = ints_attribute(node, "perm")
    return order.index(axis) if order is not None else None


def _reshaped(node: ir.Node, axis: int) -> int | None:
    """Return the axis of the same size with as many elements behind it."""
    before, after = dimensions(node.inputs[0]), dimensions(node.outputs[0])
    if before is None or after is None:
        return None
    behind = product(before[axis + 1 :])
    return next((i for i, d in enumerate(after) if d == before[axis] and product(after[i + 1 :]) == behind), None)


def _other_axes(node: ir.Node, axis: int) -> int | None:
    """Accept what leaves the channel axis whole: a Slice or ReduceMean of other axes."""
    size = rank(node.inputs[0])
    axes = axes_of(node) if node.op_type != "Slice" else _slice_axes(node)
    if size is None or axes is None or axis in {a % size for a in axes}:
        return None
    if node.op_type == "ReduceMean" and not int_attribute(node, "keepdims", 1):
        return axis - sum(a % size < axis for a in axes)
    return axis


def _slice_axes(node: ir.Node) -> tuple[int, ...] | None:
    given = constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    return None if given is None else tuple(int(a) for a in given.reshape(-1))


def _gathered(node: ir.Node, axis: int) -> int | None:
    size, picked = rank(node.inputs[0]), rank(node.inputs[1])
    if size is None or picked is None or (along := int_attribute(node, "axis", 0) % size) == axis:
        return None
    return axis if along > axis else axis - 1 + picked


def _padded(node: ir.Node, axis: int) -> int | None:
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    size, value = rank(node.inputs[0]), constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if pads is None or size is None or attribute(node, "mode", "constant") != "constant" or len(node.inputs) > 3:
        return None
    is_zero = value is None or not np.any(value)
    return axis if pads.size == 2 * size and is_zero and not pads[axis] and not pads[axis + size] else None


def _concatenated(node: ir.Node, axis: int) -> int | None:
    size = rank(node.outputs[0])
    return axis if size is not None and int_attribute(node, "axis", 0) % size != axis else None


_MOVES: dict[str, Callable[[ir.Node, int], int | None]] = {
    "Concat": _concatenated,
    "Gather": _gathered,
    "GlobalAveragePool": lambda node, axis: axis if axis == 1 else None,
    "Identity": _same,
    "Pad": _padded,
    "ReduceMean": _other_axes,
    "Slice": _other_axes,
    "Transpose": _turned,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshaped),
}
