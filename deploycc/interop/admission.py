"""What a model may contain: known operators, sound names, functions that end, and types that TensorRT can take."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs

from deploycc.core.contract import IMPORTABLE, OWN_DOMAINS, STANDARD_DOMAINS
from deploycc.core.errors import UsageError
from deploycc.core.graph import constant
from deploycc.interop.opsets import NEWEST, OLDEST
from deploycc.interop.protos import anchor, graphs, nodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

FunctionId = tuple[str, str, str]
MOST_NODES = 200_000
_TEXT = frozenset({ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128})
_INTERFACE = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.BOOL,
        ir.DataType.FLOAT8E4M3FN,
    }
)
_ORIGINS = {
    "com.microsoft": "onnxruntime wrote this operator; give the file from before onnxruntime's optimizer or quantizer",
    "ai.onnx.ml": "operators of classical machine learning have no TensorRT form; cut them off and export the network alone",
    "ai.onnx.preview.training": "export the model for inference",
    "org.pytorch.aten": "PyTorch had no ONNX form for this operator; export with dynamo=True, or write it with other operators",
}


def check_admissible(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse what no later step could handle, before any native code sees the model.

    Raises:
        UsageError: naming the operator, value or function and its place.
    """
    versions = opset_versions(proto, path)
    check_functions(proto, path)
    local = {(f.domain, f.name) for f in proto.functions}
    for owner in (proto.graph, *proto.functions):
        for node in nodes(owner):
            _check_operator(node, versions.get("", 0), local, path)
    _check_names(proto.graph, path)
    for kind, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            _check_interface(kind, value, path)
    for graph in graphs(proto.graph):
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise UsageError("sparse weights are not supported", at=f"'{name}' in '{path}'", fix="store them dense before the export")


def opset_versions(proto: onnx.ModelProto, path: Path) -> dict[str, int]:
    """Return the version of each imported domain.

    Raises:
        UsageError: when a domain is imported twice, or the default domain is missing, too old or too new.
    """
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            raise UsageError(f"the opset of domain '{domain}' is declared twice", at=f"'{path}'", fix="export the model again")
    if "" not in versions:
        raise UsageError("the file declares no ONNX opset; it may be truncated", at=f"'{path}'", fix="copy or export it again")
    if not OLDEST <= versions[""] <= NEWEST:
        raise UsageError(
            f"the model has opset {versions['']}", at=f"'{path}'", fix=f"export it with an opset from {OLDEST} to {NEWEST}; 20 is best"
        )
    return versions


