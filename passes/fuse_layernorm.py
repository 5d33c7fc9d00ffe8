"""Fuse decomposed layer normalization into ``LayerNormalization``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import (
    FLOAT_TYPES,
    add_initializer,
    axes_of,
    constant,
    escapes,
    fresh_name,
    int_attribute,
    opset,
    rank,
    scalar,
    sole_consumer,
    substitute,
    taken_names,
)
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite


@dataclass(frozen=True, slots=True)
class FuseLayernorm:
    """Fuse decomposed layer normalization into ``LayerNormalization``.

    Why: one kernel for nine, and the place where quantisation is reparameterised.

    Before / After:
        ``d = x - ReduceMean(x)``, ``d / Sqrt(ReduceMean(d * d) + e) * g + b`` / ``LayerNormalization(x, g, b, epsilon=e)``
        The square may be ``Pow``, the root ``Sqrt`` or ``Pow``, the division ``Div``, ``Reciprocal`` or a negative power; the
        mean may be written twice, and the statistics may be in a wider type between two ``Cast``.

    Declines when:
        OPSET: the model is below opset 17, which has no LayerNormalization.
        AXIS: the statistics are not over the last axes.
        MULTI_CONSUMER: a value inside the pattern is read elsewhere or is a graph output.
        DTYPE: the values are FP64, and LayerNormalization computes its statistics in FP32.
        NOT_AFFINE: no scale over the normalized axes follows, and their size, which a scale of ones needs, is dynamic.
        EPSILON: what is added to the variance is not a positive constant.

    Options: none.

    See: ONNX LayerNormalization-17; Ba et al., arXiv 1607.06450.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity")

    def __call__(self, model: ir.Model) -> PassResult:
        """Fuse every layer normalization of the graph."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        taken = taken_names(model.graph)
        for node in [n for n in model.graph if n.op_type in {"Div", "Mul"}]:
            found = _recognise(node) if node.graph is not None else None
            if found is None:
                continue
            result = _fuse(found, opset(model), taken)
            if isinstance(result, Decline):
                declines.append(result)
            else:
                rewrites.append(result)
        return PassResult(tuple(rewrites), tuple(declines))


@dataclass(frozen=True, slots=True)
class _Norm:
    """A recognised normalization: ``last`` gives (x - mean) / sqrt(variance + epsilon)."""

    source: ir.Value
    axes: tuple[int, ...] | None
    epsilon: float | None
    region: list[ir.Node]
    last: ir.Node


def _recognise(last: ir.Node) -> _Norm | None:
    """Return the normalization whose last step before scale and shift is ``last``."""
    for centred, factor in ((last.inputs[0], last.inputs[1]), (last.inputs[1], last.inputs[0])):
        deviation = _deviation(centred)
        root = _root(factor, inverse=last.op_type == "Mul")
        if deviation is None or root is None:
            continue
        source, axes, centring = deviation
        variance, rooting = root
        moment = _moment(variance, source, axes)
        if moment is not None:
            epsilon, squaring = moment
            return _Norm(source, axes, epsilon, [*dict.fromkeys([*centring, *rooting, *squaring])], last)
        if last.op_type == "Div":
            return None
    return None


def _producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators and node.domain in {"", "ai.onnx"} else None


def _past_cast(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Return what a Cast between floating-point types reads, and the Cast."""
    cast = _producer(value, "Cast")
    if cast is None or cast.inputs[0] is None or cast.inputs[0].dtype not in FLOAT_TYPES:
        return value, []
    return cast.inputs[0], [cast]


def _mean(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...] | None, ir.Node] | None:
    """Return what a ReduceMean that keeps its dimensions averages, and over which axes from the end."""
    node = _producer(value, "ReduceMean")
    if node is None or node.inputs[0] is None or not int_attribute(node, "keepdims", 1):
        return None
    axes, dimensions = axes_of(node), rank(node.inputs[0])
    if axes is None or (dimensions is None and any(a >= 0 for a in axes)):
        return node.inputs[0], None, node
    return node.inputs[0], tuple(sorted(a if a < 0 else a - (dimensions or 0) for a in axes)), node


def _deviation(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...] | None, list[ir.Node]] | None:
    """Match x - ReduceMean(x)."""
    node = _producer(value, "Sub")
    found = _mean(node.inputs[1]) if node is not None else None
    if node is None or found is None or node.inputs[0] is not found[0]:
        return None
    return found[0], found[1], [node, found[2]]


def _root(value: ir.Value | None, *, inverse: bool) -> tuple[ir.Value, list[ir.Node]] | None:
    """Match Sqrt(v), or 1 / Sqrt(v) where ``inverse``, each perhaps cast; return v and the nodes."""
    value, nodes = _past_cast(value)
    power = _producer(value, "Pow")
    if power is not None and power.inputs[0] is not None and scalar(power.inputs[1]) == (-0.5 if inverse else 0.5):
        return power.inputs[0], [*nodes, power]
    if inverse:
        flip = _producer(value, "Reciprocal", "Div")
        if flip is None or (flip.op_type == "Div" and scalar(flip.inputs[0]) != 1):
            return None
        found = _root(flip.inputs[-1], inverse=False)
        return None if found is None else (found[0], [*nodes, flip, *found[1]])
    root = _producer(value, "Sqrt")
    return None if root is None or root.inputs[0] is None else (root.inputs[0], [*nodes, root])


