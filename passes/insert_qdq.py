"""Insert Q/DQ pairs where the PrecisionPlan asks for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from deploycc.core.blocks import (
    DOMAIN,
    OPSETS,
    block_axis,
    block_size,
    dynamic_quantizer,
    is_block_operator,
    quantize_blocks,
    stored_dequantizer,
)
from deploycc.core.graph import add_initializer, constant, fresh_name, is_constant, rank, taken_names
from deploycc.core.identity import adopt_pairs
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite
from deploycc.core.placement import takes_codes, weight_axis
from deploycc.core.quantizers import quantize_weight, scale_like

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deploycc.core.formats import Format
    from deploycc.core.plan import Assignment, PrecisionPlan, Region


FLOAT4_IR_VERSION = 11


@dataclass(frozen=True, slots=True)
class InsertQdq:
    """Insert ``QuantizeLinear``/``DequantizeLinear`` at the operands of every region that the plan quantizes.

    Why: precision lives in the graph and nowhere else; TensorRT turns DQ-op patterns into low-precision kernels.

    Before / After:
        ``Conv(x, w)`` / ``Conv(DQ(Q(x)), DQ(w_int8))``; the pair on ``x`` is shared by all readers of that format (P9).
        ``MatMul(x, w)`` / ``MatMul(x, DQ(w_int4))`` with a scale per block of K, where only weights are quantized; NVFP4 and MXFP8
        quantize ``x`` by TensorRT's operator, which finds the scale of each block as the engine runs.

    Declines when:
        NO_SCALE: a region lacks a scale; then nothing of it is quantized.
        NO_NODE: a region lacks an anchor; likewise.
        NO_BLOCKS: the weight of an anchor is no matrix of whole blocks; likewise.

    Options:
        plan: the PrecisionPlan to obey.

    See: rules P1, P4, P9, R5, R6, R9, R13 in ``deploycc.core.rules``.
    """

    plan: PrecisionPlan = field(repr=False)
    phase: ClassVar[Phase] = "quantize"
    after: ClassVar[tuple[str, ...]] = ("round-weights",)

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        writer = _Writer(model.graph, self.plan)
        for assignment in self.plan.assignments:
            if assignment.format.is_quantized:
                writer.quantize(assignment)
        writer.raise_opsets()
        if any(f.onnx_type == "FLOAT4E2M1" for f in writer.formats):
            model.ir_version = max(model.ir_version, FLOAT4_IR_VERSION)
        return PassResult(tuple(writer.rewrites), tuple(writer.declines))


class _Writer:
    """Holds the pairs inserted so far, so that they are shared."""

    def __init__(self, graph: ir.Graph, plan: PrecisionPlan) -> None:
        self.graph, self.plan = graph, plan
        self.nodes = {n.name or "": n for n in graph}
        self.node_names, self.value_names = set(self.nodes), taken_names(graph)
        self.pairs: dict[tuple[str, str], ir.Value] = {}
        self.weights: dict[tuple[str, str, int], ir.Value] = {}
        self.formats: set[Format] = set()
        self.rewrites: list[Rewrite] = []
        self.declines: list[Decline] = []

    def raise_opsets(self) -> None:
        """Import the operators of the formats that were inserted: opsets rise only as far as a format needs (R9)."""
        imports = self.graph.opset_imports
        imports[""] = max([imports.get("", 0), *(OPSETS[f.name] for f in self.formats if f.block)])
        if any(f.activations == "dynamic" for f in self.formats):
            imports[DOMAIN] = 1

    def quantize(self, assignment: Assignment) -> None:
        """Quantize every operand of every anchor and the residuals, or nothing of the region."""
        region, format = assignment.region, assignment.format
        operands = [(n, i) for n, i in self._operands(region, format) if format.activations != "none" or is_constant(n.inputs[i])]
        declines = [
            Decline(n, "NO_NODE", f"the plan names '{n}', which the graph does not have") for n in region.anchors if n not in self.nodes
        ]
        for node, i in operands:
            value = node.inputs[i]
            if value is None or _is_dequantized(value):
                continue
            if format.block and is_constant(value) and not _fills_blocks(node, value, format):
                declines.append(Decline(value.name or "", "NO_BLOCKS", f"'{value.name}' does not fill whole blocks of {format.name}"))
            if format.reach is not None and not is_constant(value) and self._scale(value, format) is None:
                declines.append(Decline(value.name or "", "NO_SCALE", f"the plan has no {format.name} scale for '{value.name}'"))
        if declines:
            self.declines.extend(declines)
            return
        self.formats.add(format)
        changed = [node.name or "" for node, i in operands if self._quantize_operand(node, i, format)]
        proof = f"|error| <= scale/2 per operand in range ({format.name})"
        self.rewrites.extend(Rewrite(name, f"{format.name} operands", proof) for name in dict.fromkeys(changed))

    def _operands(self, region: Region, format: Format) -> Iterator[tuple[ir.Node, int]]:
        """Yield what the region quantizes: both operands of its anchors (P1), of a residual Add the skip (P4), of DCNv3 its x."""
        anchors = [self.nodes[name] for name in region.anchors if name in self.nodes]
        yield from ((anchor, i) for anchor in anchors for i in (0, 1))
        for node in (self.nodes[name] for name in region.nodes if name in self.nodes):
            if takes_codes(node, format):
                yield from ((node, i) for i, v in enumerate(node.inputs) if v is not None and v.name in region.residuals)

    def _scale(self, value: ir.Value, format: Format) -> float | None:
        return self.plan.scales.get(value.name or "", {}).get(format.name) if format.reach is not None else None

    def _quantize_operand(self, node: ir.Node, i: int, format: Format) -> bool:
        """Let operand ``i`` of ``node`` come from a DequantizeLinear; return whether it did not already."""
        value = node.inputs[i]
        if value is None or _is_dequantized(value):
            return False
        weight = constant(value)
        node.replace_input_with(i, self._activation(value, format) if weight is None else self._weight(node, value, weight, format))
        adopt_pairs(node, i)
        return True

    def _activation(self, value: ir.Value, format: Format) -> ir.Value:
        """Return the dequantized copy of ``value``, inserting the pair once."""
        stem = f"{value.name}_{format.name}"
        key = (value.name or "", format.name)
        if key not in self.pairs:
            given = self._scale(value, format)
            scale = None if given is None else add_initializer(self.graph, f"{stem}_scale", scale_like(_dtype(value), given))
            if format.activations == "dynamic" or scale is None:
                self.pairs[key] = self._insert(dynamic_quantizer(value, format=format, scale=scale), stem, after=value.producer())
                return self.pairs[key]
            zero = self._zero(f"{stem}_zero_point", format)
            quantize = self._node("QuantizeLinear", [value, scale, zero], stem, value)
            quantize.outputs[0].type = ir.TensorType(getattr(ir.DataType, format.onnx_type))
            dequantize = self._node("DequantizeLinear", [quantize.outputs[0], scale, zero], stem, value)
            self._place([quantize, dequantize], after=value.producer())
            self.pairs[key] = dequantize.outputs[0]
        return self.pairs[key]

    def _weight(self, anchor: ir.Node, value: ir.Value, weight: np.ndarray, format: Format) -> ir.Value:
        """Return the dequantized weight; the codes replace the floats in the file (R13)."""
        axis, stem = weight_axis(anchor), f"{value.name}_{format.name}"
        key = (value.name or "", format.name, axis)
        if key not in self.weights and format.block:
            self.weights[key] = self._blocks(value, weight, axis, format)
        elif key not in self.weights:
            codes, scale = quantize_weight(weight, axis=axis, format=format, base=self.plan.base)
            stored = add_initializer(self.graph, stem, codes, getattr(ir.DataType, format.onnx_type))
            scales = add_initializer(self.graph, f"{stem}_scale", scale_like(weight.dtype, scale))
            zero = self._zero(f"{stem}_zero_point", format, scale.shape)
            node = self._node("DequantizeLinear", [stored, scales, zero], stem, value, {"axis": axis})
            self.graph.insert_before(self.graph[0], node)
            self.weights[key] = node.outputs[0]
        return self.weights[key]

    def _blocks(self, value: ir.Value, weight: np.ndarray, axis: int, format: Format) -> ir.Value:
        """Return the dequantized weight, stored in blocks along K (R6)."""
        stem = f"{value.name}_{format.name}"
        found = quantize_blocks(weight, axis=block_axis(axis), format=format, base=self.plan.base)
        stored = add_initializer(self.graph, stem, found.codes, getattr(ir.DataType, format.onnx_type))
        scale = found.scale if found.scale.dtype != np.float32 else scale_like(weight.dtype, found.scale)
        scales = add_initializer(self.graph, f"{stem}_scale", scale)
        whole = None if found.whole is None else add_initializer(self.graph, f"{stem}_whole", scale_like(weight.dtype, found.whole))
        return self._insert(stored_dequantizer(stored, scales, whole, blocks=found, like=value), stem, after=None)

    def _insert(self, nodes: tuple[ir.Node, ...], stem: str, *, after: ir.Node | None) -> ir.Value:
        """Name ``nodes`` and their outputs, put them into the graph, and return what the last one gives."""
        for node in nodes:
            node.name = fresh_name(f"{stem}_{node.op_type}", self.node_names)
            for out in node.outputs:
                out.name = fresh_name(f"{stem}_{'dq' if node is nodes[-1] else 'q'}", self.value_names)
        self._place(nodes, after=after)
        return nodes[-1].outputs[0]

    def _place(self, nodes: Sequence[ir.Node], *, after: ir.Node | None) -> None:
        """Put ``nodes`` behind ``after``, at the front where that is None."""
        if after is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(after, nodes)

    def _zero(self, name: str, format: Format, shape: tuple[int, ...] = ()) -> ir.Value:
        dtype = np.int8 if format.onnx_type == "INT8" else ml_dtypes.float8_e4m3fn
        return add_initializer(self.graph, name, np.zeros(shape, dtype), getattr(ir.DataType, format.onnx_type))

    def _node(self, op: str, inputs: list[ir.Value], stem: str, like: ir.Value, attributes: dict[str, int] | None = None) -> ir.Node:
        node = ir.node(op, inputs, attributes or {}, name=fresh_name(f"{stem}_{op}", self.node_names))
        node.outputs[0].name = fresh_name(f"{stem}_{'q' if op == 'QuantizeLinear' else 'dq'}", self.value_names)
        node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
        return node


def _dtype(value: ir.Value) -> np.dtype:
    return np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and (producer.op_type == "DequantizeLinear" or is_block_operator(producer))


def _fills_blocks(node: ir.Node, value: ir.Value, format: Format) -> bool:
    if node.op_type not in {"MatMul", "Gemm"} or rank(value) != 2 or value.shape is None:
        return False
    return block_size(format, int(value.shape[block_axis(weight_axis(node))])) > 0  # type: ignore[arg-type]
