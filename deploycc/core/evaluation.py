"""Evaluation of single nodes over constants by ONNX's reference implementation, bounded in size and never crashing.

Arithmetic on floating-point parameters is carried in float64 and rounded once, to the type of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import FLOAT_TYPES, int_attribute

Arrays = Sequence[np.ndarray | None]


def _operators(names: str) -> frozenset[str]:
    return frozenset(names.split())


ARITHMETIC = _operators(
    "Abs Add Ceil Clip Cos Div Erf Exp Floor Gelu Log MatMul Max Min Mod Mul Neg Pow Reciprocal ReduceMax ReduceMean "
    "ReduceMin ReduceProd ReduceSum Relu Round Sigmoid Sign Sin Softmax Sqrt Sub Sum Tanh Where"
)
LOGIC = _operators("And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor")
MOVEMENT = _operators(
    "ArgMax ArgMin Cast Concat ConstantOfShape CumSum Expand Flatten Gather GatherElements GatherND Identity Pad Range "
    "Reshape ScatterND Slice Split Squeeze Tile Transpose Trilu Unsqueeze"
)
DETERMINISTIC = ARITHMETIC | LOGIC | MOVEMENT


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node was not evaluated: a decline code and a reason."""

    code: str
    reason: str


def evaluate(node: ir.Node, inputs: Arrays, *, opset: int, growth_limit: int) -> list[np.ndarray] | Refusal:
    """Return the outputs of ``node``, in the types that the operator gives them.

    Args:
        node: a node whose ``op_type`` is in ``DETERMINISTIC``.
        inputs: one array per input, None where an optional one is absent.
        opset: the version of the default domain.
        growth_limit: the bytes by which the outputs may exceed the inputs.
    """
    given = sum(a.nbytes for a in inputs if a is not None)
    predicted = _predicted_bytes(node, inputs)
    if predicted is None:
        return Refusal("EVALUATION", f"the size of the result of {node.op_type} cannot be told beforehand")
    if predicted > given + growth_limit:
        return Refusal("SIZE", f"the result takes {predicted} bytes, its inputs {given}")
    try:
        return _run(node, inputs, opset)
    except Exception as error:
        return Refusal("EVALUATION", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")


def _run(node: ir.Node, inputs: Arrays, opset: int) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    floating = [a is not None and ir.DataType.from_numpy(a.dtype) in FLOAT_TYPES for a in inputs]
    wide = node.op_type in ARITHMETIC and any(floating)
    dtype = next((a.dtype for a, f in zip(inputs, floating, strict=True) if f and a is not None), None)
    names = [f"i{k}" if a is not None else "" for k, a in enumerate(inputs)]
    feeds = {n: a.astype(np.float64) if wide and f and a is not None else a for n, a, f in zip(names, inputs, floating, strict=True) if n}
    proto = ir.serde.serialize_node(node)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(f"o{k}" for k in range(len(node.outputs)))
    # Integer overflow and division by zero have no agreed result; in floating point they have, infinity or NaN.
    # A Cast of NaN or of too large a number to an integer has none either.
    with np.errstate(
        all="ignore" if any(floating) else "raise", invalid="raise" if node.op_type == "Cast" or not any(floating) else "ignore"
    ):
        results = ReferenceEvaluator(proto, opsets={"": opset}).run(None, feeds)
        arrays = [np.asarray(r) for r in results]
        rounded = [a.astype(dtype) if wide and a.dtype == np.float64 else a for a in arrays]
    for value, array in zip(node.outputs, rounded, strict=True):
        if value.dtype is not None and ir.DataType.from_numpy(array.dtype) != value.dtype:
            raise TypeError(f"'{value.name}' is declared {value.dtype} and evaluates to {array.dtype}")
    return rounded


def _predicted_bytes(node: ir.Node, inputs: Arrays) -> int | None:
    arrays = [a for a in inputs if a is not None]
    rule = _COUNTS.get(node.op_type)
    try:
        if node.op_type in {"Range", "ConstantOfShape"}:
            return _generated(node, arrays)
        count = rule(node, arrays) if rule else math.prod(np.broadcast_shapes(*(a.shape for a in arrays)))
    except (ValueError, IndexError, OverflowError):
        return None
    target = ir.DataType(int_attribute(node, "to", 1)) if node.op_type == "Cast" else ir.DataType.FLOAT
    widest = {"Cast": math.ceil(target.itemsize), "ArgMax": 8, "ArgMin": 8, "Where": arrays[-1].dtype.itemsize}
    return count * widest.get(node.op_type, arrays[0].dtype.itemsize)


def _generated(node: ir.Node, arrays: Sequence[np.ndarray]) -> int | None:
    if node.op_type == "ConstantOfShape":
        sizes = [int(d) for d in arrays[0]]
        return math.prod(sizes) * 8 if all(d >= 0 for d in sizes) else None
    start, limit, step = (a.item() for a in arrays)
    return max(0, math.ceil((limit - start) / step)) * arrays[0].dtype.itemsize if step else None


def _largest(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    return max(a.size for a in arrays)


def _total(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    return sum(a.size for a in arrays)


def _expanded(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    return math.prod(np.broadcast_shapes(arrays[0].shape, tuple(int(d) for d in arrays[1])))


def _gathered(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    axis = int_attribute(node, "axis", 0)
    shape: tuple[int, ...] = arrays[0].shape
    return arrays[1].size * math.prod(d for i, d in enumerate(shape) if i != axis % len(shape))


def _gathered_nd(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    batch, depth = int_attribute(node, "batch_dims", 0), arrays[1].shape[-1]
    return math.prod(arrays[1].shape[:-1]) * math.prod(arrays[0].shape[batch + depth :])


def _multiplied(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    first, second = arrays[0].shape, arrays[1].shape
    batch = math.prod(np.broadcast_shapes(first[:-2], second[:-2]))
    return batch * (first[-2] if len(first) > 1 else 1) * (second[-1] if len(second) > 1 else 1)


def _padded(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    pads = [int(p) for p in arrays[1]]
    axes = [int(a) for a in arrays[3]] if len(arrays) > 3 else list(range(arrays[0].ndim))
    sizes = list(arrays[0].shape)
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        sizes[axis] += before + after
    return math.prod(max(0, d) for d in sizes)


def _tiled(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    return arrays[0].size * math.prod(int(r) for r in arrays[1])


_COUNTS: dict[str, Callable[[ir.Node, Sequence[np.ndarray]], int]] = {
    **dict.fromkeys(_operators("ArgMax ArgMin Cast Clip CumSum Flatten GatherElements Identity Reshape ScatterND Slice Split"), _largest),
    **dict.fromkeys(_operators("ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Softmax Squeeze Transpose Trilu Unsqueeze"), _largest),
    "Concat": _total,
    "Expand": _expanded,
    "Gather": _gathered,
    "GatherND": _gathered_nd,
    "MatMul": _multiplied,
    "Pad": _padded,
    "Tile": _tiled,
}
