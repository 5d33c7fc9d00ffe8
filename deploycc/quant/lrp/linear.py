"""Products and normalisations in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from deploycc.core.graph import attribute, float_attribute, int_attribute, ints_attribute
from deploycc.quant.lrp.operators import Inputs, given, operator, present
from deploycc.quant.lrp.windows import Window

if TYPE_CHECKING:
    import onnx_ir as ir

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


@operator("MatMul")
def _matmul(node: ir.Node, inputs: Inputs) -> Tensor:
    x, y = present(inputs)
    return torch.matmul(x, y)


@operator("Gemm")
def _gemm(node: ir.Node, inputs: Inputs) -> Tensor:
    """``alpha A' B' + beta C``."""
    a, b = present(inputs)[:2]
    a = a.mT if attribute(node, "transA", 0) else a
    b = b.mT if attribute(node, "transB", 0) else b
    product, c = torch.matmul(a, b), given(inputs, 2)
    alpha, beta = float_attribute(node, "alpha", 1.0), float_attribute(node, "beta", 1.0)
    product = product if alpha == 1.0 else product * alpha
    return product if c is None else product + (c if beta == 1.0 else c * beta)


@operator("Einsum")
def _einsum(node: ir.Node, inputs: Inputs) -> Tensor:
    return torch.einsum(str(attribute(node, "equation")), *present(inputs))


@operator("Conv")
def _conv(node: ir.Node, inputs: Inputs) -> Tensor:
    x, weight = present(inputs)[:2]
    window = Window.of(node, x.shape[2:], kernel=weight.shape[2:])
    padded, pads = window.split_padding(x, value=0.0)
    convolve = _CONVOLUTIONS[x.ndim - 3]
    return convolve(padded, weight, given(inputs, 2), window.strides, pads, window.dilations, int_attribute(node, "group", 1))


@operator("ConvTranspose")
def _conv_transpose(node: ir.Node, inputs: Inputs) -> Tensor:
    """The full transposed convolution, of which ``pads`` are cut off; a negative pad adds zeros (plus the bias)."""
    x, weight = present(inputs)[:2]
    window = Window.of(node, x.shape[2:], kernel=weight.shape[2:], transposed=True)
    group, bias = int_attribute(node, "group", 1), given(inputs, 2)
    full = _TRANSPOSED[x.ndim - 3](x, weight, None, window.strides, 0, 0, group, window.dilations)
    extra = ints_attribute(node, "output_padding") or (0,) * (x.ndim - 2)
    ends = [e - p for e, p in zip(extra, window.after, strict=True)]
    cut = [size for b, e in zip(reversed(window.before), reversed(ends), strict=True) for size in (-b, e)]
    result = functional.pad(full, cut)
    return result if bias is None else result + bias.reshape(-1, *[1] * (x.ndim - 2))


@operator("Softmax", "LogSoftmax")
def _softmax(node: ir.Node, inputs: Inputs) -> Tensor:
    function = torch.softmax if node.op_type == "Softmax" else torch.log_softmax
    return function(present(inputs)[0], int_attribute(node, "axis", -1))


@operator("LayerNormalization", "RMSNormalization")
def _layer_norm(node: ir.Node, inputs: Inputs) -> Tensor:
    x, scale = present(inputs)[:2]
    shape = list(x.shape[int_attribute(node, "axis", -1) % x.ndim :])
    epsilon = float_attribute(node, "epsilon", 1e-5)
    scale = scale.expand(shape)
    if node.op_type == "RMSNormalization":
        return functional.rms_norm(x, shape, scale, epsilon)
    bias = given(inputs, 2)
    return functional.layer_norm(x, shape, scale, None if bias is None else bias.expand(shape), epsilon)


@operator("BatchNormalization")
def _batch_norm(node: ir.Node, inputs: Inputs) -> Tensor:
    x, scale, bias, mean, variance = present(inputs)[:5]
    return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=float_attribute(node, "epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(node: ir.Node, inputs: Inputs) -> Tensor:
    return _grouped_norm(node, inputs, groups=present(inputs)[0].shape[1])


@operator("GroupNormalization")
def _group_norm(node: ir.Node, inputs: Inputs) -> Tensor:
    return _grouped_norm(node, inputs, groups=int_attribute(node, "num_groups", 1))


def _grouped_norm(node: ir.Node, inputs: Inputs, *, groups: int) -> Tensor:
    """Normalise over each group of channels. Scale and bias are per channel, those of GroupNormalization before opset 21 per group."""
    x, scale, bias = present(inputs)[:3]
    rows = x.reshape(x.shape[0], groups, -1)
    normal = functional.layer_norm(rows, rows.shape[-1:], eps=float_attribute(node, "epsilon", 1e-5)).reshape(x.shape)
    shape = [-1, *[1] * (x.ndim - 2)]
    scale, bias = (v.repeat_interleave(x.shape[1] // len(v)).reshape(shape) for v in (scale, bias))
    return normal * scale + bias


@operator("LpNormalization")
def _lp_norm(node: ir.Node, inputs: Inputs) -> Tensor:
    return functional.normalize(present(inputs)[0], p=float(int_attribute(node, "p", 2)), dim=int_attribute(node, "axis", -1))