def _moment(value: ir.Value, source: ir.Value, axes: tuple[int, ...] | None) -> tuple[float | None, list[ir.Node]] | None:
    """Match ReduceMean((x - mean)^2) + epsilon over the same x and axes."""
    add = _producer(value, "Add")
    if add is None:
        return None
    for total, epsilon in ((add.inputs[0], add.inputs[1]), (add.inputs[1], add.inputs[0])):
        found = _mean(total)
        squared = _squared(found[0]) if found is not None else None
        if found is None or squared is None:
            continue
        base, nodes = squared
        bare, casts = _past_cast(base)
        deviation = _deviation(base) or _deviation(bare)
        if deviation is not None and deviation[0] is source and deviation[1] == axes == found[1]:
            return scalar(epsilon), [add, found[2], *nodes, *(casts if _deviation(base) is None else []), *deviation[2]]
    return None


def _squared(value: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
    node = _producer(value, "Pow", "Mul")
    if node is None or node.inputs[0] is None:
        return None
    is_square = scalar(node.inputs[1]) == 2 if node.op_type == "Pow" else node.inputs[0] is node.inputs[1]
    return (node.inputs[0], [node]) if is_square else None


def _fuse(norm: _Norm, version: int, taken: set[str]) -> Rewrite | Decline:
    anchor = norm.last.name or ""
    axes = norm.axes
    if norm.source.dtype == ir.DataType.DOUBLE:
        return Decline(anchor, "DTYPE", "LayerNormalization computes the statistics of FP64 values in FP32")
    if axes is None:
        return Decline(anchor, "AXIS", "the axes of the statistics are computed or of unknown sign")
    if not axes or axes != tuple(range(-len(axes), 0)):
        return Decline(anchor, "AXIS", f"the statistics are over the axes {axes}, not the last ones")
    if norm.epsilon is None or norm.epsilon <= 0:
        return Decline(anchor, "EPSILON", "what is added to the variance is not a positive constant")
    if version < 17:
        return Decline(anchor, "OPSET", f"LayerNormalization came with opset 17, the model is at {version}")
    if (value := escapes(norm.region, norm.last)) is not None:
        return Decline(anchor, "MULTI_CONSUMER", f"'{value.name}' is read outside the pattern")
    shape = _normalized_shape(norm)
    scaling = _affine(norm.last, "Mul", shape, len(axes))
    shift = _affine(scaling[0], "Add", shape, len(axes)) if scaling is not None else None
    if scaling is None and shape is None:
        return Decline(anchor, "NOT_AFFINE", "no scale follows and the size of the normalized axes is dynamic")
    return _emit(norm, scaling, shift, shape, taken)


def _normalized_shape(norm: _Norm) -> tuple[int, ...] | None:
    shape = norm.source.shape
    sizes = list(shape)[-len(norm.axes or ()) :] if shape is not None else [None]
    return tuple(int(d) for d in sizes) if all(isinstance(d, int) for d in sizes) else None  # type: ignore[arg-type]


def _affine(node: ir.Node, operator: str, shape: tuple[int, ...] | None, count: int) -> tuple[ir.Node, np.ndarray] | None:
    """Return the node that scales or shifts the output of ``node`` by a constant over the normalized axes, and the constant."""
    reader = sole_consumer(node.outputs[0])
    if reader is None or reader.op_type != operator or reader.graph is not node.graph:
        return None
    array = constant(reader.inputs[1] if reader.inputs[0] is node.outputs[0] else reader.inputs[0])
    if array is None or array.size != np.prod(array.shape[-count:]) or array.ndim > (rank(node.outputs[0]) or count):
        return None
    if shape is None:
        return (reader, array.reshape(array.shape[-count:])) if array.ndim >= count and 1 not in array.shape[-count:] else None
    return reader, np.broadcast_to(array.reshape(array.shape[-count:]), shape)


def _emit(
    norm: _Norm,
    scaling: tuple[ir.Node, np.ndarray] | None,
    shift: tuple[ir.Node, np.ndarray] | None,
    shape: tuple[int, ...] | None,
    taken: set[str],
) -> Rewrite:
    last = shift[0] if shift else scaling[0] if scaling else norm.last
    graph = last.graph
    if not isinstance(graph, ir.Graph) or last.outputs[0].name is None:
        raise TypeError(f"'{last.name}' belongs to no graph")
    dtype = norm.source.dtype or ir.DataType.FLOAT
    gamma = scaling[1] if scaling else np.ones(shape or (), dtype=dtype.numpy())
    inputs: list[ir.Value | None] = [norm.source, _parameter(graph, last.outputs[0].name, "scale", gamma, taken)]
    if shift:
        inputs.append(_parameter(graph, last.outputs[0].name, "bias", shift[1], taken))
    chain = [norm.last, *([scaling[0]] if scaling and shift else [])]
    absorbed = [*reversed(chain), *norm.region] if last is not norm.last else norm.region
    attributes = [
        ir.AttrInt64("axis", -len(norm.axes or ())),
        ir.AttrFloat32("epsilon", norm.epsilon or 0.0),
        ir.AttrInt64("stash_type", 1),
    ]
    substitute(last, "LayerNormalization", inputs, attributes=attributes, absorbed=absorbed)
    return Rewrite(last.name or "", f"{len(absorbed) + 1} nodes became LayerNormalization")


def _parameter(graph: ir.Graph, name: str, role: str, array: np.ndarray, taken: set[str]) -> ir.Value:
    return add_initializer(graph, fresh_name(f"{name}_{role}", taken), array)
