"""Raise the opset of a model."""

from __future__ import annotations

import onnx
from onnx import version_converter

from deploycc.core.errors import UsageError
from deploycc.interop.adapters import resize_rounding, set_resize_modes
from deploycc.interop.protos import nodes

OLDEST, NEWEST = 7, 23


def default_opset(model: onnx.ModelProto) -> int:
    """Return the version of the default domain that the model imports, or 0."""
    return max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=0)


def raise_opset(model: onnx.ModelProto, *, opset: int, path: str) -> onnx.ModelProto:
    """Return the model at ``opset``, or as it is when its opset is newer.

    onnx's converter keeps names of nodes and values but loses what it has no place for: metadata, symbolic dimensions,
    functions, opsets of other domains. All of that is put back.

    Raises:
        UsageError: when an operator cannot be converted.
    """
    before = default_opset(model)
    if before >= opset:
        return model
    rounding = resize_rounding(model.graph, path) if before <= 10 else {}
    try:
        result = version_converter.convert_version(model, opset)
    except (RuntimeError, onnx.onnx_cpp2py_export.version_converter.ConvertError) as error:
        text = " ".join(str(error).split())
        raise UsageError(
            f"the model cannot be converted from opset {before} to {opset}: {text[:300]}",
            at=f"'{path}'",
            fix=f"export the model with opset {opset}",
        ) from error
    if before <= 10:
        set_resize_modes(result.graph, rounding)
    return _restored(result, model)


def _restored(result: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    result.ir_version = model.ir_version
    for name in ("input", "output", "value_info", "metadata_props", "quantization_annotation"):
        field = getattr(result.graph, name)
        del field[:]
        field.extend(getattr(model.graph, name))
    lost = {name: node for node in nodes(model.graph) for name in node.output if name}
    for node in nodes(result.graph):
        source = next((lost[name] for name in node.output if name in lost), None)
        if source is not None:
            node.name = node.name or source.name
            node.metadata_props.extend([] if node.metadata_props else source.metadata_props)
    del result.functions[:]
    result.functions.extend(model.functions)
    known = {entry.domain for entry in result.opset_import}
    result.opset_import.extend(entry for entry in model.opset_import if entry.domain not in known and entry.domain != "ai.onnx")
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    return result
