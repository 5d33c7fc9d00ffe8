"""What the rules look at: a graph with its pairs, and the same graph without them, partitioned into fusable regions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import FLOAT_TYPES, attribute, constant, int_attribute, is_constant, remove_dead_nodes
from deploycc.quant.regions import MOVES, partition

if TYPE_CHECKING:
    from deploycc.core.formats import Format
    from deploycc.core.plan import Region

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
FORMAT_NAMES = {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.FLOAT4E2M1: "nvfp4"}


@dataclass(frozen=True, eq=False)
class Pair:
    """A QuantizeLinear with one DequantizeLinear behind it, or a DequantizeLinear of stored codes (``quantize`` is None)."""

    dequantize: ir.Node
    quantize: ir.Node | None

    @property
    def source(self) -> ir.Value | None:
        """Return what is quantized: a floating-point value, or the stored codes."""
        return (self.quantize or self.dequantize).inputs[0]

    @property
    def output(self) -> ir.Value:
        """Return the dequantized value."""
        return self.dequantize.outputs[0]

    @property
    def is_stored(self) -> bool:
        """Return whether a constant is quantized."""
        return is_constant(self.source)

    @property
    def kind(self) -> ir.DataType | None:
        """Return the type of the codes."""
        codes = self.dequantize.inputs[0]
        return codes.dtype if codes is not None else None

    @property
    def format(self) -> str:
        """Return the name of the format, e.g. ``int8``; the ONNX type in lower case where deploycc has no such format."""
        return FORMAT_NAMES.get(self.kind, self.kind.name.lower()) if self.kind is not None else "unknown"

    @property
    def scale(self) -> np.ndarray | None:
        """Return the scales as float32, None where they are computed."""
        found = settled(self.dequantize.inputs[1])
        return None if found is None else found.astype(np.float32)

    @property
    def axis(self) -> int:
        """Return the axis of the scales, counted from the front."""
        rank = len(self.source.shape) if self.source is not None and self.source.shape is not None else 1
        return int_attribute(self.dequantize, "axis", 1) % max(rank, 1)


class Subject:
    """A model under inspection. Nothing is edited; ``formats`` are those of the target, None where no target was named."""

    def __init__(self, model: ir.Model, *, target: str = "", formats: frozenset[Format] | None = None) -> None:
        self.model, self.graph, self.target, self.formats = model, model.graph, target, formats
        self.nodes = {n.name or "": n for n in model.graph}

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Return every pair in graph order; what dequantizes the scales of blocks is part of another."""
        found = []
        for node in self.graph:
            if node.op_type == DEQUANTIZE and not _gives_scales(node):
                before = node.inputs[0].producer() if node.inputs[0] is not None else None
                found.append(Pair(node, before if before is not None and before.op_type == QUANTIZE else None))
        return tuple(found)

    @cached_property
    def _order(self) -> dict[ir.Node, int]:
        return {node: i for i, node in enumerate(self.graph)}

    @cached_property
    def _pair_of(self) -> dict[ir.Node, Pair]:
        return {pair.dequantize: pair for pair in self.pairs}

    @cached_property
    def activations(self) -> tuple[Pair, ...]:
        """Return the pairs on computed values."""
        return tuple(p for p in self.pairs if not p.is_stored and p.quantize is not None)

    @cached_property
    def plain(self) -> ir.Model:
        """Return the graph without pairs and casts between floating-point types: what the partition reads."""
        return without_pairs(self.model)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """Return the fusable regions of the plain graph; their nodes have the names of the inspected graph."""
        return partition(self.plain)

    def operand(self, node: ir.Node, index: int) -> Pair | None:
        """Return the pair from which operand ``index`` of ``node`` comes, through ops that only move numbers."""
        value = node.inputs[index] if index < len(node.inputs) else None
        while value is not None and (producer := value.producer()) is not None:
            if producer.op_type == DEQUANTIZE:
                return self._pair_of.get(producer)
            if producer.op_type not in MOVES and not is_float_cast(producer):
                return None
            value = producer.inputs[0]
        return None

    def readers(self, pair: Pair) -> list[tuple[ir.Node, int]]:
        """Return the nodes and operands that read the pair's output, through ops that only move numbers."""
        found: list[tuple[ir.Node, int]] = []
        pending = [pair.output]
        while pending:
            for use in pending.pop().uses():
                if (use.node.op_type in MOVES and use.idx == 0) or is_float_cast(use.node):
                    pending.extend(use.node.outputs[:1] if use.node.op_type == "MaxPool" else use.node.outputs)
                else:
                    found.append((use.node, use.idx))
        return sorted(found, key=lambda each: (self._order.get(each[0], -1), each[1]))

    def around(self, node: ir.Node) -> list[ir.Node]:
        """Return the readers of the pair that ``node`` belongs to, then what computes its source; nothing for other nodes."""
        pair = next((p for p in self.pairs if node in (p.quantize, p.dequantize)), None)
        if pair is None:
            return []
        before = pair.source.producer() if pair.source is not None else None
        return [*(n for n, _ in self.readers(pair)), *([before] if before is not None else [])]

    def quantized_output(self, node: ir.Node) -> ir.Node | None:
        """Return the QuantizeLinear that reads the first output of ``node``, if one does."""
        return next((u.node for u in node.outputs[0].uses() if u.node.op_type == QUANTIZE and u.idx == 0), None)

    @cached_property
    def sums(self) -> dict[tuple[str, int], bool]:
        """Return the operands of residual sums that end a convolution, as (node, index): True for the skip, False for the branch (P4)."""
        plain = {n.name or "": n for n in self.plain.graph}
        adds = [(n, r) for r in self.regions if r.residuals for n in map(plain.__getitem__, r.nodes) if n.op_type == "Add"]
        found = [(n.name or "", i, v is not None and v.name in r.residuals) for n, r in adds for i, v in enumerate(n.inputs)]
        both = {name for name, _, skip in found if skip}
        return {(name, i): skip for name, i, skip in found if name in both}

    def anchors(self, region: Region) -> list[ir.Node]:
        """Return the weighted nodes of a region."""
        return [self.nodes[name] for name in region.anchors if name in self.nodes]

    def format_of(self, region: Region) -> str:
        """Return the quantized format that the file asks for in ``region``: that of the pairs on both operands of its anchors, or ''."""
        formats = {p.format if (p := self.operand(n, i)) else "" for n in self.anchors(region) for i in (0, 1)}
        return formats.pop() if len(formats) == 1 else ""


