"""The child's side of loading: everything that calls into the onnx library on a model nobody has checked yet."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import checker, inliner, shape_inference

from deploycc.core.errors import UsageError
from deploycc.interop.adapters import decompose_group_normalization
from deploycc.interop.opsets import default_opset, raise_opset
from deploycc.interop.order import sort_nodes
from deploycc.interop.protos import graphs, nodes, parse_proto

if TYPE_CHECKING:
    from collections.abc import Mapping


def normalize(request: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the skeleton at ``request['skeleton']`` to normal form, in place; return a refusal if there is one."""
    file, path = Path(request["skeleton"]), str(request["path"])
    try:
        skeleton = parse_proto(file.read_bytes())
        model = normalized(skeleton, opset=int(request["opset"]), path=path, own=frozenset(request["own"]))
    except UsageError as error:
        return {"refused": {"what": error.what, "at": error.at, "fix": error.fix}}
    file.write_bytes(model.SerializeToString())
    return {}


def describe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Name the nodes of the skeleton and infer what can be inferred, in place; nothing is refused or converted."""
    file = Path(request["skeleton"])
    model = parse_proto(file.read_bytes())
    normalize_domains(model)
    if model.functions:
        model = inliner.inline_local_functions(model)
    name_nodes(model.graph)
    with suppress(shape_inference.InferenceError, RuntimeError):  # A model that contradicts itself goes without inferred shapes.
        model = shape_inference.infer_shapes(model, data_prop=True)
    file.write_bytes(model.SerializeToString())
    return {}


def normalized(model: onnx.ModelProto, *, opset: int, path: str, own: frozenset[str] = frozenset()) -> onnx.ModelProto:
    """Return the model checked, inlined, named, sorted, at ``opset`` or above, with inferred types and shapes."""
    model.ir_version = max(model.ir_version, 10)
    normalize_domains(model)
    sort_nodes(model.graph, path)
    if default_opset(model) <= 20:
        decompose_group_normalization(model)
    _check(model, path)
    model = inline(model, path, own)
    name_nodes(model.graph)
    sort_nodes(model.graph, path)
    model = raise_opset(model, opset=opset, path=path)
    name_nodes(model.graph)
    model = infer(model, path)
    drop_unused_opsets(model, own)
    _check(model, path)
    return model


def normalize_domains(model: onnx.ModelProto) -> None:
    """Write the default domain in one way."""
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        for entry in imports:
            if entry.domain == "ai.onnx":
                entry.domain = ""
    for owner in (model.graph, *model.functions):
        for node in nodes(owner):
            if node.domain == "ai.onnx":
                node.domain = ""


def drop_unused_opsets(model: onnx.ModelProto, own: frozenset[str]) -> None:
    """Drop the opsets of domains that went away with their functions."""
    used = {node.domain for owner in (model.graph, *model.functions) for node in nodes(owner)} | own | {""}
    for index in reversed(range(len(model.opset_import))):
        if model.opset_import[index].domain not in used:
            del model.opset_import[index]


def inline(model: onnx.ModelProto, path: str, own: frozenset[str]) -> onnx.ModelProto:
    """Inline every function but those of our own domain, which stand for plugins."""
    if not model.functions:
        return model
    kept = [(f.domain, f.name) for f in model.functions if f.domain in own]
    if kept:
        result = inliner.inline_selected_functions(model, kept, exclude=True)
    else:
        result = inliner.inline_local_functions(model, convert_version=True)
    left = [f"{f.domain}::{f.name}" for f in result.functions if f.domain not in own]
    called = {(n.domain, n.op_type) for n in nodes(result.graph)}
    stuck = [name for name in left if tuple(name.split("::")) in called]
    if stuck:
        raise UsageError(
            f"the function {stuck[0]} cannot be inlined",
            at=f"'{path}'",
            fix="export the model with one opset for the graph and its functions",
        )
    if left:
        ours = [f for f in result.functions if f.domain in own]
        del result.functions[:]
        result.functions.extend(ours)
    return result


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node of the graph and its subgraphs a unique name; the first bearer of a name keeps it."""
    taken = {node.name for node in nodes(graph) if node.name}
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for node in nodes(graph):
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        stem = node.name or node.op_type
        while (name := f"{stem}_{counts[stem]}") in taken:
            counts[stem] += 1
        node.name = name
        taken.add(name)
        seen.add(name)


def infer(model: onnx.ModelProto, path: str) -> onnx.ModelProto:
    """Infer types and shapes, strictly; declared shapes that contradict the inference are inferred anew, as onnxruntime does."""
    failure: Exception | None = None
    replaced = _stand_in(model)
    for hints, propagate in ((True, True), (False, True), (False, False)):
        attempt = model if hints else _without_hints(model)
        try:
            result = shape_inference.infer_shapes(attempt, check_type=True, strict_mode=True, data_prop=propagate)
        except (shape_inference.InferenceError, RuntimeError) as error:
            failure = failure or error
            continue
        for node in nodes(result.graph):
            if node.name in replaced:
                node.CopyFrom(replaced[node.name])
        return result
    text = " ".join(str(failure).split())
    raise UsageError(
        f"the model's types or shapes contradict each other: {text[:400]}", at=f"'{path}'", fix="correct the named node and export again"
    )


def _stand_in(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Let Identity stand in for operators that keep the shape but whose shape onnx does not infer; return the originals."""
    originals: dict[str, onnx.NodeProto] = {}
    for node in nodes(model.graph):
        if node.op_type == "GroupNormalization" and not node.domain:
            originals[node.name] = onnx.NodeProto()
            originals[node.name].CopyFrom(node)
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    return originals


def _without_hints(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for graph in graphs(result.graph):
        del graph.value_info[:]
    for value in result.graph.output:
        value.type.tensor_type.ClearField("shape")
    return result


def _check(model: onnx.ModelProto, path: str) -> None:
    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    for value in checked.graph.output:
        # onnxruntime and TensorRT accept an output without a declared shape, onnx's checker does not.
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
    try:
        # A function may import another opset than the graph; the inliner converts it.
        checker.check_model(checked, skip_opset_compatibility_check=bool(model.functions))
    except checker.ValidationError as error:
        text = " ".join(str(error).split())
        raise UsageError(
            f"the model is not valid ONNX: {text[:400]}", at=f"'{path}'", fix="correct what is named here and export again"
        ) from error
