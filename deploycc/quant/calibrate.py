"""Collect ranges of activations in one streamed pass over the data, inside the executing graph.

For every observed value the graph gets a ``ReduceMin``, a ``ReduceMax`` and a strided sample per image, so that only scalars
and small samples leave the runtime, whatever the size of the maps. Memory does not grow with the number of images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.errors import UsageError
from deploycc.core.graph import FLOAT_TYPES, add_initializer, append_node
from deploycc.quant.observers import Observer

if TYPE_CHECKING:
    from deploycc.core.backend import Reference
    from deploycc.core.data import Dataset

SAMPLE_PER_ROW = 512
NON_NEGATIVE = frozenset({"Relu", "Softmax", "Sigmoid", "Abs", "HardSigmoid"})
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Statistics:
    """Observers by value name, and where they come from; ``cached`` if an earlier build observed them."""

    observers: dict[str, Observer]
    samples: int
    seconds: float
    cached: bool = False


def calibrate(
    model: ir.Model,
    data: Dataset,
    *,
    ranges: Sequence[str],
    extremes: Sequence[str] = (),
    reference: Reference,
    batch: int = 8,
    progress: Progress = lambda done, total: None,
) -> Statistics:
    """Run the data through ``model`` once and observe values.

    Args:
        model: a CANONICAL graph in FP32; it is not changed.
        data: batches of inputs.
        ranges: names of values that need extremes and a histogram.
        extremes: names of values that need extremes only.
        reference: executes the graph.
        batch: samples per run; the result does not depend on it.
        progress: called with samples done and in all.

    Raises:
        UsageError: when one of ``ranges`` is infinite, or NaN among its sampled elements; the value is named.
    """
    start = time.perf_counter()
    watched, probes = _with_probes(model, ranges, extremes)
    observers = {name: Observer() for name in dict.fromkeys((*ranges, *extremes))}
    run, done = reference.executor(watched), 0
    for feeds in data.batches(batch):
        outputs = run(feeds, list(probes))
        for output, (name, what) in probes.items():
            _take(observers[name], name, what, outputs[output], finite_only=name in ranges)
        done += len(next(iter(feeds.values())))
        progress(done, data.samples)
    return Statistics(observers, done, time.perf_counter() - start)


def _take(observer: Observer, name: str, what: str, value: np.ndarray, *, finite_only: bool) -> None:
    if what == "sample":
        magnitudes = np.abs(value.astype(np.float32, copy=False))
        # The runtime's minimum and maximum pass over NaN, so it is looked for here.
        if np.isnan(magnitudes.sum()) and np.isnan(magnitudes).any():
            raise _not_finite(name, math.nan)
        observer.histogram.add(magnitudes)
        return
    number = float(value.reshape(-1)[0])
    if math.isnan(number) or (finite_only and math.isinf(number)):
        raise _not_finite(name, number)
    if math.isfinite(number):
        observer.extend(number, number)


def _not_finite(name: str, number: float) -> UsageError:
    return UsageError(
        f"the value '{name}' becomes {number} in calibration",
        at="the FP32 model itself, on the calibration data",
        fix="check the preprocessing of the data and the model's weights; nothing can be quantized around it",
    )


def _with_probes(model: ir.Model, ranges: Sequence[str], extremes: Sequence[str]) -> tuple[ir.Model, dict[str, tuple[str, str]]]:
    """Return a clone with probe outputs, and what each probe output is: ``{output: (value, kind)}``."""
    clone = model.clone()
    graph = clone.graph
    values = {v.name: v for v in graph.inputs} | {v.name: v for node in graph for v in node.outputs}
    probes: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys((*ranges, *extremes)):
        value = values[name]
        if value.dtype not in FLOAT_TYPES:
            raise TypeError(f"'{name}' is {value.dtype}, and only floating-point values have ranges")
        producer = value.producer()
        lowest = () if producer is not None and producer.op_type in NON_NEGATIVE else ("ReduceMin",)
        for op in (*lowest, "ReduceMax"):
            _probe(graph, probes, ir.node(op, [value], {"keepdims": 0}), name, op)
        if name in ranges:
            _add_sample(graph, probes, value, name)
    return clone, probes


def _probe(graph: ir.Graph, probes: dict[str, tuple[str, str]], node: ir.Node, name: str, what: str) -> None:
    node.name = f"probe_{len(probes)}"
    output = node.outputs[0]
    output.name = f"probe_{len(probes)}_{what}"
    output.type = node.inputs[0].type if node.inputs[0] is not None else None
    graph.append(node)
    graph.outputs.append(output)
    probes[output.name] = (name, what)


def _add_sample(graph: ir.Graph, probes: dict[str, tuple[str, str]], value: ir.Value, name: str) -> None:
    """Sample every k-th element of each image; k has no common factor with their number, so that no channel is favoured."""
    shape = list(value.shape) if value.shape is not None else []
    axis = _batch_axis(graph, shape)
    row = math.prod(d for i, d in enumerate(shape) if i != axis and isinstance(d, int))
    stride = max(1, row // SAMPLE_PER_ROW)
    while stride > 1 and math.gcd(stride, max(row, 1)) != 1:
        stride += 1
    flat = value
    if axis:
        order = [axis, *(i for i in range(len(shape)) if i != axis)]
        flat = append_node(graph, ir.node("Transpose", [flat], {"perm": order}, name=f"probe_turn_{len(probes)}"))
    flat = append_node(graph, ir.node("Flatten", [flat], {"axis": 1}, name=f"probe_flat_{len(probes)}"))
    bounds = [
        add_initializer(graph, f"probe_{len(probes)}_{k}", np.array([v], np.int64))
        for k, v in (("start", 0), ("end", 2**62), ("axis", 1), ("step", stride))
    ]
    _probe(graph, probes, ir.node("Slice", [flat, *bounds]), name, "sample")


def _batch_axis(graph: ir.Graph, shape: Sequence[object]) -> int:
    """Return the axis that counts images: the one named like the batch of an input, else the first."""
    names = {str(v.shape[0]) for v in graph.inputs if v.shape is not None and len(v.shape) and not isinstance(v.shape[0], int)}
    return next((i for i, d in enumerate(shape) if str(d) in names), 0)
