"""Where external data may lie: in the model's own folder, in whole, and nowhere else."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from deploycc.core.errors import UsageError
from deploycc.interop.protos import elements, graphs
from deploycc.interop.weights import constant_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


_KEYS = frozenset({"location", "offset", "length", "checksum", "basepath"})


def check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Check every reference to external data without reading the data.

    Raises:
        UsageError: when a reference leaves the model's folder, or the file is missing or too short.
    """
    folder, sizes = path.parent.resolve(), dict[str, int]()
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check(tensor, folder, sizes, path)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for owner in (proto.graph, *proto.functions):
        for graph in graphs(owner):
            yield from getattr(graph, "initializer", ())
            yield from (t for t in map(constant_tensor, graph.node) if t is not None)


def _check(tensor: onnx.TensorProto, folder: Path, sizes: dict[str, int], path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    at = f"the tensor '{tensor.name}' of '{path}' refers to '{location}'"
    if unknown := set(entries) - _KEYS:
        raise UsageError(
            f"the external data has the unknown entry '{min(unknown)}'", at=at, fix="the file is damaged: copy or export it again"
        )
    if location not in sizes:
        sizes[location] = _file_size(location, folder, at)
    numbers = [entries.get("offset", "0") or "0", entries.get("length", "0") or "0"]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise UsageError(f"the offset or length of external data is no number: {numbers}", at=at, fix="export the model again")
    offset, length = map(int, numbers)
    needed = (elements(tensor) * int(ir.DataType(tensor.data_type).bitwidth) + 7) // 8
    if min(tensor.dims, default=0) < 0 or (length and length != needed):
        raise UsageError(f"the tensor needs {needed} bytes and its external data has {length}", at=at, fix="export the model again")
    if offset + needed > sizes[location]:
        raise UsageError(
            f"the external data has {sizes[location]} bytes, and the tensor needs bytes {offset} to {offset + needed}",
            at=at,
            fix="the data file is truncated or belongs to another model: copy or export both files again",
        )


def _file_size(location: str, folder: Path, at: str) -> int:
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or location.startswith("\\")
    if not location or absolute or ".." in parts:
        raise UsageError("external data must lie in the folder of the model", at=at, fix="save the model again with its data beside it")
    target = folder / location
    if not target.is_file():
        if target.is_symlink() or not target.exists():
            raise UsageError("the external data is missing", at=at, fix="copy the data file into the folder of the model, under this name")
        raise UsageError("the external data is not a file", at=at, fix="copy the data file into the folder of the model, under this name")
    if not target.resolve().is_relative_to(folder):
        raise UsageError("the external data is a link that leaves the folder of the model", at=at, fix="put the data file itself there")
    if target.stat().st_nlink > 1:
        # onnx and onnx_ir refuse these as well: a hard link can smuggle in a file from anywhere.
        raise UsageError("the external data is a hard link to a file elsewhere", at=at, fix="copy the file instead of linking it")
    return target.stat().st_size