def _gives_scales(node: ir.Node) -> bool:
    uses = node.outputs[0].uses()
    return bool(uses) and all(use.node.op_type == DEQUANTIZE and use.idx == 1 for use in uses)


def before_pairs(value: ir.Value | None) -> ir.Value | None:
    """Return ``value`` before the pairs on it; for stored codes, the codes."""
    while value is not None and (node := value.producer()) is not None and node.op_type in {QUANTIZE, DEQUANTIZE}:
        value = node.inputs[0]
    return value


def weighted_origin(value: ir.Value | None) -> ir.Node | None:
    """Return the weighted op that computes ``value``, looking through the addition of a constant bias."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Add":
        computed = [v for v in node.inputs if v is not None and settled(v) is None and not _is_stored(v)]
        node = computed[0].producer() if len(computed) == 1 else None
    return node if node is not None and node.op_type in WEIGHTED else None


def _is_stored(value: ir.Value) -> bool:
    """Return whether ``value`` is dequantized from stored codes."""
    producer = value.producer()
    return producer is not None and producer.op_type == DEQUANTIZE and is_constant(producer.inputs[0])


def settled(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant, also behind Cast and Identity."""
    if value is None or is_constant(value):
        return constant(value)
    producer = value.producer()
    if producer is None or producer.op_type not in {"Cast", "Identity"} or producer.domain:
        return None
    before = settled(producer.inputs[0])
    if before is None or producer.op_type == "Identity":
        return before
    return before.astype(ir.DataType(int_attribute(producer, "to", 1)).numpy())


def value_type(value: ir.Value | None) -> str:
    """Return the ONNX name of a value's type, '' where it is not known."""
    return value.dtype.name if value is not None and value.dtype is not None else ""


def value_name(value: ir.Value | None) -> str:
    """Return the name of a value, '' where there is none."""
    return (value.name or "") if value is not None else ""


def is_float_cast(node: ir.Node) -> bool:
    """Return whether ``node`` casts from one floating-point type to another."""
    if node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].dtype not in FLOAT_TYPES:
        return False
    return ir.DataType(int_attribute(node, "to", 0)) in FLOAT_TYPES


def without_pairs(model: ir.Model) -> ir.Model:
    """Return a clone without Q/DQ and casts between floating-point types; stored codes become constants of unread numbers."""
    clone = model.clone()
    graph = clone.graph
    for node in list(graph):
        replacement = _float_of(graph, node)
        if replacement is not None:
            node.outputs[0].replace_all_uses_with(replacement, replace_graph_outputs=True)
    remove_dead_nodes(graph)
    return clone


def _float_of(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """Return the value that stands for the output of ``node`` in the plain graph, or None to keep the node."""
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None
    if is_float_cast(node):
        return source
    if node.op_type == DEQUANTIZE:
        before = source.producer()
        if before is not None and before.op_type == QUANTIZE:
            return before.inputs[0]
        return _stand_in(graph, node, source.shape) if is_constant(source) else None
    if node.op_type == "Transpose" and is_constant(source) and source.shape is not None:
        order = [int(a) for a in attribute(node, "perm", range(len(source.shape))[::-1])]  # type: ignore[attr-defined]
        return _stand_in(graph, node, ir.Shape([source.shape[a] for a in order]))
    return None


def _stand_in(graph: ir.Graph, node: ir.Node, shape: ir.Shape | None) -> ir.Value | None:
    """Register a constant of zeros, computed when read, that has the shape of the output of ``node``."""
    if shape is None or not shape.is_static():
        return None
    sizes, name = tuple(int(d) for d in shape), f"{node.name}_plain"  # type: ignore[arg-type]
    tensor = ir.LazyTensor(lambda: ir.Tensor(np.zeros(sizes, np.float32)), dtype=ir.DataType.FLOAT, shape=ir.Shape(sizes), name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(sizes), const_value=tensor)
    graph.register_initializer(value)
    return value
