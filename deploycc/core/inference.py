"""Shapes and small integer tensors of a graph, worked out with dynamic dimensions kept as symbols.

ONNX shape inference gives a dynamic dimension up wherever a shape is computed. These rules go on from there, for the
operators of which shape arithmetic is made and those that carry its result; everything else keeps its declared shape.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from deploycc.core.dimensions import Size, dimensions, divide, is_anonymous, product, symbol, to_shape
from deploycc.core.elements import Contents, computed_elements, contents, shape_bounds, slices
from deploycc.core.graph import axes_of, constant, int_attribute, ints_attribute

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

Sizes = tuple[Size, ...]


def _operators(names: str) -> frozenset[str]:
    return frozenset(names.split())


_UNARY = _operators(
    "Abs BatchNormalization Cast CastLike Ceil Clip Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity "
    "InstanceNormalization GroupNormalization LayerNormalization LeakyRelu Log LogSoftmax Neg Not Reciprocal Relu Round "
    "Selu Sigmoid Sign Softmax Softplus Sqrt Tanh QuantizeLinear DequantizeLinear"
)
_BROADCASTING = _operators("Add And Div Equal Greater Less Max Min Mod Mul Or Pow Sub Where Xor")


def observe(node: ir.Node, known: Contents) -> None:
    """Work out the shape of the first output of ``node`` and, if it is shape arithmetic, its elements."""
    if not node.outputs or node.domain not in {"", "ai.onnx"}:
        return
    output = node.outputs[0]
    inferred = _inferred(node, known)
    if inferred is not None and not output.is_graph_output():
        declared = dimensions(output)
        merged = inferred if declared is None or len(declared) != len(inferred) else tuple(map(_better, declared, inferred))
        if merged != declared:
            output.shape = to_shape(merged)
    elements = computed_elements(node, known)
    if elements is not None:
        known[output] = elements


def output_sizes(node: ir.Node, known: Contents) -> Sizes | None:
    """Return the shape of the first output, what is derived taking precedence over what is declared without a name."""
    declared, inferred = dimensions(node.outputs[0]), _inferred(node, known)
    if declared is None or inferred is None or len(declared) != len(inferred):
        return declared if inferred is None else inferred
    return tuple(map(_better, declared, inferred))


def broadcast(shapes: list[Sizes]) -> Sizes | None:
    """Return the broadcast shape, or None where it depends on the symbols."""
    result: list[Size] = []
    for column in zip_longest(*(s[::-1] for s in shapes), fillvalue=1):
        distinct = {d for d in column if d != 1}
        numbers = {d for d in distinct if isinstance(d, int)}
        if len(numbers) > 1 or (not numbers and len(distinct) > 1):
            return None
        result.append((numbers or distinct or {1}).pop())
    return tuple(result[::-1])


def _better(declared: Size, inferred: Size) -> Size:
    if isinstance(declared, int) or is_anonymous(inferred):
        return declared
    return inferred if isinstance(inferred, int) or is_anonymous(declared) else declared


def _inferred(node: ir.Node, known: Contents) -> Sizes | None:
    shapes = [dimensions(v) for v in node.inputs if v is not None]
    if node.op_type in _UNARY and shapes:
        return shapes[0]
    if node.op_type in _BROADCASTING:
        complete = [s for s in shapes if s is not None]
        return broadcast(complete) if len(complete) == len(shapes) and shapes else None
    rule = _SHAPES.get(node.op_type)
    try:
        return rule(node, shapes[0], known) if rule and shapes and shapes[0] is not None else None
    except (ValueError, IndexError, ZeroDivisionError):  # a malformed graph; the checker says it better
        return None


def _reshape(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    target = contents(node.inputs[1], known)
    if target is None:
        return None
    sizes = list(target)
    if not int_attribute(node, "allowzero", 0):
        if any(isinstance(d, int) and d == 0 and i >= len(source) for i, d in enumerate(sizes)):
            return None
        sizes = [source[i] if isinstance(d, int) and d == 0 else d for i, d in enumerate(sizes)]
    if -1 in sizes:
        position = sizes.index(-1)
        rest = divide(product(source), product(d for i, d in enumerate(sizes) if i != position))
        sizes[position] = symbol(f"?{node.outputs[0].name}.{position}") if rest is None else rest
    return tuple(sizes) if sizes.count(-1) == 0 else None


def _transpose(node: ir.Node, source: Sizes, known: Contents) -> Sizes:
    return tuple(source[i] for i in ints_attribute(node, "perm") or reversed(range(len(source))))


def _concat(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    shapes = [dimensions(v) for v in node.inputs]
    axis = int_attribute(node, "axis", 0) % max(len(source), 1)
    total: Size = 0
    for shape in shapes:
        if shape is None or len(shape) != len(source):
            return None
        total = total + shape[axis]
    first = [next((s[i] for s in shapes if s and isinstance(s[i], int)), source[i]) for i in range(len(source))]
    return (*first[:axis], total, *first[axis + 1 :])


def _expand(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    target = contents(node.inputs[1], known)
    return None if target is None else broadcast([source, tuple(target)])


def _slice(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    bounds = slices(node, len(source), known)
    if bounds is None:
        return None
    result = list(source)
    for axis, bound in bounds.items():
        size = source[axis]
        if isinstance(size, int):
            result[axis] = len(range(size)[bound])
        elif bound.start != 0 or bound.step != 1 or bound.stop < 2**31 - 1:
            result[axis] = symbol(f"?{node.outputs[0].name}.{axis}")
    return tuple(result)


def _squeeze(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    axes = axes_of(node)
    if axes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        return tuple(d for d in source if d != 1) if all(isinstance(d, int) for d in source) else None
    return tuple(d for i, d in enumerate(source) if i not in {a % len(source) for a in axes})


def _unsqueeze(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    axes = axes_of(node)
    if axes is None:
        return None
    rank, rest = len(source) + len(axes), iter(source)
    added = {a % rank for a in axes}
    return tuple(1 if i in added else next(rest) for i in range(rank))


def _gather(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    indices = dimensions(node.inputs[1])
    axis = int_attribute(node, "axis", 0)
    return None if indices is None else (*source[: axis % len(source)], *indices, *source[axis % len(source) + 1 :])


def _matmul(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    other = dimensions(node.inputs[1])
    if other is None or len(source) < 2 or len(other) < 2:
        return None
    batch = broadcast([source[:-2], other[:-2]])
    return None if batch is None else (*batch, source[-2], other[-1])


def _reduce(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    axes = axes_of(node)
    if axes is None:
        return None
    reduced = {a % len(source) for a in axes}
    if int_attribute(node, "keepdims", 1):
        return tuple(1 if i in reduced else d for i, d in enumerate(source))
    return tuple(d for i, d in enumerate(source) if i not in reduced)


def _pad(node: ir.Node, source: Sizes, known: Contents) -> Sizes | None:
    pads = constant(node.inputs[1])
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None) or pads.size != 2 * len(source):
        return None
    return tuple(d + int(pads[i]) + int(pads[i + len(source)]) for i, d in enumerate(source))


def _shape(node: ir.Node, source: Sizes, known: Contents) -> Sizes:
    return (len(source[shape_bounds(node)]),)


_SHAPES: dict[str, Callable[[ir.Node, Sizes, Contents], Sizes | None]] = {
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "MatMul": _matmul,
    "Pad": _pad,
    "ReduceMax": _reduce,
    "ReduceMean": _reduce,
    "ReduceMin": _reduce,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
