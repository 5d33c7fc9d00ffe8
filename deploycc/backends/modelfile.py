"""ONNX files as files: copied with their external data, and measured, without reading a weight."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import onnx


def copy_model(model: Path, out: Path) -> int:
    """Copy an ONNX file with its external data to ``out``, each file atomically; return the bytes of all of them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    names = _external_files(_skeleton(model).graph)
    pairs = [*((model.parent / name, out.parent / name) for name in sorted(names)), (model, out)]
    for source, destination in pairs:
        if source.resolve() != destination.resolve():
            destination.parent.mkdir(parents=True, exist_ok=True)
            partial = destination.with_name(destination.name + ".partial")
            shutil.copyfile(source, partial)
            partial.replace(destination)
    return sum(destination.stat().st_size for _, destination in pairs)


def count_nodes(model: Path) -> int:
    """Return the number of nodes in the main graph and in the bodies of model-local functions; 0 if the file cannot be read."""
    from google.protobuf.message import DecodeError

    try:
        skeleton = _skeleton(model)
    except DecodeError:
        return 0
    return len(skeleton.graph.node) + sum(len(function.node) for function in skeleton.functions)


def _skeleton(model: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(str(model), load_external_data=False)


def _external_files(graph: onnx.GraphProto) -> set[str]:
    found = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                found |= _external_files(body)
            found |= {entry.value for entry in attribute.t.external_data if entry.key == "location"}
    return found
