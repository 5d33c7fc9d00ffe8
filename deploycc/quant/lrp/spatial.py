"""Pooling, resizing and sampling in torch, with ONNX's coordinates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from deploycc.core.graph import attribute, float_attribute, int_attribute, ints_attribute
from deploycc.quant.lrp.movement import integers
from deploycc.quant.lrp.operators import Inputs, given, operator, present
from deploycc.quant.lrp.windows import pooling_window

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

_MAX_POOL = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGE_POOL = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


@operator("MaxPool")
def _max_pool(node: ir.Node, inputs: Inputs) -> Tensor:
    x = present(inputs)[0]
    window, pads = pooling_window(node, x)
    padded = functional.pad(x, pads, value=-math.inf) if any(pads) else x
    return _MAX_POOL[x.ndim - 3](padded, window.kernel, window.strides, 0, window.dilations)


@operator("AveragePool")
def _average_pool(node: ir.Node, inputs: Inputs) -> Tensor:
    """The mean over what lies in the window; padding counts only where ``count_include_pad`` says so, that of ``ceil_mode`` never."""
    x = present(inputs)[0]
    window, pads = pooling_window(node, x)
    pool = _AVERAGE_POOL[x.ndim - 3]
    if max(window.dilations, default=1) > 1:
        raise NotImplementedError("an average pooling with dilations")
    mean = pool(functional.pad(x, pads) if any(pads) else x, window.kernel, window.strides)
    if not any(pads):
        return mean
    counted = torch.ones_like(x[:1, :1])
    asked = [size for b, a in zip(reversed(window.before), reversed(window.after), strict=True) for size in (b, a)]
    if int_attribute(node, "count_include_pad", 0):
        counted, pads = functional.pad(counted, asked, value=1.0), [p - a for p, a in zip(pads, asked, strict=True)]
    return mean / pool(functional.pad(counted, pads), window.kernel, window.strides)


@operator("GlobalAveragePool")
def _global_average_pool(node: ir.Node, inputs: Inputs) -> Tensor:
    x = present(inputs)[0]
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(node: ir.Node, inputs: Inputs) -> Tensor:
    x = present(inputs)[0]
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


@operator("GridSample")
def _grid_sample(node: ir.Node, inputs: Inputs) -> Tensor:
    x, grid = present(inputs)
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(wanted := str(attribute(node, "mode", "linear")), wanted)
    padding, aligned = str(attribute(node, "padding_mode", "zeros")), bool(int_attribute(node, "align_corners", 0))
    return functional.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=aligned)


@operator("Resize")
def _resize(node: ir.Node, inputs: Inputs) -> Tensor:
    """Interpolate axis by axis, which equals ONNX's definition since its weights are products over the axes."""
    x, scales, sizes = present(inputs)[0], given(inputs, 2), integers(given(inputs, 3))
    axes = [a % x.ndim for a in ints_attribute(node, "axes") or range(x.ndim)]
    if attribute(node, "antialias", 0) or attribute(node, "exclude_outside", 0):
        raise NotImplementedError("a Resize with antialias or exclude_outside")
    if str(attribute(node, "keep_aspect_ratio_policy", "stretch")) != "stretch":
        raise NotImplementedError("a Resize that keeps the aspect ratio")
    factors = [float(s) for s in scales.reshape(-1).tolist()] if scales is not None and scales.numel() else None
    for i, axis in enumerate(axes):
        size = x.shape[axis]
        target = math.floor(size * factors[i]) if factors else sizes[i]
        if (factor := factors[i] if factors else target / size) != 1.0:
            x = _interpolated(node, x, axis, target, factor)
    return x


def _interpolated(node: ir.Node, x: Tensor, axis: int, target: int, factor: float) -> Tensor:
    size, mode = x.shape[axis], str(attribute(node, "mode", "nearest"))
    place = _coordinates(str(attribute(node, "coordinate_transformation_mode", "half_pixel")), size, target, factor)
    if mode == "nearest":
        return x.index_select(axis, _nearest(place, str(attribute(node, "nearest_mode", "round_prefer_floor"))).clamp(0, size - 1))
    low = torch.floor(place)
    if mode == "linear":
        taps = {0: 1 - (place - low), 1: place - low}
    else:
        taps = _cubic(place - low, float_attribute(node, "cubic_coeff_a", -0.75))
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    parts = [x.index_select(axis, (low.long() + k).clamp(0, size - 1)) * weight.to(x.dtype).reshape(shape) for k, weight in taps.items()]
    return torch.stack(parts).sum(0)


def _coordinates(mode: str, size: int, target: int, factor: float) -> Tensor:
    """Return where in the input each output element lies, in float64."""
    out = torch.arange(target, dtype=torch.float64)
    if mode == "asymmetric":
        return out / factor
    if mode == "align_corners":
        return out * (size - 1) / (target - 1) if target > 1 else out * 0.0
    if mode == "pytorch_half_pixel" and target == 1:
        return out * 0.0
    if mode == "half_pixel_symmetric":
        adjustment = target / (factor * size)
        return (size / 2) * (1 - adjustment) + (out + 0.5) / factor - 0.5
    if mode in {"half_pixel", "pytorch_half_pixel"}:
        return (out + 0.5) / factor - 0.5
    raise NotImplementedError(f"a Resize with coordinates '{mode}'")


def _nearest(place: Tensor, mode: str) -> Tensor:
    rounding: dict[str, Callable[[Tensor], Tensor]] = {
        "round_prefer_floor": lambda p: torch.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: torch.floor(p + 0.5),
        "floor": torch.floor,
        "ceil": torch.ceil,
    }
    return rounding[mode](place).long()


def _cubic(t: Tensor, a: float) -> dict[int, Tensor]:
    """Return the weights of Keys' cubic convolution for the taps at -1, 0, 1 and 2."""

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
