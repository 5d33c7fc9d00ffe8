"""Is the file whole? Text that is text, and tensors with as many numbers as they declare.

onnx's checker would find these, but it never sees the weights, and the code before it relies on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
from onnx import helper

from deploycc.core.errors import UsageError
from deploycc.interop.protos import elements

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.message import Message

_AGAIN = "the file is damaged: copy or export it again"
_KNOWN = frozenset(int(d) for d in ir.DataType) - {0}


def check_whole(proto: onnx.ModelProto, path: Path) -> None:
    """Check all text and all tensors of a model.

    Raises:
        UsageError: naming the tensor, or the text that is none.
    """
    for message in _messages(proto, path):
        if isinstance(message, onnx.TensorProto):
            _check_tensor(message, path)


def _messages(message: Message, path: Path) -> Iterator[Message]:
    """Yield ``message`` and everything in it, checking text on the way; weights are not copied."""
    yield message
    weights = isinstance(message, onnx.TensorProto)
    for field in message.DESCRIPTOR.fields:
        if field.type == field.TYPE_BYTES or (weights and field.message_type is None and field.name != "name"):
            continue
        entry: Any = getattr(message, field.name)
        if field.message_type is not None:
            if field.is_repeated or message.HasField(field.name):
                for inner in entry if field.is_repeated else (entry,):
                    yield from _messages(inner, path)
        elif field.type == field.TYPE_STRING:
            for text in entry if field.is_repeated else (entry,):
                if isinstance(text, bytes):
                    raise UsageError(f"a name in the file is not text: {text[:40]!r}", at=f"a {field.full_name} of '{path}'", fix=_AGAIN)


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    at = f"the tensor '{tensor.name}' of '{path}'"
    if tensor.data_type not in _KNOWN:
        raise UsageError(f"the tensor has the unknown type {tensor.data_type}", at=at, fix=_AGAIN)
    if min(tensor.dims, default=0) < 0:
        raise UsageError(f"the tensor has the shape {list(tensor.dims)}", at=at, fix=_AGAIN)
    if tensor.HasField("segment"):
        raise UsageError("the tensor is stored in segments, which nothing reads", at=at, fix=_AGAIN)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    dtype, count = ir.DataType(tensor.data_type), elements(tensor)
    if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
        needed, found, unit = (count * int(dtype.bitwidth) + 7) // 8, len(tensor.raw_data), "bytes"
    else:
        found, unit = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type))), "numbers"
        needed = _packed(dtype, count)
    if found != needed:
        raise UsageError(f"the tensor of shape {list(tensor.dims)} needs {needed} {unit} and has {found}", at=at, fix=_AGAIN)


def _packed(dtype: ir.DataType, count: int) -> int:
    """Return how many entries of a typed field hold ``count`` elements."""
    if dtype in {ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}:
        return 2 * count
    return (count * int(dtype.bitwidth) + 7) // 8 if dtype != ir.DataType.STRING and dtype.bitwidth < 8 else count
