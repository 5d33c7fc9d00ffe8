"""Which channels behind a normalization to make smaller, and by how much, so that one INT8 scale serves all of them better.

For every site (``deploycc.core.rescaling``) the outlier channels are brought down to tau = mean(m) + k std(m), where m is the largest
magnitude of each channel, and channels are centred on zero if every reader can make up for it. k and the centring are searched for
the least error of the readers' outputs with both operands in INT8; what gains too little is left alone.
(LRP-QViT, arXiv 2401.11243, clips per-channel scales instead, which needs one activation scale per channel.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.formats import INT8, Format
from deploycc.core.quantizers import activation_scale, decode, encode, largest_code, quantize_weight
from deploycc.core.rescaling import Rescale, Site, find_site
from deploycc.quant.clipping import clip_limit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from deploycc.quant.calibrate import Statistics
    from deploycc.quant.observers import Channels

THRESHOLDS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
LEAST_SCALE = 1e-3
LEAST_GAIN_DB = 0.5
_KEEPS_ALL = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def find_sites(model: ir.Model) -> list[Site]:
    """Return where channels of the CANONICAL graph ``model`` can be made smaller."""
    found: dict[str, Site] = {}
    for node in model.graph:
        site = find_site(node)
        if isinstance(site, Site) and site.source.name and len(site.value.shape or ()) > 1:
            found.setdefault(site.source.name, site)
    return list(found.values())


def find_rescales(sites: Sequence[Site], seen: Statistics, *, base: Format) -> dict[str, Rescale]:
    """Return scale and shift of every site where the measured error of the readers falls by at least ``LEAST_GAIN_DB``.

    Args:
        sites: of the graph that was observed.
        seen: of calibration data, with the channels of every site.
        base: the floating-point format, in which scales are rounded.
    """
    found = {site.source.name or "": _choose(site, seen.channels[site.value.name or ""], base) for site in sites}
    return {name: rescale for name, rescale in found.items() if rescale is not None}


def channels_of(sites: Sequence[Site], ranges: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return axis and number of channels of the values to observe: those of the sites, and of ``ranges`` what holds only part of one."""
    found = {}
    for site in sites:
        whole = _whole(site)
        watched = [(v, axis) for v, axis in site.carriers if v is site.value or (v.name in ranges and v not in whole)]
        found.update({v.name or "": (axis, site.channels) for v, axis in watched})
    return found


def rescaled(seen: Statistics, sites: Sequence[Site], rescales: Mapping[str, Rescale]) -> Statistics:
    """Return what is known of the rescaled graph without another pass. Where no site's channels go, it computes what it did before."""
    observers = dict(seen.observers)
    for site in sites:
        if (rescale := rescales.get(site.source.name or "")) is None:
            continue
        whole = _whole(site)
        for value, _ in site.carriers:
            if value.name in observers:
                channels = seen.channels[(site.value if value in whole else value).name or ""]
                observers[value.name] = channels.moved(*_arrays(rescale)).observer()
    return replace(seen, observers=observers, channels={})


def _whole(site: Site) -> set[ir.Value]:
    """Return the carriers that hold every element of the site's value and nothing else."""
    found = {site.value}
    for value, _ in site.carriers:
        node = value.producer()
        if node is not None and node.op_type in _KEEPS_ALL and node.inputs[0] in found:
            found.add(value)
    return found


def _choose(site: Site, channels: Channels, base: Format) -> Rescale | None:
    """Return the best rescale of one site, or None where nothing gains enough."""
    weight = np.concatenate([reader.matrix() for reader in site.readers], axis=1).astype(np.float32)
    exact = channels.rows @ weight
    power = float(np.sum(exact**2))
    if not np.isfinite([power, *channels.low, *channels.high]).all() or power == 0.0:
        return None
    plain = float(np.sum((_quantized(channels.rows, channels, base) @ _quantized_weight(weight, base) - exact) ** 2))
    if plain == 0.0:
        return None
    best = min(_trials(site, channels), key=lambda trial: _estimate(weight, channels, trial, base))
    scale, shift = _arrays(best)
    moved = channels.moved(scale, shift)
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


def _estimate(weight: np.ndarray, channels: Channels, trial: Rescale, base: Format) -> float:
    """Return the expected error energy per row: that of the activations through the weights, and that of the weights.

    sum over c of E[(x_c - q(x_c))^2] |W_c|^2 + E[|x|^2] sum over o of step_o^2 / 12: errors of different channels are taken as
    uncorrelated, and the rounding of weights as uniform over a step.
    """
    scale, shift = _arrays(trial)
    moved, heavier = channels.moved(scale, shift), weight / scale[:, None]
    noise = np.mean((_quantized(moved.rows, moved, base) - moved.rows) ** 2, axis=0)
    steps = np.abs(heavier).max(axis=0) / largest_code(INT8)
    return float(noise @ np.einsum("co,co->c", heavier, heavier) + np.mean(np.sum(moved.rows**2, axis=1)) * np.sum(steps**2) / 12)


def _quantized(rows: np.ndarray, channels: Channels, base: Format) -> np.ndarray:
    """Return rows in INT8 and back, with the scale that calibration would find."""
    scale = np.array(activation_scale(clip_limit(channels.observer(), INT8), INT8, base), np.float32)
    return decode(encode(rows, scale, INT8), scale)


def _quantized_weight(weight: np.ndarray, base: Format) -> np.ndarray:
    codes, scale = quantize_weight(weight, axis=1, format=INT8, base=base)
    return decode(codes, scale, axis=1)
