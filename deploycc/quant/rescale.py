"""Which channels behind a normalization to make smaller, and by how much, so that one INT8 scale serves all of them better.

For every site (``deploycc.core.rescaling``) the outlier channels are brought down to tau = mean(m) + k std(m), where m is the largest
magnitude of each channel, and channels are centred on zero if every reader can make up for it. k and the centring are searched for
the least error of the readers' outputs with both operands in INT8; what gains too little is left alone.
(LRP-QViT, arXiv 2401.11243, clips per-channel scales instead, which needs one activation scale per channel.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.dimensions import Dim, dimensions, product
from deploycc.core.formats import INT8, Format
from deploycc.core.graph import add_initializer, append_node, reduction
from deploycc.core.quantizers import activation_scale, decode, encode, largest_code, quantize_weight
from deploycc.core.rescaling import Rescale, Site, find_site
from deploycc.quant.clipping import clip_limit
from deploycc.quant.observers import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deploycc.core.backend import Reference
    from deploycc.core.data import Dataset

THRESHOLDS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
LEAST_SCALE = 1e-3
LEAST_GAIN_DB = 0.5
SAMPLES = 32
ROWS = 512


@dataclass(frozen=True)
class Channels:
    """What is known of the values at one site: extremes per channel ``[C]`` over everything, and rows ``[rows, C]`` of a sample."""

    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray


def find_rescales(
    model: ir.Model,
    data: Dataset,
    *,
    base: Format,
    reference: Reference,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Rescale]:
    """Return scale and shift of every site where the measured error of the readers falls by at least ``LEAST_GAIN_DB``.

    Args:
        model: the CANONICAL graph in FP32; it is not changed.
        data: calibration data, of which at most ``SAMPLES`` are used.
        base: the floating-point format, in which scales are rounded.
        reference: executes the graph.
        batch: samples per run; the result does not depend on it.
        progress: called with samples done and in all.
    """
    sites = _sites(model)
    if not sites:
        return {}
    seen = _observe(model, sites, data.take(SAMPLES), reference, batch, progress)
    found = {site.source.name or "": _choose(site, channels, base) for site, channels in zip(sites, seen, strict=True)}
    return {name: rescale for name, rescale in found.items() if rescale is not None}


def _sites(model: ir.Model) -> list[Site]:
    found: dict[str, Site] = {}
    for node in model.graph:
        site = find_site(node)
        if isinstance(site, Site) and site.source.name:
            found.setdefault(site.source.name, site)
    return list(found.values())


def _observe(
    model: ir.Model, sites: Sequence[Site], data: Dataset, reference: Reference, batch: int, progress: Callable[[int, int], None]
) -> list[Channels]:
    """Run the data once; extremes and a strided sample of rows leave the runtime, not the maps."""
    rows = max(1, ROWS // max(1, data.samples))
    watched, names = _with_probes(model, sites, rows)
    run, done = reference.executor(watched), 0
    lows, highs, samples = ([[] for _ in sites] for _ in range(3))  # type: ignore[var-annotated]
    for feeds in data.batches(batch):
        outputs = run(feeds, [n for each in names for n in each])
        for i, (low, high, sample) in enumerate(names):
            lows[i].append(outputs[low])
            highs[i].append(outputs[high])
            samples[i].append(outputs[sample].reshape(-1, sites[i].channels))
        done += len(next(iter(feeds.values())))
        progress(done, data.samples)
    return [
        Channels(np.min(low, axis=0), np.max(high, axis=0), np.concatenate(sample))
        for low, high, sample in zip(lows, highs, samples, strict=True)
    ]


def _with_probes(model: ir.Model, sites: Sequence[Site], rows: int) -> tuple[ir.Model, list[tuple[str, str, str]]]:
    """Return a clone with three more outputs per site: lowest and highest per channel, and some rows of each image."""
    clone = model.clone()
    graph = clone.graph
    values = {v.name: v for node in graph for v in node.outputs}
    names: list[tuple[str, str, str]] = []
    for i, site in enumerate(sites):
        value, size = values[site.value.name], len(site.value.shape or ())
        others = [a for a in range(size) if a != site.axis]
        outputs = [append_node(graph, reduction(op, value, others, graph, f"channels_{i}_{op}")) for op in ("ReduceMin", "ReduceMax")]
        last = value
        if site.axis != size - 1:
            last = append_node(graph, ir.node("Transpose", [value], {"perm": [*others, site.axis]}, name=f"channels_{i}_last"))
        positions = _positions(site, _batch_of(graph))
        shape = add_initializer(graph, f"channels_{i}_shape", np.array([-1, positions, site.channels], np.int64))
        flat = append_node(graph, ir.node("Reshape", [last, shape], name=f"channels_{i}_flat"))
        bounds = [
            add_initializer(graph, f"channels_{i}_{k}", np.array([v], np.int64)) for k, v in (("start", 0), ("end", 2**62), ("axis", 1))
        ]
        step = add_initializer(graph, f"channels_{i}_step", np.array([max(1, positions // rows)], np.int64))
        outputs.append(append_node(graph, ir.node("Slice", [flat, *bounds, step], name=f"channels_{i}_rows")))
        graph.outputs.extend(outputs)
        names.append((outputs[0].name or "", outputs[1].name or "", outputs[2].name or ""))
    return clone, names


def _batch_of(graph: ir.Graph) -> int:
    """Return how many images a run takes where that is fixed, else 1."""
    first = graph.inputs[0].shape
    size = first[0] if first is not None and len(first) else 1
    return size if isinstance(size, int) else 1


def _positions(site: Site, batch: int) -> int:
    """Return how many rows of channels one image has; 1 where that is not known, so that every row is taken."""
    sizes = dimensions(site.value)
    total = product(d for a, d in enumerate(sizes) if a != site.axis) if sizes is not None else 1
    if isinstance(total, Dim):
        return total.terms[0][1] if len(total.terms) == 1 and len(total.terms[0][0]) == 1 else 1
    return max(1, total // batch)


def _choose(site: Site, channels: Channels, base: Format) -> Rescale | None:
    """Return the best rescale of one site, or None where nothing gains enough."""
    weight = np.concatenate([reader.matrix() for reader in site.readers], axis=1).astype(np.float32)
    exact = channels.rows @ weight
    power = float(np.sum(exact**2))
    if not np.isfinite(power) or power == 0.0:
        return None
    plain = float(np.sum((_quantized(channels.rows, channels, base) @ _quantized_weight(weight, base) - exact) ** 2))
    if plain == 0.0:
        return None
    best = min(_trials(site, channels), key=lambda trial: _estimate(weight, channels, trial, base))
    scale, shift = _arrays(best)
    moved = _moved(channels, scale, shift)
    built = _quantized(moved.rows, moved, base) @ _quantized_weight(weight / scale[:, None], base) + shift @ weight
    gain = 10 * np.log10(plain / max(float(np.sum((built - exact) ** 2)), 1e-300))
    return Rescale(best.scale, best.shift, best.k, round(float(gain), 2)) if gain >= LEAST_GAIN_DB else None


def _trials(site: Site, channels: Channels) -> list[Rescale]:
    shift = _short((channels.high + channels.low) / 2) if site.is_centrable else np.zeros(site.channels)
    limit = np.maximum(channels.high - shift, shift - channels.low)
    found = []
    for k in THRESHOLDS:
        tau = limit.mean() + k * limit.std()
        scale = _short(np.clip(tau / np.maximum(limit, 1e-30), LEAST_SCALE, 1.0))
        found.append(Rescale(tuple(scale.tolist()), tuple(shift.tolist()), k))
    return found


def _arrays(rescale: Rescale) -> tuple[np.ndarray, np.ndarray]:
    return np.array(rescale.scale, np.float32), np.array(rescale.shift, np.float32)


def _short(values: np.ndarray) -> np.ndarray:
    """Round to four digits, so that the plan stays readable; any numbers will do, since the rewrite is exact for all."""
    return np.array([float(f"{v:.4g}") for v in values])


def _moved(channels: Channels, scale: np.ndarray, shift: np.ndarray) -> Channels:
    return Channels((channels.low - shift) * scale, (channels.high - shift) * scale, (channels.rows - shift) * scale)


def _estimate(weight: np.ndarray, channels: Channels, trial: Rescale, base: Format) -> float:
    """Return the expected error energy per row: that of the activations through the weights, and that of the weights.

    sum over c of E[(x_c - q(x_c))^2] |W_c|^2 + E[|x|^2] sum over o of step_o^2 / 12: errors of different channels are taken as
    uncorrelated, and the rounding of weights as uniform over a step.
    """
    scale, shift = _arrays(trial)
    moved, heavier = _moved(channels, scale, shift), weight / scale[:, None]
    noise = np.mean((_quantized(moved.rows, moved, base) - moved.rows) ** 2, axis=0)
    steps = np.abs(heavier).max(axis=0) / largest_code(INT8)
    return float(noise @ np.einsum("co,co->c", heavier, heavier) + np.mean(np.sum(moved.rows**2, axis=1)) * np.sum(steps**2) / 12)


def _quantized(rows: np.ndarray, channels: Channels, base: Format) -> np.ndarray:
    """Return rows in INT8 and back, with the scale that calibration would find."""
    observer = Observer()
    observer.extend(float(channels.low.min()), float(channels.high.max()))
    observer.histogram.add(np.abs(rows).reshape(-1))
    scale = np.array(activation_scale(clip_limit(observer, INT8), INT8, base), np.float32)
    return decode(encode(rows, scale, INT8), scale)


def _quantized_weight(weight: np.ndarray, base: Format) -> np.ndarray:
    codes, scale = quantize_weight(weight, axis=1, format=INT8, base=base)
    return decode(codes, scale, axis=1)
