"""How much the outputs change when one region alone is quantized, measured.

One graph holds both versions of every region behind an ``If`` whose flag is an input, so that the runtime prepares the
weights once and a score costs one forward pass. What is quantized is exactly what ``insert-qdq`` would quantize. The score is
the noise-to-signal ratio at the outputs, ``||y_q - y||^2 / ||y||^2``, or the divergence of the class probabilities, over the same
samples for every region. ``deploycc.quant.methods`` has all ways of scoring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.blocks import block_axis, dynamic_quantizer, quantize_blocks
from deploycc.core.formats import FP32, Format
from deploycc.core.graph import add_initializer, constant
from deploycc.core.placement import takes_codes, weight_axis
from deploycc.core.quantizers import decode, quantize_weight, scale_like
from deploycc.quant.classes import class_axis

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from deploycc.core.backend import Executor, Feeds, Reference
    from deploycc.core.data import Dataset
    from deploycc.core.plan import Region

FLAG = "deploycc_switch"
SCALE = "deploycc_scale_"
# What a region counts whose quantization makes an output infinite or NaN: 90 dB of noise.
WORST = 1e9
Progress = Callable[[int, int], None]
Scales = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """How sure a region's sensitivity is: mean and standard error over the samples, before it meets any format."""

    mean: float
    stderr: float
    samples: int


@dataclass(frozen=True)
class Scores:
    """Noise per region and format, with the method, the number of samples and, where samples were scored singly, the evidence.

    ``noise`` is a noise-to-signal ratio at the outputs, measured or estimated. ``agreement`` has pairs of a number of samples and the
    rank correlation of the regions between two halves of them.
    """

    method: str
    samples: int
    seconds: float
    noise: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    agreement: tuple[tuple[int, float], ...] = ()

    @property
    def stability(self) -> float | None:
        """Return the agreement over all samples, None where it is not known."""
        return self.agreement[-1][1] if self.agreement else None

    def score(self, region: str, format: str) -> float:
        """Return the noise of ``region`` in ``format``."""
        return self.noise[region][format]


@dataclass(frozen=True, slots=True)
class Metric:
    """How far an output moved from what it was (``distance``), and what counts as 1 (``size``); both are summed over batches."""

    distance: Callable[[np.ndarray, np.ndarray], float]
    size: Callable[[np.ndarray], float]


def measure_noise(
    model: ir.Model,
    regions: Sequence[Region],
    formats: Sequence[Format],
    scales: Scales,
    data: Dataset,
    *,
    reference: Reference,
    batch: int = 8,
    metric: Metric | None = None,
    progress: Progress = lambda done, total: None,
) -> Scores:
    """Return the output noise of quantizing each region alone, in each format it allows; ``metric`` is ``NOISE`` unless given."""
    start = time.perf_counter()
    noise: dict[str, dict[str, float]] = {region.name: {} for region in regions}
    work = [(f, [r for r in regions if f.name in r.formats]) for f in formats]
    total, done = sum(len(eligible) for _, eligible in work), 0
    for format, eligible in work:
        if not eligible:
            continue
        run = reference.executor(_switchable(model, eligible, format, scales), simulate=format.activations == "dynamic")
        alone = [{FLAG: flags} for flags in np.eye(len(eligible), dtype=bool)]
        ratios = _noise_of(run, _lowered(eligible), alone, data.batches(batch), metric or NOISE, partial(_tick, progress, done, total))
        for region, ratio in zip(eligible, ratios, strict=True):
            noise[region.name][format.name] = ratio
        done += len(eligible)
    return Scores("output-noise", data.samples, time.perf_counter() - start, noise)


def measure_whole(
    model: ir.Model,
    regions: Sequence[Region],
    formats: Sequence[Format],
    scales: Scales,
    data: Dataset,
    *,
    reference: Reference,
    batch: int = 8,
) -> dict[str, float]:
    """Return per format the noise-to-signal ratio at the outputs with every region quantized that allows it."""
    whole = {}
    for format in formats:
        if eligible := [r for r in regions if format.name in r.formats]:
            run = reference.executor(_switchable(model, eligible, format, scales), simulate=format.activations == "dynamic")
            plain = _lowered(eligible)
            (whole[format.name],) = _noise_of(run, plain, [{FLAG: ~plain[FLAG]}], data.batches(batch), NOISE)
    return whole


