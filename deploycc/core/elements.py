"""The elements of small integer tensors, as far as shape arithmetic tells them.

An element is an integer or a ``Dim``, so the tensors are NumPy arrays of objects and the movement operators are NumPy indexing.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import numpy as np
import onnx_ir as ir

from deploycc.core.dimensions import Dim, Size, dimensions, divide, product
from deploycc.core.graph import attribute, axes_of, int_attribute, is_constant

Contents = MutableMapping[ir.Value, np.ndarray]
LARGEST = 64  # elements of a tensor that counts as shape arithmetic
INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


def contents(value: ir.Value | None, known: Contents) -> np.ndarray | None:
    """Return the elements of a small integer tensor as far as they are known, each an integer or a ``Dim``."""
    if value is None:
        return None
    if value not in known and is_constant(value) and value.const_value is not None:
        tensor = value.const_value
        if tensor.dtype in INTEGERS and tensor.size <= LARGEST:
            known[value] = tensor.numpy().astype(object)
    return known.get(value)


def slices(node: ir.Node, rank: int, known: Contents) -> dict[int, slice] | None:
    """Return the slice along each axis that a Slice node names, or None if its bounds are computed."""
    given = [contents(v, known) for v in node.inputs[1:]]
    if len(given) < 2 or any(v is not None and g is None for v, g in zip(node.inputs[1:], given, strict=True)):
        return None
    count = given[0].size if given[0] is not None else 0
    axes = given[2] if len(given) > 2 and given[2] is not None else np.arange(count)
    steps = given[3] if len(given) > 3 and given[3] is not None else np.ones(count, dtype=np.int64)
    columns = [given[0], given[1], steps, axes]
    if any(c is None or any(isinstance(e, Dim) for e in c.flat) for c in columns):
        return None
    rows = zip(*(map(int, c.flat) for c in columns if c is not None), strict=True)
    return {axis % rank: slice(start, stop, step) for start, stop, step, axis in rows}


def shape_bounds(node: ir.Node) -> slice:
    """Return the part of the shape that a Shape node takes."""
    return slice(int_attribute(node, "start", 0), attribute(node, "end"))


def computed_elements(node: ir.Node, known: Contents) -> np.ndarray | None:
    """Return the elements of the first output of ``node`` if it is shape arithmetic over known elements, else None."""
    if node.op_type in {"Shape", "Size"}:
        sizes = dimensions(node.inputs[0])
        if sizes is None:
            return None
        return _objects(list(sizes[shape_bounds(node)])) if node.op_type == "Shape" else _objects(product(sizes))
    rule = _ELEMENTS.get(node.op_type)
    if rule is None or any(v is not None and v.dtype not in INTEGERS for v in (*node.inputs, *node.outputs)):
        return None
    arrays = [contents(v, known) for v in node.inputs if v is not None]
    if not arrays or any(a is None for a in arrays):
        return None
    try:
        result = rule(node, [a for a in arrays if a is not None])
    except (ValueError, IndexError, TypeError, OverflowError):  # a malformed graph; the checker says it better
        return None
    if result is None or any(e is None for e in result.flat):
        return None
    return result if result.size <= LARGEST else None


def _objects(elements: object) -> np.ndarray:
    return np.array(elements, dtype=object)


def _gather(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    data, indices = arrays
    axis = int_attribute(node, "axis", 0)
    if any(isinstance(i, Dim) or not -data.shape[axis] <= i < data.shape[axis] for i in indices.flat):
        return None
    return _objects(np.take(data, indices.astype(np.int64), axis=axis))


def _slice(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    data = arrays[0]
    known = dict(zip((v for v in node.inputs if v is not None), arrays, strict=True))
    bounds = slices(node, data.ndim, known)
    return None if bounds is None else data[tuple(bounds.get(axis, slice(None)) for axis in range(data.ndim))]


def _concat(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays, axis=int_attribute(node, "axis", 0))


def _unsqueeze(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    axes = axes_of(node)
    return None if axes is None else np.expand_dims(arrays[0], axes)


def _squeeze(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    axes = axes_of(node)
    if axes is None and len(arrays) > 1:
        return None
    return _objects(np.squeeze(arrays[0], axis=axes))


def _reshape(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    target = [arrays[0].shape[i] if d == 0 and not int_attribute(node, "allowzero", 0) else d for i, d in enumerate(arrays[1])]
    return None if any(isinstance(d, Dim) for d in target) else arrays[0].reshape(target)


def _cast(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    kinds = {node.inputs[0].dtype if node.inputs[0] else None, node.outputs[0].dtype}
    numbers = [e for e in arrays[0].flat if isinstance(e, int)]
    return arrays[0] if ir.DataType.BOOL not in kinds and all(-(2**31) <= e < 2**31 for e in numbers) else None


def _divide(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    # Only divisions without a remainder: rounding is exact then, whatever the signs.
    return _pairwise(divide, arrays)


def _equal(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    return _pairwise(_compare, arrays)


def _compare(first: Size, second: Size) -> bool | None:
    if first == second:
        return True
    if isinstance(first, int) and isinstance(second, int):
        return False
    # A dimension is never negative, so it differs from -1.
    for difference in (first - second, second - first):
        rest = difference - 1
        if rest.is_nonnegative if isinstance(rest, Dim) else rest >= 0:
            return False
    return None


def _where(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    if any(isinstance(c, Dim) for c in arrays[0].flat):
        return None
    return _objects(np.where(arrays[0].astype(bool), arrays[1], arrays[2]))


def _pairwise(operation: Callable[[Size, Size], object], arrays: list[np.ndarray]) -> np.ndarray | None:
    return _objects(np.frompyfunc(operation, 2, 1)(arrays[0], arrays[1]))


def _constant_of_shape(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray | None:
    fill = attribute(node, "value")
    sizes = list(arrays[0].flat)
    if any(isinstance(d, Dim) or not 0 <= d <= LARGEST for d in sizes) or not isinstance(fill, ir.TensorProtocol):
        return None
    return np.full(sizes, fill.numpy().reshape(-1)[0].item(), dtype=object)


_ELEMENTS: dict[str, Callable[[ir.Node, list[np.ndarray]], np.ndarray | None]] = {
    "Add": lambda _, a: _objects(a[0] + a[1]),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Equal": _equal,
    "Gather": _gather,
    "Identity": lambda _, a: a[0],
    "Mul": lambda _, a: _objects(a[0] * a[1]),
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": lambda _, a: _objects(a[0] - a[1]),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
