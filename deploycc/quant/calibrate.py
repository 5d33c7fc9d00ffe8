"""Collect ranges of activations in one streamed pass over the data, inside the executing graph.

For every observed value the graph gets a ``ReduceMin``, a ``ReduceMax`` and a strided sample per image, so that only scalars
and small samples leave the runtime, whatever the size of the maps. Memory does not grow with the number of images. Where channels are
asked for, the extremes of each leave it as well, and rows of channels, of which those of some images are kept.
Maps between convolutions are observed by pooling: ONNX Runtime keeps them in blocks of channels, in which it also pools, while any
other operator has the whole map rearranged first, and that took longer than the observation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.dimensions import Dim, dimensions, product
from deploycc.core.errors import UsageError
from deploycc.core.graph import FLOAT_TYPES, add_initializer, float_attribute, reduction, scalar
from deploycc.quant.observers import Channels, Observer
from deploycc.quant.regions import MOVES

if TYPE_CHECKING:
    from deploycc.core.backend import Reference
    from deploycc.core.data import Dataset

SAMPLE_PER_ROW = 1024
# Of the values whose channels are observed: rows of at least so many positions and elements, of so many images evenly spaced.
POSITIONS, ELEMENTS, IMAGES = 16, 2048, 32
LEAST_POSITIONS = 6  # along the shorter side of a map
NON_NEGATIVE = frozenset({"Relu", "Softmax", "Sigmoid", "Abs", "HardSigmoid"})
KEEPS_SIGN = MOVES | {"AveragePool", "GlobalAveragePool", "ReduceMean"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Statistics:
    """Observers and channels by value name, and where they come from; ``cached`` if an earlier build observed them."""

    observers: dict[str, Observer]
    samples: int
    seconds: float
    cached: bool = False
    channels: dict[str, Channels] = field(default_factory=dict)

    def __or__(self, other: Statistics) -> Statistics:
        """Return these observers and those of another pass over the same data."""
        return replace(self, observers=self.observers | other.observers, seconds=self.seconds + other.seconds, cached=False)


def calibrate(
    model: ir.Model,
    data: Dataset,
    *,
    ranges: Sequence[str],
    extremes: Sequence[str] = (),
    channels: Mapping[str, tuple[int, int]] | None = None,
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
        channels: axis and number of channels of values whose channels are observed one by one as well.
        reference: executes the graph.
        batch: samples per run; the result does not depend on it.
        progress: called with samples done and in all.

    Raises:
        UsageError: when one of ``ranges`` is infinite, or NaN among its sampled elements; the value is named.
    """
    start = time.perf_counter()
    watches = {name: _Watch(axis, size, data.samples) for name, (axis, size) in (channels or {}).items()}
    watched, probes = _with_probes(model, ranges, extremes, watches)
    observers = {name: Observer() for name in dict.fromkeys((*ranges, *extremes))}
    run, done = reference.executor(watched), 0
    for feeds in data.batches(batch):
        outputs, images = run(feeds, list(probes)), len(next(iter(feeds.values())))
        for output, (name, what) in probes.items():
            if name in watches:
                watches[name].take(what, outputs[output], range(done, done + images))
            if name in observers and what != "rows":
                _take(observers[name], name, what, outputs[output], finite_only=name in ranges)
        done += images
        progress(done, data.samples)
    seen = {name: watch.channels() for name, watch in watches.items()}
    return Statistics(observers, done, time.perf_counter() - start, channels=seen)


