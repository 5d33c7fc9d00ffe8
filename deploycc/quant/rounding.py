"""Round weights to INT8 or FP8 so that the outputs of their layer change least, instead of each weight by itself.

Inputs are rounded one after the other, those of the largest energy first, and the error of each is made up for by the inputs not yet
rounded: the closed form of optimal brain surgery on the layer's own Gram matrix H = E[x x^T] (Frantar et al., GPTQ, arXiv 2210.17323).
The INT8 step of each output channel is searched below the largest weight for the least error under the diagonal of H.

The result is a float weight that lies on the grid which ``quantize_weight`` finds, so that insertion gives exactly these codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.linalg import cholesky
from scipy.linalg.lapack import dtrtri

from deploycc.core.formats import INT8, Format
from deploycc.core.graph import attribute, constant, int_attribute, ints_attribute
from deploycc.core.placement import weight_axis
from deploycc.core.quantizers import largest_code, round_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import onnx_ir as ir

    from deploycc.core.backend import Reference
    from deploycc.core.data import Dataset
    from deploycc.core.plan import PrecisionPlan

SAMPLES = 32
ROWS = 128  # of the inputs of one layer, per image
WIDEST = 4608  # inputs of a layer; a wider one is rounded to nearest, since its Gram matrix would not be worth its memory
DAMPING = 0.01
SHRINKS = np.linspace(1.0, 0.7, 13)
_BLOCK = 32
_TOGETHER = 64  # groups of layers whose inputs leave the runtime in one pass


@dataclass(frozen=True)
class Layer:
    """A weighted node that the plan quantizes: its input, its weight, its format and the scale of the input."""

    node: ir.Node
    source: str
    weight: str
    format: Format
    scale: float

    @property
    def key(self) -> tuple[str, str]:
        """Return what the result depends on, for one model and one set of data."""
        return self.weight, self.format.name

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


def round_weights(
    model: ir.Model,
    plan: PrecisionPlan,
    data: Dataset,
    *,
    reference: Reference,
    batch: int = 8,
    known: dict[tuple[str, str], np.ndarray] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Return the weights of the layers that ``plan`` quantizes, by initializer, rounded for the least error at their outputs.

    Args:
        model: the graph that the plan is for, in FP32; it is not changed.
        plan: what is quantized, with the scales of the inputs.
        data: calibration data, of which at most ``SAMPLES`` are used.
        reference: executes the graph.
        batch: samples per run.
        known: what earlier calls found, by weight and format; it grows.
        progress: called with groups of layers done and in all.
    """
    known, wanted = {} if known is None else known, _layers(model, plan)
    groups = _sharing_rows([layer for layer in wanted if layer.key not in known])
    for start in range(0, len(groups), _TOGETHER):
        some = groups[start : start + _TOGETHER]
        for i, (group, gram) in enumerate(
            zip(some, _grams(model, [g[0] for g in some], data.take(SAMPLES), reference, batch), strict=True)
        ):
            columns = [layer.columns() for layer in group]
            found = rounded(np.concatenate(columns, axis=1), gram, format=group[0].format, base=plan.base)
            for layer, part in zip(group, np.split(found, np.cumsum([c.shape[1] for c in columns])[:-1], axis=1), strict=True):
                known[layer.key] = layer.back(part)
            progress(start + i + 1, len(groups))
    return {layer.weight: known[layer.key] for layer in wanted}


