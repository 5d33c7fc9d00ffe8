"""Read an ONNX file into a proto, or say what the file really is."""

from __future__ import annotations

import zipfile
from difflib import get_close_matches
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from deploycc.core.errors import UsageError
from deploycc.interop.protos import PROTOBUF_LIMIT, parse_proto

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

_EXPORT = "export it to ONNX first, e.g. with deploycc export"
_FIRST_BYTES = (
    (b"\x89PNG", "a PNG image", "give the ONNX file"),
    (b"\xff\xd8\xff", "a JPEG image", "give the ONNX file"),
    (b"\x89HDF", "an HDF5 (Keras) file", "convert it to ONNX with tf2onnx"),
    (b"\x80\x02", "a pickle, perhaps an old PyTorch checkpoint", _EXPORT),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run git lfs pull"),
    (b"ftrt", "a TensorRT engine", "give the ONNX file the engine was built from"),
    (b"ptrt", "a TensorRT engine", "give the ONNX file the engine was built from"),
    (b"GGUF", "a GGUF file", "give an ONNX file of a vision model"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"<", "an HTML or XML page, perhaps a failed download", "download the ONNX file again"),
)


def read_proto(path: Path) -> onnx.ModelProto:
    """Parse the file at ``path``, leaving external data on disk.

    Raises:
        UsageError: when there is no such file, it cannot be read, or it is not a whole ONNX model.
    """
    _check_file(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
        _check_head(path, head)
        proto = parse_proto(path.read_bytes())
    except OSError as error:
        raise UsageError(f"the model file cannot be read ({error.strerror})", at=f"'{path}'", fix="check its permissions") from error
    except DecodeError as error:
        # Every ONNX writer begins with the field ir_version, which is the byte 0x08 and a small number.
        if head[:1] == b"\x08" and 1 <= head[1] <= 32:
            raise UsageError(
                f"the model file is truncated or damaged after {path.stat().st_size} bytes",
                at=f"'{path}'",
                fix="copy or export it again, and compare the sizes",
            ) from error
        raise UsageError(
            "the file is not an ONNX model", at=f"'{path}'", fix="give a .onnx file, or make one with deploycc export"
        ) from error
    _check_whole(path, proto)
    return proto


def _check_file(path: Path) -> None:
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*.onnx"))
        hint = f"name the file in it: {', '.join(found[:5])}" if found else "give the path of a .onnx file"
        raise UsageError("the model is a directory", at=f"'{path}'", fix=hint)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.onnx")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, 3, 0.4)
        hint = f"check the path; its folder holds {', '.join(near)}" if near else "check the path, or make the model with deploycc export"
        raise UsageError("the model file does not exist", at=f"'{path}'", fix=hint)
    size = path.stat().st_size
    if size == 0:
        raise UsageError("the model file is empty", at=f"'{path}'", fix="copy or export it again")
    if size > PROTOBUF_LIMIT:
        raise UsageError(
            f"the model file has {size / 1e9:.1f} GB, and one ONNX file holds at most 2 GB",
            at=f"'{path}'",
            fix="export it with external data, so that the weights lie in a second file",
        )


def _check_head(path: Path, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        kind = "a PyTorch checkpoint" if _is_torch(path) else "a ZIP archive"
        raise UsageError(
            f"the file looks like {kind}, not an ONNX model",
            at=f"'{path}'",
            fix="export the model first: deploycc export SOURCE --weights FILE --out model.onnx" if _is_torch(path) else "unpack it first",
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        raise UsageError("the file looks like safetensors weights without a model", at=f"'{path}'", fix=_EXPORT + " SOURCE --weights FILE")
    if head[4:8] == b"TFL3":
        raise UsageError("the file looks like a TensorFlow Lite model", at=f"'{path}'", fix="convert it to ONNX with tf2onnx")
    for magic, kind, fix in _FIRST_BYTES:
        if head.startswith(magic):
            raise UsageError(f"the file looks like {kind}, not an ONNX model", at=f"'{path}'", fix=fix)


def _is_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(("/data.pkl", "/version", "constants.pkl")) or name == "data.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return path.suffix in {".pt", ".pth", ".ckpt"}


def _check_whole(path: Path, proto: onnx.ModelProto) -> None:
    if not proto.HasField("graph") or not proto.ir_version:
        if proto.ir_version or proto.opset_import:
            raise UsageError("the file is ONNX but holds no graph", at=f"'{path}'", fix="export the model again")
        raise UsageError("the file is not an ONNX model", at=f"'{path}'", fix="give a .onnx file, or make one with deploycc export")
    if not proto.graph.node or not proto.graph.output:
        missing = "no node" if not proto.graph.node else "no output"
        raise UsageError(f"the graph has {missing}", at=f"'{path}'", fix="export the model again; it computes nothing as it is")
    if {v.name for v in proto.graph.input} <= {t.name for t in proto.graph.initializer}:
        raise UsageError("the graph has no input", at=f"'{path}'", fix="a constant needs no engine; export the model with its inputs")
