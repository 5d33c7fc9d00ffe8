"""The algebra of per-channel affine maps before and behind linear nodes, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.graph import attribute, constant, float_attribute, int_attribute, ints_attribute, widened

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Affine:
    """y = factor x + offset for each channel."""

    factor: np.ndarray
    offset: np.ndarray


def parameters(linear: ir.Node, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of a Conv, ConvTranspose, Gemm or MatMul, the bias of a Gemm times its beta.

    Args:
        linear: a node whose weight and bias are constant.
        bias: what an Add behind a MatMul adds.

    Raises:
        TypeError: if the weight is computed.
    """
    weight = widened(linear.inputs[1])
    given = constant(linear.inputs[2]) if len(linear.inputs) > 2 else bias
    if weight is None:
        raise TypeError(f"the weight of '{linear.name}' is computed")
    beta = float_attribute(linear, "beta", 1.0) if linear.op_type == "Gemm" else 1.0
    return weight, (np.zeros(1) if given is None else given.astype(np.float64)) * beta


def scale_outputs(linear: ir.Node, affine: Affine, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return W' = t W along the output axis and b' = t b + offset, for a map behind ``linear``."""
    weight, shift = parameters(linear, bias)
    factor = affine.factor
    with np.errstate(all="ignore"):
        shift = shift * factor + affine.offset
        if linear.op_type == "ConvTranspose":  # I x O/g: the rows of a group hold the outputs of that group
            factor = _per_group(linear, factor, weight.shape[0])
        elif linear.op_type == "Conv" or is_transposed(linear):
            factor = factor[:, None]
        extra = weight.ndim - factor.ndim if linear.op_type in {"Conv", "ConvTranspose"} else 0
        return weight * factor.reshape(*factor.shape, *[1] * extra), shift


def scale_inputs(linear: ir.Node, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Return W' = W t along the input axis and b' = b + sum W offset, for a map before ``linear``."""
    weight, shift = parameters(linear)
    factor, offset = affine.factor, affine.offset
    if linear.op_type == "Conv":  # O x I/g: an output reads the inputs of its group
        factor, offset = (_per_group(linear, a, weight.shape[0]) for a in (factor, offset))
    elif not is_transposed(linear):
        factor, offset = factor[:, None], offset[:, None]
    extra = [1] * (weight.ndim - 2)
    inputs = tuple(range(1, weight.ndim)) if linear.op_type == "Conv" or is_transposed(linear) else (0,)
    with np.errstate(all="ignore"):
        moved = weight * offset.reshape(*offset.shape, *extra)
        if linear.op_type == "ConvTranspose":  # no offset gets here: at a border fewer taps reach an output
            total = np.zeros(weight.shape[1] * int_attribute(linear, "group", 1))
        else:
            total = moved.sum(axis=inputs) * (float_attribute(linear, "alpha", 1.0) if linear.op_type == "Gemm" else 1.0)
        return weight * factor.reshape(*factor.shape, *extra), shift + total


def is_transposed(linear: ir.Node) -> bool:
    """Return whether the weight of a Gemm is stored outputs first."""
    return linear.op_type == "Gemm" and int_attribute(linear, "transB", 0) == 1


def pads_borders(linear: ir.Node) -> bool:
    """Return whether outputs at the border of the image read fewer inputs than those inside."""
    if linear.op_type == "ConvTranspose":
        return True
    mode = attribute(linear, "auto_pad", "NOTSET")
    if linear.op_type != "Conv" or mode == "VALID":
        return False
    return mode != "NOTSET" or any(ints_attribute(linear, "pads") or ())


def _per_group(linear: ir.Node, channels: np.ndarray, rows: int) -> np.ndarray:
    """Return, for every row of a grouped weight, the channels of its group."""
    groups = int_attribute(linear, "group", 1)
    return np.repeat(channels.reshape(groups, -1), rows // groups, axis=0)
