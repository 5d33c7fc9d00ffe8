"""Fuse the DequantizeLinear before DCNv3 and the QuantizeLinear behind it into the operator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.dcnv3 import DEQUANTIZED, MASK, OFFSET, PLAIN, REQUANTIZED, X, attributes_of, make_node, nodes_of, provide_functions
from deploycc.core.graph import constant, inherit_metadata, remove_dead_nodes, replace_value, sole_consumer
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite


@dataclass(frozen=True, slots=True)
class FuseDcnv3Quantizers:
    """Fuse the DequantizeLinear before DCNv3 and the QuantizeLinear behind it into the operator.

    Why: the kernel reads INT8 values directly, a quarter of the traffic of FP32, and multiplies each result by the scale once.

    Before / After:
        ``DCNv3(DequantizeLinear(q, s), offset, mask)`` / ``DCNv3DQ<x_scale=s>(q, offset, mask)``
        ``QuantizeLinear(DCNv3(DequantizeLinear(q, s), offset, mask), t)`` / ``DCNv3DQQ<x_scale=s, y_scale=t>(q, offset, mask)``

    Declines when:
        TYPE: x is not INT8, or offsets and masks are not FP16: there is no kernel for other combinations.
        SCALE: the scale is not one constant number, or a zero point is not zero.

    Options: none.

    See: ``deploycc.core.dcnv3``; rules R1 and R4.
    """

    phase: ClassVar[Phase] = "lower"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        results = [_fuse(model.graph, node) for node in nodes_of(model) if node.op_type == PLAIN]
        rewrites = tuple(r for r in results if isinstance(r, Rewrite))
        if rewrites:
            provide_functions(model)
        return PassResult(rewrites, tuple(r for r in results if isinstance(r, Decline)))


def _fuse(graph: ir.Graph, node: ir.Node) -> Rewrite | Decline | None:
    name, x = node.name or "", node.inputs[X]
    source = x.producer() if x is not None else None
    if source is None or source.op_type != "DequantizeLinear" or source.inputs[0] is None:
        return None
    codes, scale = source.inputs[0], _scale(source)
    if codes.dtype != ir.DataType.INT8 or any(
        v is None or v.dtype != ir.DataType.FLOAT16 for v in (node.inputs[OFFSET], node.inputs[MASK])
    ):
        return Decline(name, "TYPE", "the kernel for INT8 values takes offsets and masks in FP16")
    if scale is None:
        return Decline(name, "SCALE", f"'{source.name}' has no single constant scale with zero point zero")
    behind = sole_consumer(node.outputs[0])
    step = _scale(behind) if behind is not None and behind.op_type == "QuantizeLinear" and _is_int8(behind) else None
    last = behind if behind is not None and step is not None else node
    what = replace(attributes_of(node), x_scale=scale, y_scale=step or 1.0)
    operands = [codes, *(v for v in node.inputs[OFFSET:] if v is not None)]
    made = make_node(operands, what, name=node.name, operator=DEQUANTIZED if step is None else REQUANTIZED)
    old, new = last.outputs[0], made.outputs[0]
    new.name, new.type, new.shape = f"{node.outputs[0].name}_fused", old.type or ir.TensorType(ir.DataType.INT8), old.shape
    inherit_metadata(made, [node, source, *([] if last is node else [last])])
    graph.insert_before(last, made)
    replace_value(old, new)
    graph.remove([last] if last is node else [last, node], safe=True)
    remove_dead_nodes(graph, [source])
    return Rewrite(name, "reads INT8" if step is None else "reads and writes INT8", "products in FP32 instead of one rounding per value")


def _is_int8(quantize: ir.Node) -> bool:
    return quantize.outputs[0].dtype == ir.DataType.INT8 or (
        len(quantize.inputs) > 2 and quantize.inputs[2] is not None and quantize.inputs[2].dtype == ir.DataType.INT8
    )


def _scale(node: ir.Node) -> float | None:
    """Return the scale of a Q or DQ node that has one number for the whole tensor and the zero point zero, else None."""
    scale = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = constant(zero)
    if scale is None or scale.size != 1 or (zero is not None and (zeros is None or np.any(zeros))):
        return None
    return float(scale.astype(np.float32).reshape(-1)[0])
