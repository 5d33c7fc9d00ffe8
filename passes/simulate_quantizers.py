"""Simulate n-bit quantizers where the PrecisionPlan asks for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import add_initializer, constant, fresh_name, is_constant, taken_names
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite
from deploycc.core.placement import weight_axis
from deploycc.core.simulation import Quantizer, Uniform, fit_uniform

if TYPE_CHECKING:
    from deploycc.core.formats import Format
    from deploycc.core.plan import Assignment, PrecisionPlan


@dataclass(frozen=True, slots=True)
class SimulateQuantizers:
    """Round operands to n bits and back, in floating point, wherever the plan asks for a simulated format.

    Why: paper mode reproduces what LRP-QViT and RepQ-ViT measure. No engine computes in 3 to 7 bits, or with asymmetric or logarithmic
    activations; standard operators show what such arithmetic would give.

    Before / After:
        ``MatMul(x, w)`` / ``MatMul(s * (Clip(Round(x / s) + z, 0, 2^n - 1) - z), w^)``; w^ is a constant that has been through the same,
        with a scale and a zero point per output channel. The softmax output x becomes ``s * 2^(-q / 2)``, ``q = Round(-2 log2(x / s))``.

    Declines when:
        NO_QUANTIZER: the plan has none for an operand; then nothing of the region is simulated.
        NO_NODE: a region lacks an anchor; likewise.

    Options:
        plan: the PrecisionPlan to obey.

    See: ``deploycc.core.simulation``; LRP-QViT, arXiv 2401.11243; RepQ-ViT, arXiv 2212.08254.
    """

    plan: PrecisionPlan = field(repr=False)
    phase: ClassVar[Phase] = "quantize"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        writer = _Writer(model.graph, self.plan)
        for assignment in self.plan.assignments:
            if assignment.format.is_simulated:
                writer.simulate(assignment)
        return PassResult(tuple(writer.rewrites), tuple(writer.declines))


class _Writer:
    """Holds what has been quantized so far, so that readers of one format share it."""

    def __init__(self, graph: ir.Graph, plan: PrecisionPlan) -> None:
        self.graph, self.plan = graph, plan
        self.nodes = {n.name or "": n for n in graph}
        self.node_names, self.value_names = set(self.nodes), taken_names(graph)
        self.done: dict[tuple[str, str], ir.Value] = {}
        self.results: set[ir.Value] = set()
        self.rewrites: list[Rewrite] = []
        self.declines: list[Decline] = []

    def simulate(self, assignment: Assignment) -> None:
        """Quantize both operands of every anchor, or nothing of the region."""
        region, format = assignment.region, assignment.format
        declines = [
            Decline(n, "NO_NODE", f"the plan names '{n}', which the graph does not have") for n in region.anchors if n not in self.nodes
        ]
        anchors = [self.nodes[n] for n in region.anchors if n in self.nodes]
        for value in dict.fromkeys(v for anchor in anchors for v in anchor.inputs[:2] if v not in self.results):
            if value is not None and not is_constant(value) and self._quantizer(value, format) is None:
                declines.append(Decline(value.name or "", "NO_QUANTIZER", f"the plan has no {format} quantizer for '{value.name}'"))
        if declines:
            self.declines.extend(declines)
            return
        changed = [anchor.name or "" for anchor in anchors for i in (0, 1) if self._operand(anchor, i, format)]
        proof = f"|error| <= scale/2 per operand in range ({format}, simulated)"
        self.rewrites.extend(Rewrite(name, f"{format} operands, simulated", proof) for name in dict.fromkeys(changed))

    def _quantizer(self, value: ir.Value, format: Format) -> Quantizer | None:
        return self.plan.quantizers.get(value.name or "", {}).get(format.name)

    def _operand(self, anchor: ir.Node, i: int, format: Format) -> bool:
        """Let operand ``i`` be quantized; return whether it was not already."""
        value = anchor.inputs[i]
        if value is None or value in self.results:
            return False
        key = (value.name or "", format.name if not is_constant(value) else f"{format.name} along {weight_axis(anchor)}")
        if key not in self.done:
            self.done[key] = self._weight(anchor, value, format) if is_constant(value) else self._activation(value, format)
            self.results.add(self.done[key])
        anchor.replace_input_with(i, self.done[key])
        return True

    def _weight(self, anchor: ir.Node, value: ir.Value, format: Format) -> ir.Value:
        weight, axis = constant(value), weight_axis(anchor)
        if weight is None:
            raise TypeError(f"'{value.name}' holds no data")
        wide = weight.astype(np.float32)
        rounded = fit_uniform(wide, format.bits, axis=axis).apply(wide, axis=axis)
        return add_initializer(self.graph, fresh_name(f"{value.name}_{format}", self.value_names), rounded.astype(weight.dtype))

    def _activation(self, value: ir.Value, format: Format) -> ir.Value:
        quantizer = self._quantizer(value, format)
        if quantizer is None:
            raise KeyError(f"'{value.name}' has no quantizer")
        chain = _Chain(self, value, f"{value.name}_{format}")
        result = chain.uniform(quantizer) if isinstance(quantizer, Uniform) else chain.logarithmic(quantizer.scale, quantizer.top)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], chain.nodes)
        else:
            self.graph.insert_after(producer, chain.nodes)
        return result


class _Chain:
    """The nodes that quantize one value, in order."""

    def __init__(self, writer: _Writer, source: ir.Value, stem: str) -> None:
        self.writer, self.source, self.stem = writer, source, stem
        self.dtype = np.dtype(source.dtype.numpy()) if source.dtype is not None else np.dtype(np.float32)
        self.nodes: list[ir.Node] = []

    def uniform(self, quantizer: Uniform) -> ir.Value:
        """Return ``s (clip(round(x / s) + z) - z)``."""
        scale, zero = (self._number(what, numbers) for what, numbers in (("scale", quantizer.scale), ("zero", quantizer.zero_point)))
        steps = self._node("Round", [self._node("Div", [self.source, scale])])
        codes = self._node("Clip", [self._node("Add", [steps, zero]), self._number("bottom", 0), self._number("top", quantizer.top)])
        return self._node("Mul", [self._node("Sub", [codes, zero]), scale])

    def logarithmic(self, scale: float, top: int) -> ir.Value:
        """Return ``s 2^(-q / 2)`` with ``q = round(-2 log2(x / s))``, and zero where q lies above ``top``."""
        factor = self._number("scale", scale)
        exponent = self._node(
            "Mul", [self._node("Log", [self._node("Div", [self.source, factor])]), self._number("base", -2 / math.log(2))]
        )
        steps = self._node("Round", [exponent])
        codes = self._node("Clip", [steps, self._number("bottom", 0), self._number("top", top)])
        power = self._node("Exp", [self._node("Mul", [codes, self._number("step", -math.log(2) / 2)])])
        held = self._node("LessOrEqual", [steps, self._number("top", top)], ir.DataType.BOOL)
        return self._node("Where", [held, self._node("Mul", [power, factor]), self._number("nothing", 0)])

    def _number(self, what: str, number: float | tuple[float, ...]) -> ir.Value:
        array = np.array(number, self.dtype)
        return add_initializer(self.writer.graph, f"{self.stem}_{what}", array.reshape(()) if array.size == 1 else array)

    def _node(self, op: str, inputs: list[ir.Value], dtype: ir.DataType | None = None) -> ir.Value:
        node = ir.node(op, inputs, name=fresh_name(f"{self.stem}_{op}", self.writer.node_names))
        output = node.outputs[0]
        output.name = fresh_name(f"{self.stem}_{op.lower()}", self.writer.value_names)
        output.shape, output.type = self.source.shape, self.source.type if dtype is None else ir.TensorType(dtype)
        self.nodes.append(node)
        return output
