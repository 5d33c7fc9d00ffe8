"""NaN and infinity in the constants of a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# A mask of -inf is how attention hides positions, so infinity is refused only where it multiplies activations.
WEIGHTED = frozenset(
    {
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "DequantizeLinear",
        "Gemm",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "MatMul",
        "QuantizeLinear",
        "RMSNormalization",
    }
)
_VIEWS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_CHUNK = 2**22
# Exponent and mantissa bits of the 16-bit formats: above the exponent mask is NaN, equal to it infinity.
_EXPONENT = {ir.DataType.FLOAT16: 0x7C00, ir.DataType.BFLOAT16: 0x7F80}
_CHECKED = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, *_EXPONENT})


def check_numbers(model: ir.Model, path: Path) -> None:
    """Refuse NaN in any constant, and infinity in the weights of operators that multiply by them.

    External data is read in pieces and not kept.

    Raises:
        UsageError: naming the tensor and how many of its numbers are wrong.
    """
    for value, tensor in _constants(model):
        if tensor.dtype not in _CHECKED:
            continue
        nans, infinities = count_non_finite(tensor)
        if nans:
            raise UsageError(
                f"the constant '{value.name}' holds {nans} NaN among {tensor.size} numbers",
                at=f"{_shown(value)} of '{path}'",
                fix="the training diverged or the export failed; take an earlier checkpoint",
            )
        if infinities and (reader := _weighted_reader(value)) is not None:
            raise UsageError(
                f"the weight '{value.name}' holds {infinities} infinite among {tensor.size} numbers",
                at=f"node '{reader.name}' ({reader.op_type}) of '{path}'",
                fix="it may have overflowed in a cast to FP16; export the model in FP32",
            )


def count_non_finite(tensor: ir.TensorProtocol) -> tuple[int, int]:
    """Return the number of NaNs and of infinities in a tensor of 16, 32 or 64 bits."""
    nans = infinities = 0
    mask = _EXPONENT.get(tensor.dtype)
    for chunk in _chunks(tensor):
        if mask is None:
            if not np.isfinite(chunk).all():
                nans, infinities = nans + int(np.isnan(chunk).sum()), infinities + int(np.isinf(chunk).sum())
        else:
            magnitude = chunk.view(np.uint16) & 0x7FFF
            nans, infinities = nans + int((magnitude > mask).sum()), infinities + int((magnitude == mask).sum())
    return nans, infinities


def _chunks(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    dtype = np.dtype(tensor.dtype.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        # Plain reads instead of the memory map: mapped pages would count as this process's memory.
        with Path(tensor.path).open("rb") as stream:
            stream.seek(tensor.offset or 0)
            left = math.prod(int(d) for d in tensor.shape.numpy())
            while left:
                count = min(left, _CHUNK)
                yield np.frombuffer(stream.read(count * dtype.itemsize), dtype)
                left -= count
    else:
        flat = tensor.numpy().reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            yield flat[start : start + _CHUNK]


def _constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    yield from ((v, v.const_value) for v in model.graph.initializers.values() if v.const_value is not None)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield node.outputs[0], attribute.as_tensor()
            elif attribute.type == ir.AttributeType.GRAPH:
                inner = attribute.as_graph().initializers.values()
                yield from ((v, v.const_value) for v in inner if v.const_value is not None)


def _weighted_reader(value: ir.Value) -> ir.Node | None:
    """Return a node that multiplies by ``value`` or by a view of it, if there is one."""
    for node in value.consumers():
        if node.op_type in WEIGHTED:
            return node
        if node.op_type in _VIEWS and (found := _weighted_reader(node.outputs[0])) is not None:
            return found
    return None


def _shown(value: ir.Value) -> str:
    readers = [f"'{node.name}' ({node.op_type})" for node in value.consumers()]
    return f"constant '{value.name}', read by {readers[0]}," if readers else f"constant '{value.name}'"
