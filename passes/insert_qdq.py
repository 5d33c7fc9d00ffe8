"""Insert Q/DQ pairs where the PrecisionPlan asks for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from deploycc.core.formats import Format
from deploycc.core.graph import add_initializer, constant
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite
from deploycc.core.placement import weight_axis
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.quantizers import quantize_weight


@dataclass(frozen=True, slots=True)
class InsertQdq:
    """Insert ``QuantizeLinear``/``DequantizeLinear`` at the operands of every region that the plan quantizes.

    Why: precision lives in the graph and nowhere else; TensorRT turns DQ-op patterns into low-precision kernels.
    Before: ``y = Conv(x, w)``. After: ``y = Conv(DQ(Q(x)), DQ(w_int8))``; the pair on ``x`` is shared by all readers of that format (P9).
    Declines when: a scale is missing (NO_SCALE), or an anchor named by the plan is not in the graph (NO_NODE).
    Options: plan, the PrecisionPlan to obey.
    See: rules P1, P4, P9, R5, R13 in ``deploycc.core.rules``.
    """

    plan: PrecisionPlan = field(repr=False)
    phase: ClassVar[Phase] = "quantize"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        writer = _Writer(model.graph, self.plan)
        for assignment in self.plan.assignments:
            if assignment.format.is_quantized:
                writer.quantize(assignment)
        return PassResult(tuple(writer.rewrites), tuple(writer.declines))


class _Writer:
    """Holds the pairs inserted so far, so that they are shared."""

    def __init__(self, graph: ir.Graph, plan: PrecisionPlan) -> None:
        self.graph, self.plan = graph, plan
        self.nodes = {n.name: n for n in graph}
        self.pairs: dict[tuple[str, str], ir.Value] = {}
        self.weights: dict[tuple[str, str, int], ir.Value] = {}
        self.rewrites: list[Rewrite] = []
        self.declines: list[Decline] = []

    def quantize(self, assignment: Assignment) -> None:
        """Quantize every operand of every anchor, then the residuals."""
        region, format = assignment.region, assignment.format
        for name in region.anchors:
            anchor = self.nodes.get(name)
            if anchor is None:
                self.declines.append(Decline(name, "NO_NODE", f"the plan names '{name}', which the graph does not have"))
                continue
            for i in (0, 1):
                self._operand(anchor, i, format)
            self.rewrites.append(Rewrite(name, f"{format.name} operands", f"|error| <= scale/2 per operand in range ({format.name})"))
        for name in region.residuals:
            self._residual(region.nodes, name, format)

    def _operand(self, anchor: ir.Node, i: int, format: Format) -> None:
        value = anchor.inputs[i]
        if value is None:
            return
        weight = constant(value)
        replacement = self._weight(anchor, value, weight, format) if weight is not None else self._activation(value, format)
        if replacement is not None:
            anchor.replace_input_with(i, replacement)

    def _residual(self, members: tuple[str, ...], name: str, format: Format) -> None:
        for node in (self.nodes.get(member) for member in members):
            if node is None or node.op_type != "Add":
                continue
            for i, value in enumerate(node.inputs):
                if value is not None and value.name == name and (pair := self._activation(value, format)) is not None:
                    node.replace_input_with(i, pair)

    def _activation(self, value: ir.Value, format: Format) -> ir.Value | None:
        """Return the dequantized copy of ``value``, inserting the pair once."""
        name = value.name or ""
        if (name, format.name) in self.pairs:
            return self.pairs[name, format.name]
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            return value
        scale = self.plan.scales.get(name, {}).get(format.name)
        if scale is None:
            self.declines.append(Decline(name, "NO_SCALE", f"the plan has no {format.name} scale for '{name}'"))
            return None
        scale_value = add_initializer(self.graph, f"{name}_{format.name}_scale", np.array(scale, np.float32))
        zero = self._zero(f"{name}_{format.name}_zero_point", format)
        quantize = self._node("QuantizeLinear", [value, scale_value, zero], f"{name}_{format.name}", value)
        quantize.outputs[0].type = ir.TensorType(getattr(ir.DataType, format.onnx_type))
        dequantize = self._node("DequantizeLinear", [quantize.outputs[0], scale_value, zero], f"{name}_{format.name}", value)
        if producer is None:
            self.graph.insert_before(self.graph[0], [quantize, dequantize])
        else:
            self.graph.insert_after(producer, [quantize, dequantize])
        self.pairs[name, format.name] = dequantize.outputs[0]
        return dequantize.outputs[0]

    def _weight(self, anchor: ir.Node, value: ir.Value, weight: np.ndarray, format: Format) -> ir.Value:
        """Return the dequantized weight; the codes replace the floats in the file (R13)."""
        axis, name = weight_axis(anchor), value.name or ""
        key = (name, format.name, axis)
        if key not in self.weights:
            codes, scale = quantize_weight(weight, axis=axis, format=format, base=self.plan.base)
            data_type = getattr(ir.DataType, format.onnx_type)
            stored = add_initializer(self.graph, f"{name}_{format.name}", codes, data_type)
            scales = add_initializer(self.graph, f"{name}_{format.name}_scale", scale)
            zero = self._zero(f"{name}_{format.name}_zero_point", format, scale.shape)
            node = self._node("DequantizeLinear", [stored, scales, zero], f"{name}_{format.name}", value, {"axis": axis})
            self.graph.insert_before(self.graph[0], node)
            self.weights[key] = node.outputs[0]
        return self.weights[key]

    def _zero(self, name: str, format: Format, shape: tuple[int, ...] = ()) -> ir.Value:
        dtype = np.int8 if format.onnx_type == "INT8" else ml_dtypes.float8_e4m3fn
        return add_initializer(self.graph, name, np.zeros(shape, dtype), getattr(ir.DataType, format.onnx_type))

    def _node(self, op: str, inputs: list[ir.Value], stem: str, like: ir.Value, attributes: dict[str, int] | None = None) -> ir.Node:
        node = ir.node(op, inputs, attributes or {}, name=f"{stem}_{op}")
        node.outputs[0].name = f"{stem}_{'q' if op == 'QuantizeLinear' else 'dq'}"
        node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
        return node
