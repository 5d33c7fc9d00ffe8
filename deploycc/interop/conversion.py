"""Conversion between models and ONNX protos in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycc.core.errors import UsageError
from deploycc.interop.protos import PROTOBUF_LIMIT

if TYPE_CHECKING:
    import onnx


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Return a self-contained proto: external weights are copied into it.

    Raises:
        UsageError: when the weights exceed what one proto can hold (2 GB); ``save_model`` writes those.
    """
    held = [(v, v.const_value) for v in model.graph.initializers.values() if v.const_value is not None]
    total = sum(tensor.nbytes for _, tensor in held)
    if total > PROTOBUF_LIMIT:
        raise UsageError(
            f"the weights take {total / 1e9:.1f} GB, more than the 2 GB of one ONNX proto",
            at=f"graph '{model.graph.name}'",
            fix="write it with save_model, which keeps weights in external data",
        )
    try:
        for value, tensor in held:
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=value.name)
        return ir.to_proto(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor


def to_bytes(model: ir.Model) -> bytes:
    """Return the self-contained, serialized proto, as onnxruntime and TensorRT read it."""
    return bytes(to_proto(model).SerializeToString(deterministic=True))


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """Return the model of a proto as it stands: nothing is checked, converted or inferred."""
    return ir.from_proto(proto)
