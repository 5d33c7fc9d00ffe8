"""Operators that move, copy, select or sum elements, in torch; and those that make shapes."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from deploycc.core.graph import attribute, int_attribute, ints_attribute
from deploycc.quant.lrp.operators import Inputs, given, operator, present

if TYPE_CHECKING:
    from collections.abc import Callable


def to_torch(array: np.ndarray) -> Tensor:
    """Return an array as a tensor, every floating-point type as torch's default one; memory is shared where it can be."""
    wide = array if array.dtype.kind in "biu" else np.asarray(array, np.float32)
    if wide.dtype.kind == "u" and wide.dtype != np.uint8:
        wide = wide.astype(np.int64)
    with warnings.catch_warnings():
        # A mapped or shared array cannot be written to; nothing here writes.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(np.ascontiguousarray(wide)).reshape(wide.shape)
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def integers(x: Tensor | None) -> list[int]:
    """Return the elements of an integer tensor."""
    return [] if x is None else [int(e) for e in x.reshape(-1).tolist()]


def _torch_type(code: int) -> torch.dtype:
    kind = ir.DataType(code)
    if kind == ir.DataType.BOOL:
        return torch.bool
    return {ir.DataType.INT32: torch.int32, ir.DataType.UINT8: torch.uint8, ir.DataType.INT8: torch.int8}.get(
        kind, torch.int64 if kind.is_integer() else torch.get_default_dtype()
    )


def _axes(node: ir.Node, inputs: Inputs, position: int = 1) -> list[int]:
    return list(ints_attribute(node, "axes") or ()) or integers(given(inputs, position))


@operator("Reshape")
def _reshape(node: ir.Node, inputs: Inputs) -> Tensor:
    x, target = present(inputs)
    sizes = integers(target)
    if not int_attribute(node, "allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Transpose")
def _transpose(node: ir.Node, inputs: Inputs) -> Tensor:
    x = present(inputs)[0]
    return x.permute(ints_attribute(node, "perm") or tuple(reversed(range(x.ndim))))


@operator("Concat")
def _concat(node: ir.Node, inputs: Inputs) -> Tensor:
    return torch.cat(present(inputs), int_attribute(node, "axis", 0))


@operator("Split")
def _split(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, axis = present(inputs)[0], int_attribute(node, "axis", 0)
    count = int_attribute(node, "num_outputs", len(node.outputs))
    sizes = integers(given(inputs, 1)) or list(ints_attribute(node, "split") or ())
    return torch.split(x, sizes or math.ceil(x.shape[axis] / count), axis)


@operator("Slice")
def _slice(node: ir.Node, inputs: Inputs) -> Tensor:
    x = present(inputs)[0]
    starts, ends = integers(given(inputs, 1)), integers(given(inputs, 2))
    axes = integers(given(inputs, 3)) or list(range(len(starts)))
    steps = integers(given(inputs, 4)) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            low, high, _ = slice(start, end).indices(x.shape[axis])
            chosen = [slice(None)] * (axis % x.ndim) + [slice(low, max(low, high), step)]
            x = x[tuple(chosen)]
        else:
            x = x.index_select(axis, torch.arange(x.shape[axis])[list(range(*slice(start, end, step).indices(x.shape[axis])))])
    return x


@operator("Gather")
def _gather(node: ir.Node, inputs: Inputs) -> Tensor:
    x, index = present(inputs)
    axis = int_attribute(node, "axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    taken = x.index_select(axis, index.reshape(-1))
    return taken.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@operator("GatherElements")
def _gather_elements(node: ir.Node, inputs: Inputs) -> Tensor:
    x, index = present(inputs)
    axis = int_attribute(node, "axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    kept = tuple(slice(None) if i == axis else slice(size) for i, size in enumerate(index.shape))
    return torch.gather(x[kept], axis, index)


@operator("GatherND")
def _gather_nd(node: ir.Node, inputs: Inputs) -> Tensor:
    x, index = present(inputs)
    shared, depth = int_attribute(node, "batch_dims", 0), index.shape[-1]
    lead = torch.meshgrid(*(torch.arange(n) for n in index.shape[:shared]), indexing="ij") if shared else ()
    spread = [g.reshape(*g.shape, *[1] * (index.ndim - 1 - shared)) for g in lead]
    return x[(*spread, *(index[..., i] for i in range(depth)))]


@operator("Squeeze")
def _squeeze(node: ir.Node, inputs: Inputs) -> Tensor:
    x, axes = present(inputs)[0], _axes(node, inputs)
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


@operator("Unsqueeze")
def _unsqueeze(node: ir.Node, inputs: Inputs) -> Tensor:
    x, axes = present(inputs)[0], _axes(node, inputs)
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Flatten")
def _flatten(node: ir.Node, inputs: Inputs) -> Tensor:
    x, axis = present(inputs)[0], int_attribute(node, "axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Expand")
def _expand(node: ir.Node, inputs: Inputs) -> Tensor:
    x, target = present(inputs)
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(integers(target))))


@operator("Tile")
def _tile(node: ir.Node, inputs: Inputs) -> Tensor:
    x, repeats = present(inputs)
    return x.repeat(integers(repeats))


@operator("Pad")
def _pad(node: ir.Node, inputs: Inputs) -> Tensor:
    x, pads, fill = present(inputs)[0], integers(given(inputs, 1)), given(inputs, 2)
    axes = [a % x.ndim for a in integers(given(inputs, 3))] or list(range(x.ndim))
    before, after = (dict(zip(axes, half, strict=True)) for half in (pads[: len(axes)], pads[len(axes) :]))
    mode = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}.get(str(attribute(node, "mode", "constant")))
    if mode is None:
        sizes = [size for axis in reversed(range(x.ndim)) for size in (before.get(axis, 0), after.get(axis, 0))]
        return functional.pad(x, sizes, value=float(fill) if fill is not None else 0.0)
    for axis in axes:
        # Each axis by itself and as the last one: torch pads no others in these modes.
        turned = x.movedim(axis, -1)
        flat = functional.pad(turned.reshape(1, -1, turned.shape[-1]), (before[axis], after[axis]), mode=mode)
        x = flat.reshape(*turned.shape[:-1], flat.shape[-1]).movedim(-1, axis)
    return x


