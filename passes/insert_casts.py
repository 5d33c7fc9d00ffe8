"""Put the graph into the plan's 16-bit base format, with FP32 islands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.blocks import MX_DEQUANTIZE, is_block_operator
from deploycc.core.dcnv3 import MASK, OFFSET, is_dcnv3
from deploycc.core.formats import BF16
from deploycc.core.graph import FLOAT_TYPES, add_initializer, constant, fresh_name, taken_names
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite
from deploycc.core.quantizers import largest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycc.core.plan import PrecisionPlan

# Ops that TensorRT computes well in 16 bits. Everything else (Pow, Exp, Log, sums of squares, comparisons) stays in FP32.
# fmt: off
SIXTEEN_BIT_OPS = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Conv", "ConvTranspose", "DepthToSpace", "DequantizeLinear",
    "Div", "Dropout", "Elu", "Erf", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool",
    "GlobalMaxPool", "GridSample", "GroupNormalization", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
    "LayerNormalization", "LeakyRelu", "MatMul", "Max", "MaxPool", "Min", "Mish", "Mul", "Neg", "PRelu", "Pad", "QuantizeLinear",
    "ReduceMax", "ReduceMean", "ReduceMin", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Softmax", "Softplus", "SpaceToDepth",
    "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
})
# fmt: on
# Operands that the standard types as float32 whatever the type of the data.
_FLOAT32_OPERANDS = {"Resize": {1, 2}}
_RETYPED = FLOAT_TYPES - {ir.DataType.DOUBLE}
_MASK_READERS = frozenset({"Add", "Where", "Max", "Min", "Clip", "Pad"})


@dataclass(frozen=True, slots=True)
class InsertCasts:
    """Compute in the plan's base format by ``Cast`` at the borders of 16-bit islands.

    Why: strongly typed networks (TensorRT 11, TensorRT-RTX) take types from the graph; an uncast graph runs in FP32.

    Before / After:
        ``Relu(Conv(x, w))`` / ``Cast_fp32(Relu(Conv(Cast_fp16(x), w_fp16)))``; inputs and outputs keep their types.

    Declines when:
        RANGE: a weight exceeds the largest FP16 number, so that its op stays in FP32.
        SUBGRAPH: the op has subgraphs, whose bodies keep their types.

    Options:
        plan: holds the base format and the FP32 islands with their reasons.

    See: rules R7, S9, N1, D1 and D2 in ``deploycc.core.rules``.
    """

    plan: PrecisionPlan = field(repr=False)
    phase: ClassVar[Phase] = "quantize"
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        if self.plan.base.bits == 32 and not any(v.dtype in _RETYPED - {ir.DataType.FLOAT} for v in _values(model.graph)):
            return PassResult()
        caster = _Caster(model.graph, self.plan)
        for node in list(model.graph):
            caster.retype(node)
        caster.restore_outputs()
        if self.plan.base == BF16:
            # BF16 convolutions are in the standard from opset 22 on (rule R9); nothing else that is here changed its meaning.
            model.graph.opset_imports[""] = max(22, model.graph.opset_imports.get("", 0))
        return PassResult(tuple(caster.rewrites), tuple(caster.declines))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs))


class _Caster:
    """Retypes nodes in topological order and shares casts."""

    def __init__(self, graph: ir.Graph, plan: PrecisionPlan) -> None:
        self.graph, self.plan = graph, plan
        self.low: ir.DataType = getattr(ir.DataType, plan.base.onnx_type)
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.original: dict[ir.Value, ir.DataType] = {}
        self.node_names, self.value_names = {n.name or "" for n in graph}, taken_names(graph)
        self.output_types = [(v, v.dtype) for v in graph.outputs]
        self.rewrites: list[Rewrite] = []
        self.declines: list[Decline] = []

    def retype(self, node: ir.Node) -> None:
        """Give one node operands of one float type, and set the type of its outputs."""
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            self._restore_operands(node)
            return
        if is_block_operator(node) and node.op_type == MX_DEQUANTIZE:
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(self.low))
            node.outputs[0].type = ir.TensorType(self.low)
        floats = {i: v for i, v in enumerate(node.inputs) if v is not None and v.dtype in _RETYPED}
        # A Cast takes any type, and rounding before one to integers would change the integers.
        if node.op_type == "Cast" or not floats:
            return
        wanted = self.low if self._goes_low(node) else ir.DataType.FLOAT
        types = {i: ir.DataType.FLOAT if i in self._float32_operands(node) else wanted for i in floats}
        wrong = {i: v for i, v in floats.items() if v.dtype != types[i]}
        for i, value in wrong.items():
            node.replace_input_with(i, self._cast(value, types[i]))
        changed = [v for v in node.outputs if v.dtype in _RETYPED and v.dtype != wanted]
        for value in changed:
            self.original[value] = value.dtype or ir.DataType.FLOAT
            value.type = ir.TensorType(wanted)
        if changed or wrong:
            name = self.plan.base.name if wanted == self.low else "fp32"
            proof = f"one rounding to {name} per value" if name != "fp32" else "exact"
            self.rewrites.append(Rewrite(node.name or "", f"computes in {name}", proof))

    def _float32_operands(self, node: ir.Node) -> set[int]:
        """Return the operands that stay FP32 whatever the node computes in: sampling offsets, for one, unless they can be FP16."""
        if not is_dcnv3(node):
            return _FLOAT32_OPERANDS.get(node.op_type, set())
        too_coarse = self.low != ir.DataType.FLOAT16
        return {i for i in (OFFSET, MASK) if too_coarse and (i == OFFSET or node.inputs[i] is node.inputs[OFFSET])}

    def _goes_low(self, node: ir.Node) -> bool:
        known = is_dcnv3(node) or is_block_operator(node) or (node.op_type in SIXTEEN_BIT_OPS and node.domain in ("", "ai.onnx"))
        if not known or (node.name or "") in self.plan.islands:
            return False
        if any(v is not None and v.dtype == ir.DataType.DOUBLE for v in node.inputs):
            return False
        if node.op_type in _MASK_READERS or self.low != ir.DataType.FLOAT16:
            return True
        for value in node.inputs:
            array = constant(value) if value is not None and value.dtype == ir.DataType.FLOAT else None
            if array is not None and array.size and float(np.abs(array).max()) > 65504.0:
                self.declines.append(
                    Decline(node.name or "", "RANGE", f"'{value.name if value else ''}' exceeds 65504, the largest FP16 number")
                )
                return False
        return True

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) in self.casts:
            return self.casts[value, dtype]
        array = constant(value)
        if array is not None:
            self.casts[value, dtype] = self._cast_constant(value, array, dtype)
            return self.casts[value, dtype]
        stem = fresh_name(f"{value.name}_{dtype.name.lower()}", self.value_names)
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=fresh_name(f"{stem}_Cast", self.node_names))
        out = node.outputs[0]
        out.name, out.type, out.shape = stem, ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        self.casts[value, dtype] = out
        return out

    def _cast_constant(self, value: ir.Value, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        wide = array.astype(np.float32)
        if dtype == self.low:
            # Masks use the lowest float32 as minus infinity; in 16 bits the lowest finite number means the same.
            limit = largest(self.plan.base)
            wide = np.where(np.isfinite(wide), np.clip(wide, -limit, limit), wide)
        return add_initializer(self.graph, f"{value.name}_{dtype.name.lower()}", wide.astype(dtype.numpy()), dtype)

    def _restore_operands(self, node: ir.Node) -> None:
        """Let control flow read values of their original types, as operands and as captures of its bodies, which stay as they are."""
        self.declines.append(Decline(node.name or "", "SUBGRAPH", "the bodies of control flow stay as they are"))
        bodies = [a.value if a.type == ir.AttributeType.GRAPH else list(a.value) for a in node.attributes.values()]
        graphs = [g for body in bodies if isinstance(body, (ir.Graph, list)) for g in (body if isinstance(body, list) else [body])]
        for reader in (node, *(inner for g in graphs if isinstance(g, ir.Graph) for inner in ir.traversal.RecursiveGraphIterator(g))):
            for i, value in enumerate(reader.inputs):
                if value is not None and value in self.original:
                    reader.replace_input_with(i, self._cast(value, self.original[value]))

    def restore_outputs(self) -> None:
        """Give every graph output the type it had."""
        for position, (value, dtype) in enumerate(self.output_types):
            if dtype is None or value.dtype == dtype or dtype not in FLOAT_TYPES:
                continue
            name = value.name
            value.name = fresh_name(f"{name}_{self.plan.base.name}", self.value_names)
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=fresh_name(f"{name}_Cast", self.node_names))
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(dtype), value.shape
            self.graph.append(node)
            self.graph.outputs[position] = node.outputs[0]