def measure_scales(
    model: ir.Model,
    regions: Sequence[Region],
    format: Format,
    tried: Sequence[Scales],
    data: Dataset,
    *,
    reference: Reference,
    batch: int = 8,
) -> list[float]:
    """Return for each of ``tried`` the noise-to-signal ratio at the outputs with all ``regions``, which allow ``format``, in it.

    The scales are inputs of one graph, so that the runtime prepares it once for all of them.
    """
    graph = _switchable(model, regions, format, None)
    kinds = {v.name or "": v.dtype.numpy() for v in graph.graph.inputs if v.dtype is not None and (v.name or "").startswith(SCALE)}
    fed = [
        {name: scale_like(np.dtype(kind), scales[name.removeprefix(SCALE)][format.name]) for name, kind in kinds.items()}
        for scales in tried
    ]
    plain = _lowered(regions) | fed[0]
    raised = [{FLAG: ~plain[FLAG], **each} for each in fed]
    return _noise_of(reference.executor(graph), plain, raised, data.batches(batch), NOISE)


def _lowered(regions: Sequence[Region]) -> dict[str, np.ndarray]:
    return {FLAG: np.zeros(len(regions), bool)}


def _tick(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _noise_of(
    run: Executor,
    plain: Feeds,
    raised: Sequence[Feeds],
    batches: Iterable[Feeds],
    metric: Metric,
    tick: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Return the noise of each of ``raised`` against ``plain``, which both tell a switchable graph what to quantize."""
    error, size = np.zeros(len(raised)), 0.0
    for feeds in batches:
        exact = run({**feeds, **plain})
        size += sum(metric.size(v) for v in exact.values())
        for i, more in enumerate(raised):
            quantized = run({**feeds, **more})
            error[i] += sum(metric.distance(quantized[k], v) for k, v in exact.items())
            tick(i + 1)
    return [min(float(e) / size, WORST) if size else 0.0 for e in np.nan_to_num(error, nan=np.inf)]


def _power(value: np.ndarray) -> float:
    return float(np.sum(np.square(value, dtype=np.float64)))


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the squared distance; an output that took another shape is noise as a whole."""
    if found.shape != wanted.shape:
        return _power(found) + _power(wanted)
    return float(np.sum(np.square(found.astype(np.float64) - wanted)))


def _divergence(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return ``KL(softmax(wanted) || softmax(found))`` per place, summed over samples; half the squared distance without classes."""
    axis = class_axis(wanted.shape)
    if axis is None or wanted.dtype.kind != "f" or found.shape != wanted.shape:
        return _distance(found, wanted) / 2
    p, q = (_log_probabilities(v, axis) for v in (wanted, found))
    return float(np.sum(np.exp(p) * (p - q)) / max(1, wanted[0].size // wanted.shape[axis]))


def _log_probabilities(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the logarithm of the softmax, of what may be probabilities already."""
    wide = values.astype(np.float64)
    if wide.min() >= 0 and np.allclose(wide.sum(axis), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(wide, 1e-30)))
    wide = wide - wide.max(axis, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis, keepdims=True)))


NOISE = Metric(_distance, _power)
DIVERGENCE = Metric(_divergence, len)