@operator("DepthToSpace")
def _depth_to_space(node: ir.Node, inputs: Inputs) -> Tensor:
    x, block = present(inputs)[0], int_attribute(node, "blocksize", 1)
    if str(attribute(node, "mode", "DCR")) == "CRD":
        return functional.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    blocks = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def _space_to_depth(node: ir.Node, inputs: Inputs) -> Tensor:
    x, block = present(inputs)[0], int_attribute(node, "blocksize", 1)
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * block**2, h // block, w // block)


@operator("Trilu")
def _trilu(node: ir.Node, inputs: Inputs) -> Tensor:
    x, shift = present(inputs)[0], integers(given(inputs, 1))
    return (torch.triu if int_attribute(node, "upper", 1) else torch.tril)(x, shift[0] if shift else 0)


@operator("Cast")
def _cast(node: ir.Node, inputs: Inputs) -> Tensor:
    x, kind = present(inputs)[0], _torch_type(int_attribute(node, "to", 1))
    return x.view_as(x) if x.dtype == kind else x.to(kind)


@operator("CastLike")
def _cast_like(node: ir.Node, inputs: Inputs) -> Tensor:
    x, like = present(inputs)
    return x.view_as(x) if x.dtype == like.dtype else x.to(like.dtype)


@operator("Constant")
def _constant(node: ir.Node, inputs: Inputs) -> Tensor:
    (held,) = node.attributes.values()
    if isinstance(held.value, ir.TensorProtocol):
        return to_torch(held.value.numpy())
    return torch.tensor(held.value, dtype=torch.get_default_dtype() if "float" in held.name else torch.int64)


@operator("ConstantOfShape")
def _constant_of_shape(node: ir.Node, inputs: Inputs) -> Tensor:
    fill = attribute(node, "value")
    one = to_torch(fill.numpy()) if isinstance(fill, ir.TensorProtocol) else torch.zeros(1)
    return one.reshape(()).expand(integers(given(inputs, 0)))


@operator("Range")
def _range(node: ir.Node, inputs: Inputs) -> Tensor:
    start, limit, step = (x.item() for x in present(inputs))
    return torch.arange(start, limit, step, dtype=present(inputs)[0].dtype)


@operator("Shape")
def _shape(node: ir.Node, inputs: Inputs) -> Tensor:
    x = present(inputs)[0]
    return torch.tensor(list(x.shape)[int_attribute(node, "start", 0) : int_attribute(node, "end", x.ndim)], dtype=torch.int64)


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceSum": torch.sum,
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
}


@operator(*_REDUCTIONS)
def _reduce(node: ir.Node, inputs: Inputs) -> Tensor:
    x, axes = present(inputs)[0], _axes(node, inputs)
    if not axes and int_attribute(node, "noop_with_empty_axes", 0):
        return x.view_as(x)
    return _REDUCTIONS[node.op_type](x, axes or list(range(x.ndim)), bool(int_attribute(node, "keepdims", 1)))
