"""DCNv3 in PyTorch: the operator on GridSample for training and as a check, and as one node for export.

``dcnv3`` computes with ``grid_sample`` and is differentiable. Under ``torch.export`` it becomes the operator ``deploycc::dcnv3``,
which `translations` turns into one ``deploycc::DCNv3`` node; ``deploycc export`` adds the function body.
"""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from deploycc.core.dcnv3 import DOMAIN, PLAIN, VERSION, DCNv3

if TYPE_CHECKING:
    from collections.abc import Callable

# The attributes that a PyTorch module has; softmax and what follows it belong to later stages.
_FIELDS = fields(DCNv3)[:11]


def dcnv3(x: Tensor, offset: Tensor, mask: Tensor, what: DCNv3) -> Tensor:
    """Return the result [N, Ho, Wo, C] of the operator for NHWC tensors; see `deploycc.core.dcnv3`.

    Raises:
        UsageError: when the shapes do not belong together.
    """
    if torch.compiler.is_exporting():
        result: Tensor = torch.ops.deploycc.dcnv3(x, offset, mask, *astuple(what)[: len(_FIELDS)])
        return result
    return sampled(x, offset, mask, what)


def sampled(x: Tensor, offset: Tensor, mask: Tensor, what: DCNv3) -> Tensor:
    """Compute the operator with ``grid_sample``: the form in which exporters without the node leave it."""
    what.check_shapes(x.shape, offset.shape, mask.shape)
    batch, height, width, channels = x.shape
    rows, columns = offset.shape[1:3]
    group, points = what.group, what.points
    k = torch.arange(points, device=offset.device)
    k = k + what.remove_center * (k >= what.kernel_h * what.kernel_w // 2)
    reach_x, reach_y = what.dilation_w * (what.kernel_w - 1) // 2, what.dilation_h * (what.kernel_h - 1) // 2
    place = torch.stack([k // what.kernel_h * what.dilation_w - reach_x, k % what.kernel_h * what.dilation_h - reach_y], -1).to(offset)
    base_x = torch.arange(columns, device=offset.device) * what.stride_w + (reach_x - what.pad_w)
    base_y = torch.arange(rows, device=offset.device) * what.stride_h + (reach_y - what.pad_h)
    base = torch.stack([base_x.expand(rows, columns), base_y[:, None].expand(rows, columns)], -1).to(offset)
    shifts = offset.reshape(batch, rows, columns, group, points, 2)
    position = base[:, :, None, None] + (place + shifts) * what.offset_scale
    grid = (2 * position + 1) / torch.tensor([width, height], dtype=offset.dtype, device=offset.device) - 1
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * group, rows * columns, points, 2)
    image = x.reshape(batch, height, width, group, channels // group).permute(0, 3, 4, 1, 2).reshape(batch * group, -1, height, width)
    samples = functional.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = mask.reshape(batch, rows, columns, group, points).permute(0, 3, 1, 2, 4).reshape(batch * group, 1, rows * columns, points)
    total = (samples * weights).sum(-1).reshape(batch, group, channels // group, rows, columns)
    return total.permute(0, 3, 4, 1, 2).reshape(batch, rows, columns, channels)


def _attributes(*values: Any) -> DCNv3:
    return DCNv3(**{f.name: value for f, value in zip(_FIELDS, values, strict=True)})


def _computed(x: Tensor, offset: Tensor, mask: Tensor, *attributes: Any) -> Tensor:
    return sampled(x, offset, mask, _attributes(*attributes))


def _shaped(x: Tensor, offset: Tensor, mask: Tensor, *attributes: Any) -> Tensor:
    _attributes(*attributes).check_shapes(x.shape, offset.shape, mask.shape)
    return x.new_empty((*offset.shape[:3], x.shape[3]))


_SCHEMA = ", ".join(f"{'float' if f.name == 'offset_scale' else 'int'} {f.name}" for f in _FIELDS)
torch.library.custom_op(
    f"{DOMAIN}::dcnv3", _computed, mutates_args=(), schema=f"(Tensor x, Tensor offset, Tensor mask, {_SCHEMA}) -> Tensor"
).register_fake(_shaped)


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the table by which the ONNX exporter of PyTorch turns the operator into a node."""
    from onnxscript.values import Op, Opset

    make = Op(Opset(DOMAIN, VERSION), PLAIN, _schema())

    def node(x: Any, offset: Any, mask: Any, *attributes: Any) -> Any:
        return make(x, offset, mask, **{a.name: a.value for a in _attributes(*attributes).attributes()})

    return {torch.ops.deploycc.dcnv3.default: node}


def _schema() -> Any:
    """Return what the exporter asks of an operator that onnx does not define: its operands, and the names of its attributes."""
    from onnx.defs import OpSchema

    kinds = {a.name: getattr(OpSchema.AttrType, a.type.name) for a in DCNv3(group=1).attributes()}
    return OpSchema(
        PLAIN,
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter(name, "T") for name in ("x", "offset", "mask")],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[OpSchema.Attribute(name, kind, required=False) for name, kind in kinds.items()],
    )