def check_functions(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse functions that call themselves, directly or in a circle, or that expand without measure.

    Raises:
        UsageError: naming the function.
    """
    bodies = {(f.domain, f.name, f.overload): f for f in proto.functions}
    if len(bodies) < len(proto.functions):
        raise UsageError("a function is defined twice", at=f"'{path}'", fix="export the model again")
    sizes: dict[FunctionId, int] = {}
    for key in bodies:
        _expand(key, bodies, sizes, path)
    total = sum(sizes.get((n.domain, n.op_type, n.overload), 1) for n in nodes(proto.graph))
    if total > MOST_NODES:
        raise UsageError(
            f"the functions expand to {total} nodes", at=f"'{path}'", fix=f"simplify the model; the limit is {MOST_NODES} nodes"
        )


def _expand(start: FunctionId, bodies: Mapping[FunctionId, onnx.FunctionProto], sizes: dict[FunctionId, int], path: Path) -> None:
    """Compute the size of ``start`` and of everything it calls, without recursion of our own."""
    stack, active = [start], set[FunctionId]()
    while stack:
        key = stack[-1]
        called = [(n.domain, n.op_type, n.overload) for n in nodes(bodies[key])]
        pending = [c for c in called if c in bodies and c not in sizes]
        if key in sizes or not pending:
            sizes[key] = sum(sizes.get(c, 1) for c in called)
            active.discard(key)
            stack.pop()
            continue
        active.add(key)
        if looped := active.intersection(pending):
            domain, name, _ = min(looped)
            raise UsageError(
                f"the function {domain}::{name} is recursive", at=f"'{path}'", fix="ONNX functions cannot recurse; export the model again"
            )
        stack.append(pending[0])


def _check_operator(node: onnx.NodeProto, version: int, local: set[tuple[str, str]], path: Path) -> None:
    if (node.domain, node.op_type) in local | IMPORTABLE or node.domain in OWN_DOMAINS:
        return
    at = f"{anchor(node)} of '{path}'"
    if node.domain not in STANDARD_DOMAINS:
        fix = _ORIGINS.get(node.domain, "give the function's body in the model, or export with standard ONNX operators only")
        raise UsageError(f"the operator {node.op_type} of domain '{node.domain}' is unknown", at=at, fix=fix)
    if defs.has(node.op_type, max_inclusive_version=version, domain=""):
        return
    if defs.has(node.op_type, domain=""):
        since = min(s.since_version for s in defs.get_all_schemas_with_history() if s.name == node.op_type and s.domain == "")
        raise UsageError(
            f"the operator {node.op_type} exists since opset {since}, and the file says opset {version}",
            at=at,
            fix=f"export the model with opset {max(since, 20)}",
        )
    raise UsageError(f"the operator {node.op_type} is not an ONNX operator", at=at, fix="export with standard ONNX operators only")


def _check_names(graph: onnx.GraphProto, path: Path) -> None:
    """Refuse values that are defined twice in one graph."""
    for kind, names in (
        ("initializer", (t.name for t in graph.initializer)),
        ("input", (v.name for v in graph.input)),
        ("output", (v.name for v in graph.output)),
        ("value", (name for node in graph.node for name in node.output if name)),
    ):
        _check_unique(kind, names, path)
    computed = {name for node in graph.node for name in node.output if name}
    clash = computed.intersection([*(t.name for t in graph.initializer), *(v.name for v in graph.input)])
    if clash:
        raise UsageError(f"the value '{min(clash)}' is both computed and given", at=f"'{path}'", fix="export the model again")


def _check_unique(kind: str, names: Iterable[str], path: Path) -> None:
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 1))
    if count > 1:
        raise UsageError(
            f"the {kind} '{name}' is defined {count} times", at=f"'{path}'", fix="export the model again; names must be unique"
        )


def check_types(model: ir.Model, path: Path) -> None:
    """Refuse text and complex numbers inside the model.

    Raises:
        UsageError: naming the value and its type.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if value.dtype in _TEXT:
                raise UsageError(
                    f"'{value.name}' is of type {_type_name(value)}, which TensorRT has not",
                    at=f"node '{node.name}' ({node.op_type}) of '{path}'",
                    fix="move text and complex numbers out of the model, to its caller",
                )
    for value in model.graph.initializers.values():
        if value.dtype in _TEXT:
            raise UsageError(
                f"the weight '{value.name}' is of type {_type_name(value)}",
                at=f"'{path}'",
                fix="keep text and complex numbers outside the model",
            )


def check_zero_points(model: ir.Model, path: Path) -> None:
    """Refuse a model that was quantized with zero points other than zero, which TensorRT cannot take (rule R1).

    Raises:
        UsageError: naming the node.
    """
    for node in model.graph:
        zeros = constant(node.inputs[2]) if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and len(node.inputs) > 2 else None
        if zeros is not None and np.any(zeros.astype(np.float32) != 0):
            raise UsageError(
                "the model is quantized with a zero point other than zero, which TensorRT has not",
                at=f"node '{node.name}' ({node.op_type}) of '{path}'",
                fix="give the model from before its quantization, or quantize it symmetrically to INT8",
            )


def _check_interface(kind: str, value: onnx.ValueInfoProto, path: Path) -> None:
    at = f"{kind} '{value.name}' of '{path}'"
    form = value.type.WhichOneof("value")
    if form not in {"tensor_type", None}:
        name = form.removesuffix("_type").replace("_", " ")
        raise UsageError(
            f"the {kind} '{value.name}' is a {name}, not a tensor", at=at, fix="export the model with tensors as inputs and outputs"
        )
    number = value.type.tensor_type.elem_type
    if number in {*_INTERFACE, ir.DataType.UNDEFINED}:
        return
    dtype = ir.DataType(number).name if number in {int(d) for d in ir.DataType} else f"number {number}"
    usual = ", ".join(sorted(t.name for t in _INTERFACE))
    raise UsageError(f"the {kind} '{value.name}' is of type {dtype}, which TensorRT cannot take", at=at, fix=f"cast it to one of {usual}")


def _type_name(value: ir.Value) -> str:
    return value.dtype.name if value.dtype is not None else "UNDEFINED"
