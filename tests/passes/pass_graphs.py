"""Small graphs as text, what they compute, and a form in which two of them can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from deploycc.core.contract import CANONICAL
from deploycc.core.dcnv3 import provide_functions
from deploycc.core.passes import Pass, PassRecord, run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def graph(text: str, *, opset: int = 20) -> ir.Model:
    """Parse ``(inputs) => (outputs) <initializers> { nodes }``, name each node after its output, and infer the shapes.

    Nodes may be of the domains deploycc, whose functions are added, and mmdeploy.
    """
    domains = "".join(f', "{domain}": 1' for domain in ("deploycc", "mmdeploy") if f"{domain}." in text)
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}{domains}]> g {text}')
    for node in proto.graph.node:
        node.name = node.name or f"n_{node.output[0]}"
    if domains:
        model = ir.serde.deserialize_model(proto)
        provide_functions(model)
        proto = ir.serde.serialize_model(model)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def apply(model: ir.Model, *passes: Pass) -> ir.Model:
    """Run passes as a transaction, with the contract checked."""
    return run(model, passes, contract=CANONICAL)[0]


def record(model: ir.Model, each: Pass) -> PassRecord:
    """Return the record of a single pass."""
    return run(model, [each], contract=CANONICAL)[1][0]


def codes(model: ir.Model, each: Pass) -> list[str]:
    """Return the decline codes of a single pass."""
    return [d.code for d in record(model, each).declines]


def described(model: ir.Model) -> list[str]:
    """Return one line per node, with constants in place and inner values numbered, so that names do not matter."""
    names = {v: v.name for v in model.graph.inputs}
    names.update({v: f"out:{v.name}" for v in model.graph.outputs})
    lines = []
    for node in model.graph:
        for value in node.outputs:
            names.setdefault(value, f"%{len(names)}")
        attributes = {k: _plain(a.value) for k, a in sorted(node.attributes.items())}
        inputs = ", ".join("_" if v is None else _shown(v, names) for v in node.inputs)
        lines.append(f"{', '.join(str(names[v]) for v in node.outputs)} = {node.op_type}({inputs}) {attributes or ''}".strip())
    return lines


def assert_same(found: ir.Model, expected: ir.Model) -> None:
    """Check that two graphs are equal but for the names of their nodes and inner values."""
    assert described(found) == described(expected)


def operators(model: ir.Model) -> list[str]:
    """Return the operator of every node."""
    return [n.op_type for n in model.graph]


def compute(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run the reference implementation."""
    outputs = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, dict(feeds))
    return [np.asarray(o) for o in outputs]


def execute(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run the graph as it is in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    payload = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds))  # type: ignore[no-any-return]


def assert_close(before: ir.Model, after: ir.Model, *shapes: Sequence[int], roundings: int, seed: int = 0) -> None:
    """Check that both compute the same from random inputs, up to ``roundings`` FP32 roundings of the largest output."""
    rng = np.random.default_rng(seed)
    feeds = {v.name: rng.standard_normal(s).astype(np.float32) for v, s in zip(before.graph.inputs, shapes, strict=True)}
    for one, other in zip(execute(before, feeds), execute(after, feeds), strict=True):
        bound = roundings * np.finfo(np.float32).eps * max(1.0, float(np.max(np.abs(one), initial=0.0)))
        assert one.shape == other.shape
        assert np.max(np.abs(one - other), initial=0.0) <= bound


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value.numpy().tolist() if isinstance(value, ir.TensorProtocol) else value


def _shown(value: ir.Value, names: Mapping[ir.Value, str | None]) -> str:
    if value in names or value.const_value is None:
        return str(names.get(value, value.name))
    array = value.const_value.numpy()
    return f"{np.asarray(array).tolist() if array.dtype.kind in 'iub' else np.round(array.astype(np.float64), 5).tolist()}:{array.dtype}"
