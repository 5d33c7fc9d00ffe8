"""How much the outputs change when one region alone is quantized.

One graph holds both versions of every region behind an ``If`` whose flag is an input, so that the runtime prepares the
weights once and a score costs one forward pass. The score is the noise-to-signal ratio at the outputs,
``||y_q - y||^2 / ||y||^2``, over the same samples for every region.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from deploycc.core.backend import Reference
from deploycc.core.data import Dataset
from deploycc.core.formats import FP32, Format
from deploycc.core.graph import constant
from deploycc.core.plan import Region
from deploycc.core.quantizers import decode, quantize_weight
from deploycc.core.placement import weight_axis

FLAG = "deploycc_switch"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scores:
    """Noise-to-signal ratio per region and format, with the method and the number of samples."""

    method: str
    samples: int
    seconds: float
    noise: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def measure_noise(
    model: ir.Model,
    regions: Sequence[Region],
    formats: Sequence[Format],
    scales: Mapping[str, Mapping[str, float]],
    data: Dataset,
    *,
    reference: Reference,
    batch: int = 8,
    progress: Progress = lambda done, total: None,
) -> Scores:
    """Return the output noise of quantizing each region alone, in each format it allows."""
    start = time.perf_counter()
    noise: dict[str, dict[str, float]] = {region.name: {} for region in regions}
    work = [(f, [r for r in regions if f.name in r.formats]) for f in formats]
    total, done = sum(len(eligible) for _, eligible in work), 0
    for format, eligible in work:
        if not eligible:
            continue
        run = reference.executor(_switchable(model, eligible, format, scales))
        for name, ratio in _noise_per_region(run, eligible, data, batch, lambda i: progress(done + i, total)):
            noise[name][format.name] = ratio
        done += len(eligible)
    return Scores("output-noise", data.samples, time.perf_counter() - start, noise)


def _noise_per_region(run, regions, data, batch, tick):  # type: ignore[no-untyped-def]
    error, power = np.zeros(len(regions)), 0.0
    batches = list(data.batches(batch))
    for feeds in batches:
        plain = run({**feeds, FLAG: np.zeros(len(regions), bool)})
        power += sum(float(np.sum(np.square(v, dtype=np.float64))) for v in plain.values())
        for i in range(len(regions)):
            flags = np.zeros(len(regions), bool)
            flags[i] = True
            quantized = run({**feeds, FLAG: flags})
            error[i] += sum(float(np.sum(np.square(quantized[k].astype(np.float64) - v))) for k, v in plain.items())
            tick(i + 1)
    yield from ((region.name, float(e / power) if power else 0.0) for region, e in zip(regions, error, strict=True))


def _switchable(model: ir.Model, regions: Sequence[Region], format: Format, scales: Mapping[str, Mapping[str, float]]) -> ir.Model:
    """Return a clone in which anchors compute behind ``If(flag[i])``: quantized operands, or the plain ones."""
    clone = model.clone()
    graph = clone.graph
    nodes = {n.name: n for n in graph}
    flags = ir.Value(name=FLAG, shape=ir.Shape([len(regions)]), type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(flags)
    for position, region in enumerate(regions):
        index = _initializer(graph, f"switch_index_{position}", np.array(position, np.int64))
        gather = ir.node("Gather", [flags, index], {"axis": 0}, name=f"switch_gather_{position}")
        gather.outputs[0].name = f"switch_flag_{position}"
        graph.insert_before(nodes[region.anchors[0]], gather)
        for name in region.anchors:
            _switch(graph, nodes[name], gather.outputs[0], format, scales)
    graph.sort()
    return clone


def _switch(graph: ir.Graph, anchor: ir.Node, flag: ir.Value, format: Format, scales: Mapping[str, Mapping[str, float]]) -> None:
    branches = [_branch(graph, anchor, format if quantized else None, scales) for quantized in (True, False)]
    switch = ir.node(
        "If", [flag], {"then_branch": branches[0], "else_branch": branches[1]}, name=f"switch_{anchor.name}"
    )
    old = anchor.outputs[0]
    new = switch.outputs[0]
    new.name, new.type, new.shape = f"{old.name}_switched", old.type, old.shape
    graph.insert_before(anchor, switch)
    if old.is_graph_output():
        name = old.name
        old.name, new.name = f"{name}_plain", name
        for i, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[i] = new
    old.replace_all_uses_with(new)
    graph.remove(anchor, safe=True)


def _branch(graph: ir.Graph, anchor: ir.Node, format: Format | None, scales: Mapping[str, Mapping[str, float]]) -> ir.Graph:
    inner: list[ir.Node] = []
    inputs = list(anchor.inputs)
    if format is not None:
        for i in (0, 1):
            inputs[i] = _quantized_operand(graph, anchor, i, format, scales, inner)
    label = format.name if format else "plain"
    copy = ir.Node("", anchor.op_type, inputs, [a for a in anchor.attributes.values()], name=f"{anchor.name}_{label}")
    copy.outputs[0].name = f"{anchor.outputs[0].name}_{label}"
    copy.outputs[0].type = anchor.outputs[0].type
    copy.outputs[0].shape = anchor.outputs[0].shape
    return ir.Graph([], [copy.outputs[0]], nodes=[*inner, copy], name=f"{anchor.name}_{label}_branch")


def _quantized_operand(
    graph: ir.Graph, anchor: ir.Node, i: int, format: Format, scales: Mapping[str, Mapping[str, float]], inner: list[ir.Node]
) -> ir.Value | None:
    value = anchor.inputs[i]
    weight = constant(value)
    if value is None:
        return None
    if weight is not None:
        axis = weight_axis(anchor)
        codes, scale = quantize_weight(weight, axis=axis, format=format, base=FP32)
        return _initializer(graph, f"{value.name}_{format.name}_{anchor.name}", decode(codes, scale, axis=axis))
    scale_value = _initializer(graph, f"{anchor.name}_{i}_scale", np.array(scales[value.name or ""][format.name], np.float32))
    zero = _initializer(graph, f"{anchor.name}_{i}_zero", np.zeros((), np.int8), getattr(ir.DataType, format.onnx_type))
    quantize = ir.node("QuantizeLinear", [value, scale_value, zero], name=f"{anchor.name}_{i}_q")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale_value, zero], name=f"{anchor.name}_{i}_dq")
    for node in (quantize, dequantize):
        node.outputs[0].name = f"{node.name}_out"
    inner.extend((quantize, dequantize))
    return dequantize.outputs[0]


def _initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    if dtype == ir.DataType.FLOAT8E4M3FN:
        import ml_dtypes

        array = array.astype(ml_dtypes.float8_e4m3fn)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
