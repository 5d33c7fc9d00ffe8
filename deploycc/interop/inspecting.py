"""Read an ONNX file as it stands, to look at it: nothing is refused for what it computes, and nothing is converted."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
from onnx_ir.serde import SerdeError

from deploycc.core import child
from deploycc.core.errors import UsageError
from deploycc.interop.conversion import from_proto
from deploycc.interop.external import check_external_data
from deploycc.interop.order import sort_nodes
from deploycc.interop.protos import parse_proto
from deploycc.interop.reading import read_proto
from deploycc.interop.weights import attach, detach

TIMEOUT = 120.0


def read_model(path: Path, *, timeout: float = TIMEOUT) -> ir.Model:
    """Return the model at ``path`` with unique node names, constants as initializers, and types and shapes where onnx infers them.

    Unlike ``load_model`` it takes operators, opsets and zero points that no target compiles: they are what a lint reports.

    Args:
        path: an ONNX file.
        timeout: seconds for the inference of types and shapes, which happens in a child process.

    Raises:
        UsageError: when the file is missing, is not ONNX, lacks its external data, or makes the onnx library fail.
    """
    path = Path(path)
    proto = read_proto(path)
    check_external_data(proto, path)
    sort_nodes(proto.graph, str(path))  # Quark leaves its quantizers at the end.
    held = detach(proto, path.parent.resolve())
    with tempfile.TemporaryDirectory(prefix="deploycc-read-") as folder:
        file = Path(folder, "skeleton.onnx")
        file.write_bytes(proto.SerializeToString())
        del proto
        try:
            child.call("deploycc.interop.frontend:describe", {"skeleton": str(file)}, timeout=timeout)
            model = from_proto(parse_proto(file.read_bytes()))
        except (child.ChildError, SerdeError) as error:
            text = " ".join(str(error).split())[:400]
            fix = "run onnx.checker.check_model(path, full_check=True) on it, and export it again"
            raise UsageError(f"the onnx library cannot read this model: {text}", at=f"'{path}'", fix=fix) from error
    attach(model, held)
    _lift_constants(model.graph)
    return model


def _lift_constants(graph: ir.Graph) -> None:
    """Turn Constant nodes into initializers."""
    for node in list(graph):
        tensor = node.attributes.get("value") if node.op_type == "Constant" and node.domain == "" else None
        value = node.outputs[0]
        if tensor is None or value.is_graph_output():
            continue
        lifted = ir.Value(name=value.name, type=ir.TensorType(tensor.value.dtype), shape=tensor.value.shape, const_value=tensor.value)
        value.replace_all_uses_with(lifted)
        graph.remove(node, safe=True)
        graph.register_initializer(lifted)
