"""The portable form of a built model: the same graph in FP32 only, in an opset that old runtimes read.

Q/DQ pairs on activations go away, quantized weights keep the values that they stand for, 16-bit types become FP32. What
remains is what the model computes up to the rounding of activations, for runtimes that know neither Q/DQ nor FP16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploycc.core.blocks import is_block_operator
from deploycc.core.errors import BackendError
from deploycc.interop import save_model
from deploycc.serve.opset import NoOlderForm, lower_opset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPSET = 13
NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def write_portable(model: ir.Model, out: Path) -> str:
    """Write the portable form of ``model`` to ``out``, in opset 13 where its operators exist there.

    Returns:
        What the reader should know: empty, or why the file kept a newer opset.

    Raises:
        BackendError: when the model cannot be written without low precision, naming what keeps it there.
    """
    wide, note = widened(model), ""
    older = wide.clone()
    try:
        lower_opset(older, OPSET)
        wide = older
    except NoOlderForm as error:
        note = f"kept in opset {wide.opset_imports.get('', 0)}: {error}"
    common.RemoveUnusedNodesPass()(wide)
    save_model(wide, out)
    return note


def widened(model: ir.Model) -> ir.Model:
    """Return ``model`` with FP32 in place of Q/DQ and 16-bit types.

    Raises:
        BackendError: when an input or output is of 16 bits, codes are used other than by ``DequantizeLinear``, or TensorRT's operators for
            formats in blocks are used.
    """
    _check_borders(model)
    model = model.clone()
    for node in _nodes(model):
        if node.op_type == "DequantizeLinear":
            _bypass(node)
    for value in _values(model):
        if value.dtype in NARROW:
            value.type = ir.TensorType(ir.DataType.FLOAT)  # The clone shares its types with the original.
            if value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for node in _nodes(model):
        _widen_attributes(node)
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype == ir.DataType.FLOAT:
            _make_identity(node, node.inputs[0])
        _state_kernel(node)
    for tidy in (common.IdentityEliminationPass(), common.RemoveUnusedNodesPass()):
        tidy(model)
    return model


def _check_borders(model: ir.Model) -> None:
    if own := next((n for n in _nodes(model) if is_block_operator(n)), None):
        fix = "serve the engine, or build in another format for ONNX Runtime"
        raise BackendError(f"node '{own.name}' is TensorRT's own operator {own.op_type}", at="the portable form", fix=fix)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype in NARROW:
            raise BackendError(
                f"'{value.name}' is {value.dtype}", at="the portable form", fix="export the model with FP32 inputs and outputs"
            )


def _bypass(node: ir.Node) -> None:
    """Let ``node``, which dequantizes, pass on what was quantized; or make it the constant that its codes stand for."""
    codes = node.inputs[0]
    producer = codes.producer() if codes is not None else None
    if codes is not None and codes.const_value is not None:
        graph = node.graph
        constant = ir.Value(name=f"{codes.name}_decoded", type=ir.TensorType(ir.DataType.FLOAT))
        constant.const_value = ir.Tensor(_decoded(node), name=constant.name)
        constant.shape = ir.Shape(constant.const_value.shape)
        if not isinstance(graph, ir.Graph):
            raise BackendError(f"node '{node.name}' dequantizes inside a function", at="the portable form", fix="inline the function")
        graph.register_initializer(constant)
        _make_identity(node, constant)
    elif producer is not None and producer.op_type == "QuantizeLinear" and producer.inputs[0] is not None:
        _make_identity(node, producer.inputs[0])
    else:
        raise BackendError(
            f"node '{node.name}' dequantizes codes that no QuantizeLinear made",
            at="the portable form",
            fix="none; serve model.onnx instead",
        )


def _decoded(node: ir.Node) -> np.ndarray:
    """Return the constant that a DequantizeLinear computes, as ONNX defines it (per tensor, per axis or in blocks)."""
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    tensors = {v.name or "": v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None}
    for name, array in tensors.items():
        tensors[name] = array.astype(np.float32) if array.dtype == np.float16 or array.dtype.name == "bfloat16" else array
    del proto.attribute[:]
    proto.attribute.extend(a for a in ir.to_proto(node).attribute if a.name in {"axis", "block_size"})
    (result,) = ReferenceEvaluator(proto).run(None, tensors)
    return np.asarray(result, np.float32)


def _make_identity(node: ir.Node, source: ir.Value) -> None:
    node.resize_inputs(1)
    node.replace_input_with(0, source)
    node.op_type = "Identity"
    node.attributes.clear()


def _widen_attributes(node: ir.Node) -> None:
    """Turn constants and types of 16 bits in the attributes of ``node`` into FP32."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in NARROW:
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(attribute.value.numpy().astype(np.float32)))
        elif node.op_type == "Cast" and name == "to" and ir.DataType(attribute.value) in NARROW:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))


def _state_kernel(node: ir.Node) -> None:
    """Write the kernel's size into a convolution, which ONNX leaves to the weight's shape and old runtimes do not."""
    weight = node.inputs[1] if node.op_type in {"Conv", "ConvTranspose"} else None
    if weight is not None and weight.shape is not None and "kernel_shape" not in node.attributes:
        node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [int(d) for d in weight.shape[2:] if isinstance(d, int)])


def _nodes(model: ir.Model) -> list[ir.Node]:
    return list(ir.traversal.RecursiveGraphIterator(model.graph))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from (*graph.inputs, *graph.initializers.values())
    for node in _nodes(model):
        yield from node.outputs
