"""Graphs with pairs, in ONNX text, and what the lint finds in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from small_graphs import graph, weight

from deploycc.lint.linting import inspect

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.lint.findings import Finding

FP8 = ml_dtypes.float8_e4m3fn


def pair(value: str, scale: str = "s", zero: str = "z", *, out: str = "") -> str:
    """Return the text of a pair on ``value``; the dequantized value is ``<value>_d``, or ``out``."""
    name = out or f"{value}_d"
    return f"{name}q = QuantizeLinear({value}, {scale}, {zero}) {name} = DequantizeLinear({name}q, {scale}, {zero}) "


def stored(name: str = "w", axis: int = 0) -> str:
    """Return the text of a DequantizeLinear of the codes ``<name>q``."""
    return f"{name} = DequantizeLinear<axis={axis}>({name}q, {name}s, {name}z) "


def codes(*shape: int, axis: int | None = 0, name: str = "w", dtype: type = np.int8) -> dict[str, np.ndarray]:
    """Return codes with scales and zero points, per axis or (``axis`` None) per tensor."""
    size = () if axis is None else (shape[axis],)
    values = np.clip(np.rint(weight(*shape) * 40), -127, 127).astype(dtype)
    return {f"{name}q": values, f"{name}s": np.full(size, 0.025, np.float32), f"{name}z": np.zeros(size, dtype)}


SCALE = {"s": np.float32(0.05), "z": np.int8(0)}
HALF = {"s": np.float16(0.05), "z": np.int8(0)}


def quantized(text: str, opset: int = 21, **constants: np.ndarray | np.generic) -> ir.Model:
    """Return a graph with the scale ``s`` (0.05) and the zero point ``z`` (INT8) unless others are given."""
    return graph(text, opset=opset, **{name: np.asarray(array) for name, array in {**SCALE, **constants}.items()})


CONV = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { " + pair("x") + stored() + "y = Conv<pads=[1,1,1,1]>(x_d, w) }"


def conv(**constants: np.ndarray | np.generic) -> ir.Model:
    """Return a convolution as it should be quantized; ``constants`` take the place of its own."""
    return quantized(CONV, **{**codes(32, 16, 3, 3), **constants})


def findings(model: ir.Model, rule: str, **options: object) -> list[Finding]:
    """Return the findings of one rule."""
    return [f for f in inspect(model, name="model.onnx", **options).findings if f.rule == rule]  # type: ignore[arg-type]


def places(model: ir.Model, rule: str, **options: object) -> list[str]:
    """Return the nodes at which one rule finds something."""
    return [f.node for f in findings(model, rule, **options)]
