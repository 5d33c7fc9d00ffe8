"""Nodes that are affine in one input, read as convolutions and written back as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.convolution import Convolution, Geometry, Refusal, average, diagonal
from deploycc.core.dimensions import dimensions
from deploycc.core.graph import (
    add_initializer,
    attribute,
    constant,
    float_attribute,
    fresh_name,
    int_attribute,
    ints_attribute,
    is_constant,
    rank,
    substitute,
    widened,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LARGEST_HALF = 65504.0
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True, slots=True)
class Link:
    """A node, or a product with the bias behind it, as a convolution of ``source``; the numbers are read by ``load``."""

    nodes: tuple[ir.Node, ...]
    source: ir.Value
    geometry: Geometry
    load: Callable[[], Convolution]

    @property
    def output(self) -> ir.Value:
        """Return the value that the link computes."""
        return self.nodes[-1].outputs[0]

    @property
    def name(self) -> str:
        """Return the name of the node that holds the weight."""
        return self.nodes[0].name or ""

    @property
    def is_pointwise(self) -> bool:
        """Return whether the link scales and shifts channels in a node that is no kernel of its own."""
        own = self.geometry
        return self.nodes[0].op_type != "Conv" and all(k == 1 for k in own.kernel) and own.groups == own.inputs == own.outputs


def read_convolution(node: ir.Node) -> Link | Refusal | None:
    """Return a Conv as a link, why it cannot be one, or None for another node."""
    if node.op_type != "Conv" or node.inputs[0] is None:
        return None
    if refusal := computed(node):
        return refusal
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    shape = dimensions(weight) or ()
    sizes = tuple(d for d in shape if isinstance(d, int))
    axes = len(sizes) - 2
    pads = _pads(node, sizes[2:])
    if isinstance(pads, Refusal):
        return pads
    groups = int_attribute(node, "group", 1)
    ones = (1,) * axes
    geometry = Geometry(
        outputs=sizes[0],
        inputs=sizes[1] * groups,
        kernel=sizes[2:],
        strides=ints_attribute(node, "strides") or ones,
        dilations=ints_attribute(node, "dilations") or ones,
        begins=pads[:axes],
        ends=pads[axes:],
        groups=groups,
        biased=bool(np.any(constant(bias))) if bias is not None else False,
    )
    return Link((node,), node.inputs[0], geometry, lambda: Convolution(geometry, _array(weight), _bias(bias, geometry.outputs)))


def computed(node: ir.Node) -> Refusal | None:
    """Return the refusal of a node whose weight or bias is no constant, if that is so."""
    for value in node.inputs[1:]:
        if value is None or is_constant(value):
            continue
        producer = value.producer()
        if producer is not None and producer.op_type in _QUANTIZERS:
            return Refusal("DTYPE", f"'{node.name}' is quantized already: merging comes before quantization")
        return Refusal("NONCONST_WEIGHT", f"the weight or bias of '{node.name}' is computed")
    return None


def read_pointwise(node: ir.Node) -> Link | Refusal | None:
    """Return a BatchNormalization, a scaling by constants or an activation of slope 1 as a link, if the node is one."""
    axes = (rank(node.outputs[0]) or 0) - 2
    if axes < 1:
        return None
    if node.op_type == "BatchNormalization":
        return _normalization(node, axes)
    if is_unit_activation(node) or node.op_type == "Mul":
        channels = _channels(node.outputs[0])
        position = 1 if node.op_type != "Mul" else next((i for i, v in enumerate(node.inputs) if is_constant(v)), None)
        source = None if position is None else node.inputs[1 - position]
        if source is None or channels is None or rank(source) != axes + 2:
            return None
        factor = per_channel(node.inputs[position or 0], channels, axes + 2) if node.op_type == "Mul" else np.ones(channels)
        return None if factor is None else _diagonal(node, source, factor, np.zeros(channels), axes)
    return None


def read_pooling(node: ir.Node) -> Link | Refusal | None:
    """Return an AveragePool that counts its padding as a link, why it cannot be one, or None for another node."""
    kernel, channels = ints_attribute(node, "kernel_shape"), _channels(node.outputs[0]) if node.outputs else None
    if node.op_type != "AveragePool" or kernel is None or channels is None or node.inputs[0] is None:
        return None
    if int_attribute(node, "ceil_mode", 0):
        return Refusal("CEIL_MODE", f"'{node.name}' rounds its output size up: its last windows are cut")
    pads, ones = _pads(node, kernel), (1,) * len(kernel)
    if isinstance(pads, Refusal):
        return pads
    if any(pads) and not int_attribute(node, "count_include_pad", 0):
        return Refusal("COUNT_PAD", f"'{node.name}' does not count its padding: its border windows divide by less")
    strides, dilations = ints_attribute(node, "strides") or ones, ints_attribute(node, "dilations") or ones
    geometry = Geometry(channels, channels, kernel, strides, dilations, pads[: len(kernel)], pads[len(kernel) :], channels)
    return Link((node,), node.inputs[0], geometry, lambda: average(channels, geometry))


def is_unit_activation(node: ir.Node) -> bool:
    """Return whether an activation of trained slope has come to be the identity."""
    if node.op_type == "LeakyRelu":
        return float_attribute(node, "alpha", 0.01) == 1.0
    slope = constant(node.inputs[1]) if node.op_type == "PRelu" else None
    return slope is not None and bool(np.all(slope == 1))


def per_channel(value: ir.Value | None, channels: int, of: int, *, axis: int = 1) -> np.ndarray | None:
    """Return a constant as one number per channel if it broadcasts so against a value of rank ``of``, else None."""
    if not is_constant(value) or value is None or value.const_value is None:
        return None
    shape = value.const_value.shape.numpy()
    if len(shape) > of:
        return None
    aligned = (1,) * (of - len(shape)) + tuple(shape)
    if any(d != 1 for i, d in enumerate(aligned) if i != axis) or aligned[axis] not in {1, channels}:
        return None
    return np.broadcast_to(_array(value).reshape(-1), (channels,)).copy()


def unfit(merged: Convolution, links: Sequence[Link]) -> Refusal | None:
    """Return why merged numbers are not fit for use: not finite, or beyond FP16 where the given ones were within it."""
    largest = max(float(np.max(np.abs(a), initial=0.0)) for a in (merged.weight, merged.bias))
    if not np.isfinite(largest):
        return Refusal("NUMERIC", "a merged parameter is not finite")
    if largest <= LARGEST_HALF:
        return None
    given = max(float(np.max(np.abs(a), initial=0.0)) for link in links for a in (link.load().weight, link.load().bias))
    return Refusal("NUMERIC", f"the largest merged parameter is {largest:g}") if largest > given else None


def write_convolution(
    last: ir.Node, source: ir.Value, merged: Convolution, *, absorbed: Sequence[ir.Node], dtype: ir.DataType, taken: set[str]
) -> ir.Node:
    """Replace ``last`` and the nodes it absorbs by one Conv of ``source``."""
    own, stem = merged.geometry, last.outputs[0].name
    attributes = [
        ir.AttrInt64s("kernel_shape", own.kernel),
        ir.AttrInt64s("strides", own.strides),
        ir.AttrInt64s("dilations", own.dilations),
        ir.AttrInt64s("pads", (*own.begins, *own.ends)),
        ir.AttrInt64("group", own.groups),
    ]
    inputs = [source, write_constant(last, f"{stem}_merged", merged.weight, dtype=dtype, taken=taken)]
    if np.any(merged.bias):
        inputs.append(write_constant(last, f"{stem}_bias", merged.bias, dtype=dtype, taken=taken))
    return substitute(last, "Conv", inputs, attributes=attributes, absorbed=absorbed)


def write_constant(node: ir.Node, name: str, array: np.ndarray, *, dtype: ir.DataType, taken: set[str]) -> ir.Value:
    """Register an array in the graph of ``node``, rounded once to ``dtype``."""
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"'{node.name}' belongs to no graph")
    return add_initializer(node.graph, fresh_name(name, taken), array.astype(dtype.numpy()))


def weight_type(links: Sequence[Link]) -> ir.DataType:
    """Return the type of the first weight among ``links``."""
    found = (v.dtype for link in links for node in link.nodes for v in node.inputs[1:2] if is_constant(v) and v is not None)
    return next((d for d in found if d is not None), ir.DataType.FLOAT)


def _normalization(node: ir.Node, axes: int) -> Link | Refusal | None:
    if int_attribute(node, "training_mode", 0) or node.inputs[0] is None:
        return None
    arrays = [constant(v) for v in node.inputs[1:5]]
    given = [a.astype(np.float64) for a in arrays if a is not None]
    if len(given) != 4:
        return Refusal("NONCONST_WEIGHT", f"the statistics of '{node.name}' are computed")
    gamma, beta, mean, variance = given
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(variance + float_attribute(node, "epsilon", 1e-5))
        return _diagonal(node, node.inputs[0], factor, beta - mean * factor, axes)


def _diagonal(node: ir.Node, source: ir.Value, factor: np.ndarray, offset: np.ndarray, axes: int) -> Link:
    map_ = diagonal(factor, offset, rank=axes)
    return Link((node,), source, map_.geometry, lambda: map_)


def _pads(node: ir.Node, kernel: Sequence[int]) -> tuple[int, ...] | Refusal:
    """Return the padding, all begins and then all ends; one that depends on the size of the image is a refusal."""
    mode, axes = attribute(node, "auto_pad", "NOTSET"), len(kernel)
    if mode == "NOTSET":
        return ints_attribute(node, "pads") or (0,) * (2 * axes)
    if mode == "VALID":
        return (0,) * (2 * axes)
    strides = ints_attribute(node, "strides") or (1,) * axes
    if any(s != 1 for s in strides):
        return Refusal("DYNAMIC_SHAPE", f"the padding of '{node.name}' depends on the size of its input")
    dilations = ints_attribute(node, "dilations") or (1,) * axes
    totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    smaller, larger = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return (*smaller, *larger) if mode == "SAME_UPPER" else (*larger, *smaller)


def _channels(value: ir.Value) -> int | None:
    sizes = dimensions(value)
    return sizes[1] if sizes is not None and len(sizes) > 1 and isinstance(sizes[1], int) else None


def _array(value: ir.Value | None) -> np.ndarray:
    found = widened(value)
    if found is None:
        raise TypeError("a constant was expected")
    return found


def _bias(value: ir.Value | None, outputs: int) -> np.ndarray:
    return np.zeros(outputs) if value is None else _array(value)
