"""Writes of a constant per channel into the border of a padded map, however the exporter permuted its axes to write them.

``y[:, :, :p] = v`` is exported as a ScatterND over a transposed map, so a border of four sides is a chain of ScatterND and Transpose
nodes behind a Pad. Row numbers count from the front where they are not negative and from the back where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.dimensions import dimensions
from deploycc.core.elements import Contents, contents, slices
from deploycc.core.graph import attribute, constant, ints_attribute, rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

_CARRIERS = frozenset({"ScatterND", "Transpose"})
_FAR = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Stripe:
    """Rows of one axis of the map that are overwritten by ``value``, one number per channel."""

    axis: int
    rows: frozenset[int]
    value: np.ndarray


def carriers(value: ir.Value) -> list[ir.Node] | None:
    """Return the ScatterND and Transpose nodes from a Pad to ``value``, the Pad first, or None if that is not how it is computed."""
    path: list[ir.Node] = []
    node = value.producer()
    while node is not None and node.op_type in _CARRIERS and node.inputs[0] is not None:
        path.append(node)
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Pad" or all(each.op_type == "Transpose" for each in path):
        return None
    return [node, *reversed(path)]


def permutations(path: Sequence[ir.Node]) -> list[tuple[int, ...]] | None:
    """Return, behind each node of ``path``, which axis of the padded map each axis is."""
    count = rank(path[0].inputs[0])
    if count is None:
        return None
    found, axes = [], tuple(range(count))
    for node in path:
        if node.op_type == "Transpose":
            order = ints_attribute(node, "perm") or tuple(reversed(range(count)))
            axes = tuple(axes[i] for i in order)
        found.append(axes)
    return found


def stripe(node: ir.Node, axes: Sequence[int], channels: int, known: Contents) -> Stripe | None:
    """Return what a ScatterND writes if it is whole rows of a constant per channel, else None."""
    if attribute(node, "reduction", "none") != "none" or len(node.inputs) != 3:
        return None
    rows = _rows(node, known)
    value = _per_channel(node.inputs[2], tuple(axes).index(1), len(axes), channels)
    return None if rows is None or value is None else Stripe(axes[0], frozenset(rows), value)


def _rows(node: ir.Node, known: Contents) -> list[int] | None:
    """Return the rows of the first axis that the indices of a ScatterND choose."""
    given, indices = constant(node.inputs[1]), node.inputs[1]
    if given is not None:
        return [int(r) for r in given.reshape(-1)] if given.ndim == 2 and given.shape[1] == 1 else None
    column = indices.producer() if indices is not None else None
    if column is None or column.op_type != "Unsqueeze" or rank(indices) != 2 or rank(column.inputs[0]) != 1:
        return None
    axes = contents(column.inputs[1], known) if len(column.inputs) > 1 else None
    part = column.inputs[0].producer() if column.inputs[0] is not None else None
    if axes is None or [int(a) for a in axes] not in ([1], [-1]) or part is None or part.op_type != "Slice":
        return None
    bounds = slices(part, 1, known)
    counted = part.inputs[0].producer() if part.inputs[0] is not None else None
    if bounds is None or set(bounds) != {0} or counted is None or not _counts_rows(counted, node.inputs[0], known):
        return None
    return _taken(bounds[0])


def _counts_rows(node: ir.Node, of: ir.Value | None, known: Contents) -> bool:
    """Return whether ``node`` counts 0, 1, ... over the first axis of a value."""
    sizes = dimensions(of)
    if node.op_type != "Range" or not sizes:
        return False
    start, limit, step = (contents(v, known) for v in node.inputs)
    if start is None or limit is None or step is None:
        return False
    return bool(start.item() == 0 and step.item() == 1 and limit.item() == sizes[0])


def _taken(bound: slice) -> list[int] | None:
    """Return the rows of a slice whose ends are on one side of an axis of unknown length."""
    if bound.step != 1:
        return None
    if bound.start >= 0:
        return list(range(bound.start, bound.stop)) if 0 <= bound.stop < _FAR else None
    stop = 0 if bound.stop >= _FAR else bound.stop
    return list(range(bound.start, stop)) if stop <= 0 else None


def _per_channel(value: ir.Value | None, position: int, count: int, channels: int) -> np.ndarray | None:
    """Return a value that is a broadcast constant as one number per channel, the channels being its axis ``position``."""
    while value is not None and (node := value.producer()) is not None and node.op_type in {"Expand", "Identity", "Transpose"}:
        if node.op_type == "Transpose":
            order = ints_attribute(node, "perm") or tuple(reversed(range(count)))
            position = order[position]
        if rank(node.outputs[0]) != count:
            return None
        value = node.inputs[0]
    array = constant(value)
    if array is None or array.ndim > count or not array.size:
        return None
    aligned = array.reshape((1,) * (count - array.ndim) + array.shape)
    rows = np.moveaxis(aligned, position, 0).reshape(aligned.shape[position], -1)
    if rows.shape[0] not in {1, channels} or not np.array_equal(rows, np.repeat(rows[:, :1], rows.shape[1], axis=1)):
        return None
    return np.broadcast_to(rows[:, 0].astype(np.float64), (channels,)).copy()


def folded_rows(stripe: Stripe, begin: int, size: object) -> frozenset[int]:
    """Return the rows of a stripe with those behind the front border counted from the back, where the size of the axis is known."""
    if not isinstance(size, int):
        return stripe.rows
    return frozenset(r - size if r >= begin else r if r >= 0 or r + size >= begin else r + size for r in stripe.rows)


def padding(node: ir.Node, count: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return what a Pad adds before and behind each axis if that is constant and filled by a constant, else None."""
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    chosen = node.inputs[3] if len(node.inputs) > 3 else None
    which = range(count) if chosen is None else constant(chosen)
    if given is None or which is None or attribute(node, "mode", "constant") != "constant":
        return None
    places, begins, ends = [int(a) % count for a in which], [0] * count, [0] * count
    for index, axis in enumerate(places):
        begins[axis], ends[axis] = int(given[index]), int(given[len(places) + index])
    return tuple(begins), tuple(ends)