def _switchable(model: ir.Model, regions: Sequence[Region], format: Format, scales: Scales | None) -> ir.Model:
    """Return a clone in which regions compute behind ``If(flag[i])``: with quantized operands, or with the plain ones.

    Without ``scales`` those of static INT8 or FP8 are inputs of the graph, ``SCALE`` and the name of the value.
    """
    clone = model.clone()
    graph = clone.graph
    nodes = {n.name: n for n in graph}
    flags = ir.Value(name=FLAG, shape=ir.Shape([len(regions)]), type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(flags)
    for position, region in enumerate(regions):
        index = add_initializer(graph, f"switch_index_{position}", np.array(position, np.int64))
        gather = ir.node("Gather", [flags, index], {"axis": 0}, name=f"switch_gather_{position}")
        gather.outputs[0].name, gather.outputs[0].type = f"switch_flag_{position}", ir.TensorType(ir.DataType.BOOL)
        graph.insert_before(nodes[region.anchors[0]], gather)
        for name, operands in quantized_operands(region, nodes, format):
            _switch(graph, nodes[name], gather.outputs[0], operands, format, scales)
    graph.sort()
    return clone


def quantized_operands(region: Region, nodes: Mapping[str | None, ir.Node], format: Format = FP32) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the nodes of ``region`` with quantized operands and which those are.

    Of anchors both, of a residual Add the skip (P4), of DCNv3 its x where ``format`` is INT8.
    """
    yield from ((name, (0, 1)) for name in region.anchors)
    for name in region.nodes:
        skips = tuple(i for i, v in enumerate(nodes[name].inputs) if v is not None and v.name in region.residuals)
        if skips and takes_codes(nodes[name], format):
            yield name, skips


def _switch(graph: ir.Graph, node: ir.Node, flag: ir.Value, operands: tuple[int, ...], format: Format, scales: Scales | None) -> None:
    then, other = (_branch(graph, node, chosen, format, scales) for chosen in (operands, ()))
    switch = ir.node("If", [flag], {"then_branch": then, "else_branch": other}, name=f"switch_{node.name}")
    old, new = node.outputs[0], switch.outputs[0]
    # The name stays with the value that the others read, since scales are found by it.
    new.type, new.shape, new.name, old.name = old.type, old.shape, old.name, f"{old.name}_plain"
    graph.insert_before(node, switch)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _branch(graph: ir.Graph, node: ir.Node, operands: tuple[int, ...], format: Format, scales: Scales | None) -> ir.Graph:
    """Return a graph that computes ``node`` with some operands quantized."""
    inner: list[ir.Node] = []
    inputs = list(node.inputs)
    for i in operands:
        inputs[i] = _quantized_operand(graph, node, i, format, scales, inner)
    label = f"{node.name}_{format.name if operands else 'plain'}"
    copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), name=label)
    copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = f"{label}_out", node.outputs[0].type, node.outputs[0].shape
    return ir.Graph([], [copy.outputs[0]], nodes=[*inner, copy], name=f"{label}_branch")


def _quantized_operand(
    graph: ir.Graph, node: ir.Node, i: int, format: Format, scales: Scales | None, inner: list[ir.Node]
) -> ir.Value | None:
    value = node.inputs[i]
    weight = constant(value)
    if value is None or (weight is None and format.activations == "none"):
        return value
    if weight is not None:
        stored = fake_quantized_weight(weight, weight_axis(node), format)
        return add_initializer(graph, f"{value.name}_{format.name}_{node.name}", stored)
    if format.activations == "dynamic" and scales is not None:
        return _quantized_on_the_fly(graph, node, i, format, scales, inner)
    stem, code_type = f"{node.name}_{i}_{format.name}", getattr(ir.DataType, format.onnx_type)
    if scales is None:
        scale_value = _fed_scale(graph, value)
    else:
        like = np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
        scale_value = add_initializer(graph, f"{stem}_scale", scale_like(like, scales[value.name or ""][format.name]))
    zero = add_initializer(graph, f"{stem}_zero", np.zeros((), code_type.numpy()), code_type)
    quantize = ir.node("QuantizeLinear", [value, scale_value, zero], name=f"{stem}_q")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale_value, zero], name=f"{stem}_dq")
    for each in (quantize, dequantize):
        each.outputs[0].name = f"{each.name}_out"
    inner.extend((quantize, dequantize))
    return dequantize.outputs[0]


def _fed_scale(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return the input of the graph that is the scale of ``value``."""
    name = f"{SCALE}{value.name}"
    known = next((v for v in graph.inputs if v.name == name), None)
    if known is None:
        known = ir.Value(name=name, shape=ir.Shape([]), type=value.type)
        graph.inputs.append(known)
    return known


def _quantized_on_the_fly(graph: ir.Graph, node: ir.Node, i: int, format: Format, scales: Scales, inner: list[ir.Node]) -> ir.Value | None:
    """Return what an engine makes of an operand whose blocks get their scales as it runs."""
    value, stem, given = node.inputs[i], f"{node.name}_{i}_{format.name}", None
    if value is None:
        return None
    if format.reach is not None:
        like = np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
        given = add_initializer(graph, f"{stem}_scale", scale_like(like, scales[value.name or ""][format.name]))
    nodes = dynamic_quantizer(value, format=format, scale=given)
    for number, each in enumerate(nodes):
        each.name = f"{stem}_{number}"
        for place, out in enumerate(each.outputs):
            out.name = f"{each.name}_{place}_out"
    inner.extend(nodes)
    return nodes[-1].outputs[0]


def fake_quantized_weight(weight: np.ndarray, axis: int, format: Format) -> np.ndarray:
    """Return ``weight``, whose output channels lie along ``axis``, after its codes in ``format``."""
    if format.block:
        found = quantize_blocks(weight, axis=block_axis(axis), format=format, base=FP32).decoded()
    else:
        codes, scale = quantize_weight(weight, axis=axis, format=format, base=FP32)
        found = decode(codes, scale, axis=axis)
    return found.astype(weight.dtype)