class _Watch:
    """Gathers what is seen of the channels of one value: extremes of all images, and rows of some."""

    def __init__(self, axis: int, size: int, samples: int) -> None:
        self.axis, self.size = axis, size
        self.every = -(-samples // IMAGES)
        self.rows = int(max(POSITIONS, ELEMENTS // size) * max(1.0, IMAGES / max(1, samples)))
        self.seen: dict[str, list[np.ndarray]] = {"lowest": [], "highest": [], "rows": []}

    def take(self, what: str, value: np.ndarray, images: range) -> None:
        """Take in one output of a batch of ``images``."""
        if what == "sample" or value.size == 0:
            return
        by_channel, before = value.reshape(-1, self.size), self.seen[what]
        if what == "rows":
            before.append(self._some(by_channel, [i for i, image in enumerate(images) if image % self.every == 0], len(images)))
        else:
            before[:] = [(np.min if what == "lowest" else np.max)([*before, *by_channel], axis=0)]

    def channels(self) -> Channels:
        """Return what was seen: no rows and no extremes, the lowest above the highest, where there was nothing."""
        nothing = np.zeros((0, self.size), np.float32)
        low, high = (np.array([*nothing, *self.seen[what]]).reshape(-1, self.size) for what in ("lowest", "highest"))
        rows = np.concatenate([nothing, *self.seen["rows"]])
        return Channels(low.min(axis=0, initial=np.inf), high.max(axis=0, initial=-np.inf), rows)

    def _some(self, rows: np.ndarray, chosen: Sequence[int], images: int) -> np.ndarray:
        """Return a copy of about ``self.rows`` rows of each chosen image, or of as many rows of all where they do not divide by images."""
        if len(rows) % images:
            return rows[:: max(1, len(rows) // (self.rows * len(chosen)))].copy() if chosen else rows[:0].copy()
        by_image = rows.reshape(images, -1, self.size)[list(chosen)]
        return by_image[:, :: max(1, by_image.shape[1] // self.rows)].reshape(-1, self.size).copy()


def _take(observer: Observer, name: str, what: str, value: np.ndarray, *, finite_only: bool) -> None:
    if what == "sample":
        magnitudes = np.abs(value.astype(np.float32, copy=False))
        # The runtime's minimum and maximum pass over NaN, so it is looked for here.
        if np.isnan(magnitudes.max(initial=0.0)):
            raise _not_finite(name, math.nan)
        observer.histogram.add(magnitudes)
        return
    if value.size == 0:  # There may be none of what is counted by the data.
        return
    number = float(value.min() if what == "lowest" else value.max())
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


def _with_probes(
    model: ir.Model, ranges: Sequence[str], extremes: Sequence[str], watches: Mapping[str, _Watch]
) -> tuple[ir.Model, dict[str, tuple[str, str]]]:
    """Return a clone with probe outputs, and what each probe output is: ``{output: (value, kind)}``."""
    clone = model.clone()
    values = {v.name: v for v in clone.graph.inputs} | {v.name: v for node in clone.graph for v in node.outputs}
    probes: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys((*ranges, *extremes, *watches)):
        value = values[name]
        if value.dtype not in FLOAT_TYPES:
            raise TypeError(f"'{name}' is {value.dtype}, and only floating-point values have ranges")
        probe = _Probe(clone.graph, value, f"probe_{len(probes)}")
        found = probe.channels(watches[name]) if name in watches else probe.extremes()
        for what, output in (found | (probe.sample() if name in ranges else {})).items():
            clone.graph.outputs.append(output)
            probes[output.name or ""] = (name, what)
    return clone, probes


class _Probe:
    """Nodes that observe one value, each right behind the one before, so that they run while the value is in the cache."""

    def __init__(self, graph: ir.Graph, value: ir.Value, name: str) -> None:
        self.graph, self.value, self.name = graph, value, name
        self.last, self.count = value.producer(), 0

    def extremes(self) -> dict[str, ir.Value]:
        """Return the lowest and highest of the value, or of parts of it; the lowest only where it may be negative."""
        if _is_non_negative(self.value):
            return {"highest": self._put("GlobalMaxPool", self.value) if _map_sizes(self.value) else self._reduced("ReduceMax")}
        return {"lowest": self._reduced("ReduceMin"), "highest": self._reduced("ReduceMax")}

    def channels(self, watch: _Watch) -> dict[str, ir.Value]:
        """Return the lowest and highest of each channel, and some rows of channels of each image."""
        last, axis = len(self.value.shape or ()) - 1, watch.axis
        others = [a for a in range(last + 1) if a != axis]
        within = [a for a in others if a] or others
        found = {
            what: self._behind(reduction(op, self.value, within, self.graph, f"{self.name}_{op}"))
            for what, op in (("lowest", "ReduceMin"), ("highest", "ReduceMax"))
        }
        value = self._put("Transpose", self.value, perm=[*others, axis]) if axis != last else self.value
        count = self._positions(axis)
        shape = add_initializer(self.graph, f"{self.name}_shape", np.array([-1, count, watch.size], np.int64))
        return {**found, "rows": self._sliced(self._put("Reshape", value, shape), [0], [1], max(1, count // watch.rows))}

    def _positions(self, axis: int) -> int:
        """Return how many rows of channels one image has; 1 where that is not known, so that every row is taken."""
        sizes = dimensions(self.value)
        total = product(d for a, d in enumerate(sizes) if a != axis) if sizes is not None else 1
        if isinstance(total, Dim):
            return total.terms[0][1] if len(total.terms) == 1 and len(total.terms[0][0]) == 1 else 1
        first = self.graph.inputs[0].shape
        batch = first[0] if first is not None and len(first) else 1
        return max(1, total // batch) if isinstance(batch, int) else max(1, total)

    def sample(self) -> dict[str, ir.Value]:
        """Return every k-th element of each image; k has no common factor with their number, so that no channel is favoured."""
        sizes = _map_sizes(self.value)
        value = self._thinned(sizes) if sizes is not None else self.value
        shape = list(value.shape) if value.shape is not None else []
        axis = _batch_axis(self.graph, shape)
        row = math.prod(d for i, d in enumerate(shape) if i != axis and isinstance(d, int))
        stride = max(1, row // SAMPLE_PER_ROW)
        while stride > 1 and math.gcd(stride, max(row, 1)) != 1:
            stride += 1
        if axis:
            value = self._put("Transpose", value, perm=[axis, *(i for i in range(len(shape)) if i != axis)])
        return {"sample": self._sliced(self._put("Flatten", value, axis=1), [0], [1], stride)}

    def _thinned(self, sizes: tuple[int, int, int]) -> ir.Value:
        """Return a grid of positions of a map, with at least four times ``SAMPLE_PER_ROW`` elements per image; a small map as it is.

        An average over windows of one element keeps NaN, which a maximum may pass over. Every other position gives the border its due;
        of a coarser grid the first row and column are left out, since the border would be a larger part of it than of the map.
        """
        channels, height, width = sizes
        step = min(height, width) // LEAST_POSITIONS
        while step > 1 and channels * (height // step) * (width // step) < 4 * SAMPLE_PER_ROW:
            step -= 1
        if step <= 1:
            return self.value
        first = int(step > 2)
        inside = self._put("AveragePool", self.value, kernel_shape=[1, 1], strides=[step, step])
        if first:
            inside = self._sliced(inside, [1, 1], [2, 3])
        batch = self.value.shape[0] if self.value.shape is not None else None
        inside.shape = ir.Shape([batch, channels, *((size - 1) // step + 1 - first for size in (height, width))])
        return inside

    def _reduced(self, op: str) -> ir.Value:
        """Return the extremes of each image: two images are searched at the same time, one value is not."""
        size = len(self.value.shape or ())
        return self._behind(reduction(op, self.value, range(int(size > 1), size), self.graph, f"{self.name}_{op}"))

    def _sliced(self, value: ir.Value, starts: Sequence[int], axes: Sequence[int], step: int = 1) -> ir.Value:
        bounds = (starts, [2**62] * len(axes), axes, [step] * len(axes))
        return self._put(
            "Slice",
            value,
            *(add_initializer(self.graph, f"{self.name}_{self.count}_{i}", np.array(b, np.int64)) for i, b in enumerate(bounds)),
        )

    def _put(self, op: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        return self._behind(ir.node(op, inputs, attributes, name=f"{self.name}_{self.count}"))  # type: ignore[arg-type]

    def _behind(self, node: ir.Node) -> ir.Value:
        if self.last is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(self.last, node)
        output = node.outputs[0]
        output.name, output.type = f"{node.name}_out", self.value.type
        self.last, self.count = node, self.count + 1
        return output


def _is_non_negative(value: ir.Value) -> bool:
    """Return whether no element can be below zero: by the operator that makes it, or the one before those that move or average."""
    node = value.producer()
    while node is not None and node.op_type in KEEPS_SIGN and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None:
        return False
    if node.op_type == "Clip":
        lowest = scalar(node.inputs[1]) if len(node.inputs) > 1 else float_attribute(node, "min", -math.inf)
        return lowest is not None and lowest >= 0.0
    return node.op_type in NON_NEGATIVE


def _map_sizes(value: ir.Value) -> tuple[int, int, int] | None:
    """Return channels, height and width of ``[batch, channels, height, width]`` in FP32 beside a convolution; None of anything else."""
    if value.dtype != ir.DataType.FLOAT or value.shape is None or len(value.shape) != 4:
        return None
    beside = (value.producer(), *(use.node for use in value.uses()))
    sizes = [d for d in value.shape[1:] if isinstance(d, int)]
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 and any(n is not None and n.op_type == "Conv" for n in beside) else None


def _batch_axis(graph: ir.Graph, shape: Sequence[object]) -> int:
    """Return the axis that counts images: the one named like the batch of an input, else the first."""
    names = {str(v.shape[0]) for v in graph.inputs if v.shape is not None and len(v.shape) and not isinstance(v.shape[0], int)}
    return next((i for i, d in enumerate(shape) if str(d) in names), 0)
