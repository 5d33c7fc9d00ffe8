"""Operands of DCNv3 and models of one node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime

from deploycc.core.dcnv3 import PLAIN
from plugins_trt.dcnv3 import DCNv3, make_node, provide_functions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAMES = ("x", "offset", "mask", "center")
AXES = {"x": ["N", "H", "W", "C"], "offset": ["N", "Ho", "Wo", "O"], "mask": ["N", "Ho", "Wo", "M"], "center": ["N", "Ho", "Wo", "G"]}


def operands(
    what: DCNv3, size: Sequence[int], *, seed: int = 0, spread: float = 2.0, dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x [N, H, W, C] of ``size``, offsets of ``spread`` pixels, and masks that sum to one or logits."""
    draw = np.random.default_rng(seed)
    head = (size[0], *what.output_size(size[1], size[2]))
    x = draw.standard_normal(size).astype(dtype)
    if what.record:
        width = what.record_width
        record = draw.standard_normal((*head, what.group, width))
        record[..., : 2 * what.points] *= spread
        record = record.reshape(*head, what.group * width).astype(dtype)
        return x, record, record
    offset = (draw.standard_normal((*head, what.group * what.points * 2)) * spread).astype(dtype)
    mask = draw.standard_normal((*head, what.group, what.points))
    if not what.softmax:
        mask = np.exp(mask) / np.exp(mask).sum(-1, keepdims=True)
    return x, offset, mask.reshape(*head, what.group * what.points).astype(dtype)


def model(what: DCNv3, *, opset: int = 20, operator: str = PLAIN, types: Mapping[str, str] | None = None) -> ir.Model:
    """Return a model whose only node is the operator, with dynamic shapes."""
    kinds = {name: ir.DataType[(types or {}).get(name, "FLOAT")] for name in (*NAMES, "y")}
    names = NAMES[: 4 if operator == "DCNv3Center" else 3]
    inputs = [ir.Value(name=n, type=ir.TensorType(kinds[n]), shape=ir.Shape(AXES[n])) for n in names]
    node = make_node(inputs, what, name="dcn", operator=operator)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(kinds["y"]), ir.Shape(["N", "Ho", "Wo", "C"])
    made = ir.Model(ir.Graph(inputs, [output], nodes=[node], opset_imports={"": opset}, name="one"), ir_version=10)
    provide_functions(made)
    return made


def parsed(inputs: str, outputs: str, body: str, weights: Mapping[str, np.ndarray], *, opset: int = 20) -> ir.Model:
    """Parse the body of a graph in ONNX text, whose nodes may be of the domain deploycc, with ``weights`` as initializers."""
    fed = ", ".join(f"float[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items())
    made = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": {opset}, "deploycc": 1]> g ({inputs}{", " if fed else ""}{fed}) => ({outputs}) {{ {body} }}'
    )
    for value in [v for v in made.graph.inputs if v.name in weights]:
        made.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name or ""].astype(np.float32), name=value.name)
        made.graph.register_initializer(value)
    for node in made.graph:
        node.name = node.outputs[0].name
        node.outputs[0].type = node.outputs[0].type or ir.TensorType(ir.DataType.FLOAT)
    provide_functions(made)
    return made


def session(made: ir.Model) -> onnxruntime.InferenceSession:
    """Return a CPU session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), options, providers=["CPUExecutionProvider"])


def execute(made: ir.Model, *arrays: np.ndarray) -> np.ndarray:
    """Run a model of one node on ``arrays``, in the order of its inputs."""
    feeds = {value.name: array for value, array in zip(made.graph.inputs, arrays, strict=True)}
    return np.asarray(session(made).run(None, feeds)[0])


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest error in units of the largest magnitude."""
    return float(np.abs(found.astype(np.float64) - exact).max() / np.abs(exact).max())