def _sharing_rows(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return layers in groups that multiply the same rows, such as the projections to query, key and value."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        windows = layer.weight if layer.node.op_type == "Conv" else ""
        groups.setdefault((layer.source, layer.format.name, windows), []).append(layer)
    return list(groups.values())


def rounded(weight: np.ndarray, gram: np.ndarray, *, format: Format, base: Format) -> np.ndarray:
    """Return ``weight [inputs, outputs]`` on a grid per output, with the least ``sum e^T gram e`` that one sweep finds.

    Args:
        weight: float64.
        gram: ``[inputs, inputs]``, positive semidefinite.
        format: INT8 or FP8, whose codes make the grid.
        base: the floating-point format in which scales are stored.
    """
    energy = np.diag(gram)
    step = _steps(weight, energy, format, base)
    order = np.argsort(-energy, kind="stable")
    upper = _inverse_factor(gram[np.ix_(order, order)] + np.diag(np.full(len(gram), DAMPING * max(float(energy.mean()), 1e-30))))
    left = weight[order] / step  # what is still to be rounded, in codes
    codes = np.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = np.empty((stop - start, weight.shape[1]))
        for i in range(start, stop):
            codes[i] = _codes(left[i], format)
            errors[i - start] = (left[i] - codes[i]) / upper[i, i]
            left[i + 1 : stop] -= upper[i, i + 1 : stop, None] * errors[i - start]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    back = np.empty_like(codes)
    back[order] = codes * step
    return _anchored(back, step, format)


def _inverse_factor(matrix: np.ndarray) -> np.ndarray:
    """Return the upper ``U`` with ``U^T U = matrix^-1``: row by row, how an error spreads to what is still to be rounded.

    With rows and columns in reverse, ``matrix = M M^T``, and ``U`` is the inverse of ``M`` turned back: no full inverse is needed.
    """
    lower = cholesky(matrix[::-1, ::-1], lower=True, check_finite=False)
    inverse, _ = dtrtri(lower, lower=1)
    return np.ascontiguousarray(inverse[::-1, ::-1])


def _codes(scaled: np.ndarray, format: Format) -> np.ndarray:
    """Return the codes of values that are in units of their step, as floating-point numbers of the same type."""
    top = largest_code(format)
    codes = np.minimum(np.maximum(scaled, -top), top)
    return np.rint(codes) if format == INT8 else np.asarray(codes.astype(ml_dtypes.float8_e4m3fn).astype(scaled.dtype))


def _steps(weight: np.ndarray, energy: np.ndarray, format: Format, base: Format) -> np.ndarray:
    """Return the step per output whose rounding to nearest has the least error, each input weighted by its energy.

    The step of FP8 floats, so its scale is that of the largest weight.
    """
    largest = np.abs(weight).max(axis=0)
    if format != INT8:
        return round_scale(largest / largest_code(format), base).astype(np.float64)
    best, least = np.ones(weight.shape[1]), np.full(weight.shape[1], np.inf)
    for shrink in SHRINKS:
        step = round_scale(shrink * largest / largest_code(INT8), base).astype(np.float64)
        scaled = weight / step
        error = step**2 * (energy @ (_codes(scaled, format) - scaled) ** 2)
        better = error < least
        best, least = np.where(better, step, best), np.where(better, error, least)
    return best


def _anchored(weight: np.ndarray, step: np.ndarray, format: Format) -> np.ndarray:
    """Let the largest weight of every output have the largest code, from which insertion derives the step."""
    top = largest_code(format) * step
    at = np.abs(weight).argmax(axis=0)
    outputs = np.arange(weight.shape[1])
    weight[at, outputs] = np.where(weight[at, outputs] < 0, -top, top)
    return weight


def _layers(model: ir.Model, plan: PrecisionPlan) -> list[Layer]:
    nodes = {n.name: n for n in model.graph}
    found: dict[str, Layer] = {}
    for assignment in plan.assignments:
        format = assignment.format
        if not format.is_quantized:
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
                found[weight.name or ""] = Layer(node, source.name or "", weight.name or "", format, scale)
    return list(found.values())


def _grams(model: ir.Model, layers: Sequence[Layer], data: Dataset, reference: Reference, batch: int) -> Iterator[np.ndarray]:
    """Return E[x x^T] of the quantized inputs of every layer."""
    clone = model.clone()
    values = {v.name: v for v in clone.graph.inputs} | {v.name: v for n in clone.graph for v in n.outputs}
    sources = list(dict.fromkeys(layer.source for layer in layers))
    outputs = {v.name for v in clone.graph.outputs}
    # An input of the graph cannot be an output as well; it is read from the feeds.
    fed = {v.name for v in clone.graph.inputs}
    clone.graph.outputs.extend(values[s] for s in sources if s not in outputs and s not in fed)
    run = reference.executor(clone)
    totals: list[np.ndarray | float] = [0.0] * len(layers)
    counts = [0] * len(layers)
    for feeds in data.batches(batch):
        seen: Mapping[str, np.ndarray] = {**run(feeds, [s for s in sources if s not in fed]), **feeds}
        for i, layer in enumerate(layers):
            rows = _codes(layer.rows(seen[layer.source]) / np.float32(layer.scale), layer.format)
            totals[i] = totals[i] + (rows.T @ rows).astype(np.float64)
            counts[i] += len(rows)
    return (np.asarray(total) * (layer.scale**2 / max(n, 1)) for layer, total, n in zip(layers, totals, counts, strict=True))


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
