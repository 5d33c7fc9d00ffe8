"""The layers whose weights a plan quantizes, what they multiply, and the moments of it over calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from deploycc.core.formats import INT8, Format
from deploycc.core.graph import attribute, constant, float_attribute, int_attribute, ints_attribute
from deploycc.core.placement import weight_axis
from deploycc.core.quantizers import largest_code

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir

    from deploycc.core.backend import Reference
    from deploycc.core.data import Dataset
    from deploycc.core.plan import PrecisionPlan

ROWS = 128  # of the inputs of one layer, per image
WIDEST = 4608  # inputs of a layer; a wider one is rounded to nearest, since its Gram matrix would not be worth its memory


@dataclass(frozen=True)
class Layer:
    """A weighted node that the plan quantizes: its input, its weight, its format, the scale of the input, and its bias if it has one."""

    node: ir.Node
    source: str
    weight: str
    format: Format
    scale: float
    bias: ir.Value | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Return what the result depends on, for one model and one set of data."""
        return self.weight, self.format.name

    @property
    def bias_key(self) -> tuple[str, str]:
        """Return the same for the bias."""
        return self.bias.name or "" if self.bias is not None else "", self.format.name

    @property
    def outputs(self) -> int:
        """Return how many columns the weight has."""
        return int(_constant(self.node).shape[weight_axis(self.node)])

    def columns(self) -> np.ndarray:
        """Return the weight as float64 ``[inputs, outputs]``, the inputs in the order of ``rows``."""
        return _columns(self.node, _constant(self.node))

    def back(self, columns: np.ndarray) -> np.ndarray:
        """Return ``columns`` in the shape and type of the weight."""
        old, axis = _constant(self.node), weight_axis(self.node)
        moved = np.moveaxis(old, axis, -1)
        return np.moveaxis(columns.reshape(moved.shape), -1, axis).astype(old.dtype)

    def rows(self, value: np.ndarray) -> np.ndarray:
        """Return a sample of what the layer multiplies by its weight: ``[rows, inputs]`` of one batch of ``value``."""
        if self.node.op_type == "Conv":
            return _patches(self.node, value)
        flat = value.reshape(len(value), -1, value.shape[-1])
        step = max(1, flat.shape[1] // ROWS)
        return flat[:, ::step].reshape(-1, flat.shape[-1])


@dataclass(frozen=True)
class Moments:
    """Of a layer's inputs: their mean ``[inputs]``, and mean and second moment ``[inputs, inputs]`` of what quantization makes of them."""

    mean: np.ndarray
    quantized: np.ndarray
    gram: np.ndarray


def codes_of(scaled: np.ndarray, format: Format) -> np.ndarray:
    """Return the codes of values that are in units of their step, as floating-point numbers of the same type."""
    top = largest_code(format)
    codes = np.maximum(scaled, -top)
    np.minimum(codes, top, out=codes)
    return np.rint(codes, out=codes) if format == INT8 else np.asarray(codes.astype(ml_dtypes.float8_e4m3fn).astype(scaled.dtype))


def quantized_layers(model: ir.Model, plan: PrecisionPlan) -> list[Layer]:
    """Return the layers of ``plan`` whose weights can be rounded together: constant, read once, and not too wide."""
    nodes = {n.name: n for n in model.graph}
    found: dict[str, Layer] = {}
    for assignment in plan.assignments:
        format = assignment.format
        if not format.is_quantized or format.block:
            continue
        for name in assignment.region.anchors:
            node = nodes[name]
            source, weight = node.inputs[0], node.inputs[1]
            if source is None or weight is None or constant(weight) is None or len(weight.uses()) != 1:
                continue
            if node.op_type == "Conv" and int_attribute(node, "group", 1) != 1:
                continue
            if node.op_type not in {"Conv", "Gemm", "MatMul"} or attribute(node, "auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
                continue
            scale = plan.scales.get(source.name or "", {}).get(format.name)
            if scale is not None and _columns(node, _constant(node)).shape[0] <= WIDEST:
                found[weight.name or ""] = Layer(
                    node, source.name or "", weight.name or "", format, scale, _bias(node) if format == INT8 else None
                )
    return list(found.values())


def _bias(node: ir.Node) -> ir.Value | None:
    """Return what is added to each output of ``node`` and to nothing else, if it is constant."""
    if node.op_type == "MatMul":
        adds = [user for user, _ in node.outputs[0].uses()]
        if len(adds) != 1 or adds[0].op_type != "Add" or node.outputs[0].is_graph_output():
            return None
        bias = next((v for v in adds[0].inputs if v is not None and v is not node.outputs[0]), None)
    else:
        scaled = any(float_attribute(node, name, 1.0) != 1 for name in ("alpha", "beta"))
        bias = node.inputs[2] if len(node.inputs) > 2 and not scaled else None
    values = constant(bias)
    outputs = _constant(node).shape[weight_axis(node)]
    return bias if bias is not None and values is not None and values.shape == (outputs,) and len(bias.uses()) == 1 else None


def moments_of(model: ir.Model, layers: Sequence[Layer], data: Dataset, reference: Reference, batch: int) -> Iterator[Moments]:
    """Return the moments of the inputs of every layer."""
    totals: list[Any] = [(0.0, 0.0, 0.0, 0)] * len(layers)
    for i, scaled in scaled_rows(model, layers, data, reference, batch):
        rows = codes_of(scaled, layers[i].format)
        mean, quantized, gram, count = totals[i]
        once = np.ones(len(rows), rows.dtype)  # sums over the rows of one batch are exact enough in their own type, and BLAS is faster
        sums = once @ scaled, once @ rows
        totals[i] = mean + sums[0], quantized + sums[1], gram + (rows.T @ rows).astype(np.float64), count + len(rows)
    for i, layer in enumerate(layers):
        (mean, quantized, gram, count), totals[i] = totals[i], None
        unit = layer.scale / count
        gram *= layer.scale * unit
        yield Moments(mean * unit, quantized * unit, gram)


def scaled_rows(
    model: ir.Model, layers: Sequence[Layer], data: Dataset, reference: Reference, batch: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, batch by batch, the index of each layer and the rows that it multiplies, in units of the scale of its input."""
    clone = model.clone()
    values = {v.name: v for v in clone.graph.inputs} | {v.name: v for n in clone.graph for v in n.outputs}
    sources = list(dict.fromkeys(layer.source for layer in layers))
    outputs = {v.name for v in clone.graph.outputs}
    # An input of the graph cannot be an output as well; it is read from the feeds.
    fed = {v.name for v in clone.graph.inputs}
    clone.graph.outputs.extend(values[s] for s in sources if s not in outputs and s not in fed)
    run = reference.executor(clone)
    for feeds in data.batches(batch):
        seen: Mapping[str, np.ndarray] = {**run(feeds, [s for s in sources if s not in fed]), **feeds}
        for i, layer in enumerate(layers):
            yield i, layer.rows(seen[layer.source]) / np.float32(layer.scale)


def _columns(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    moved = np.moveaxis(weight, weight_axis(node), -1)
    return moved.reshape(-1, moved.shape[-1]).astype(np.float64)


def _constant(node: ir.Node) -> np.ndarray:
    found = constant(node.inputs[1])
    if found is None:
        raise TypeError(f"the weight of '{node.name}' is computed")
    return found


def _patches(node: ir.Node, value: np.ndarray) -> np.ndarray:
    """Return a strided sample of the windows of a convolution, ``[rows, inputs * taps]``."""
    axes = value.ndim - 2
    kernel = _constant(node).shape[2:]
    pads = ints_attribute(node, "pads") or (0,) * (2 * axes)
    strides, dilations = (ints_attribute(node, n) or (1,) * axes for n in ("strides", "dilations"))
    padded = np.pad(value, [(0, 0), (0, 0), *((int(pads[i]), int(pads[i + axes])) for i in range(axes))])
    extents = [int(d) * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    windows = sliding_window_view(padded, extents, axis=tuple(range(2, 2 + axes)))
    every: list[Any] = [slice(None, None, int(step)) for step in (1, 1, *strides, *dilations)]
    windows = windows[tuple(every)]
    first = np.moveaxis(windows, 1, 1 + axes)  # [batch, positions..., channels, taps...]
    positions = int(np.prod(first.shape[1 : 1 + axes]))
    picked = np.unravel_index(np.arange(0, positions, max(1, positions // ROWS)), first.shape[1 : 1 + axes])
    return np.ascontiguousarray(first[(slice(None), *picked)]).reshape(-1, int(np.prod(first.shape[1 + axes :])))
