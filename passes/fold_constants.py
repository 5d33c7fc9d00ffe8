"""Evaluate what depends on constants and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.elements import INTEGERS, Contents
from deploycc.core.evaluation import DETERMINISTIC, Refusal, evaluate
from deploycc.core.graph import FLOAT_TYPES, constant, fresh_name, is_constant, opset, remove_dead_nodes, taken_names
from deploycc.core.inference import observe, output_sizes
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

if TYPE_CHECKING:
    from deploycc.core.dimensions import Size

_ROUNDED = "rounded once to the type of the tensor"


@dataclass(frozen=True, slots=True)
class FoldConstants:
    """Evaluate what depends on constants and shapes alone.

    Why: exporters write weights as ``Constant``, types as ``CastLike`` and shapes as arithmetic over ``Shape``; a parser that
    wants a bias, a pad or a target shape wants a constant.

    Before / After:
        ``b = Expand(CastLike(Constant(0), x), Shape(w))``, ``Conv(x, w, b)`` / ``Conv(x, w, b)`` with ``b`` an initializer
        ``Reshape(x, Concat(Gather(Shape(x), 0), 3, 64))`` / ``Reshape(x, [-1, 3, 64])``

    Declines when:
        SIZE: the result would exceed its inputs by more than ``growth_limit`` bytes.
        EVALUATION: the value is not defined (integer overflow, division by zero) or the evaluator refused.
        GRAPH_OUTPUT: the constant is an output of the graph, which has to stay a node.
        ZERO_SIZE: a target shape has a zero, beside which -1 would not say how large the dynamic dimension is.
        DTYPE: the constant holds strings or sequences, which an initializer cannot.

    Options:
        growth_limit: bytes by which a result may exceed its inputs together.

    See: ONNX Reshape-14, CastLike-15, Shape-15.
    """

    growth_limit: int = 1_000_000

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Fold until nothing changes."""
        rewrites: list[Rewrite] = []
        while True:
            sweep = _Sweep(model.graph, opset(model), self.growth_limit, taken_names(model.graph))
            sweep.run()
            rewrites += sweep.rewrites
            if not sweep.rewrites:
                return PassResult(tuple(rewrites), tuple(sweep.declines))


@dataclass(slots=True)
class _Sweep:
    """One walk over the graph in topological order."""

    graph: ir.Graph
    opset: int
    growth_limit: int
    taken: set[str]
    known: Contents = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)

    def run(self) -> None:
        for node in list(self.graph):
            if node.domain not in {"", "ai.onnx"}:
                continue
            observe(node, self.known)
            self.fold(node)
        for name in remove_dead_nodes(self.graph):
            self.rewrites.append(Rewrite(name, "removed: nothing reads it"))

    def fold(self, node: ir.Node) -> None:
        """Fold one node by the first rule that knows what it is."""
        if node.op_type == "Constant":
            self.lift(node)
        elif node.op_type == "CastLike":
            self.settle_type(node)
        elif (value := self.integers(node)) is not None:
            self.become(node, [value], "worked out from shapes")
        elif node.op_type in DETERMINISTIC and node.inputs and all(v is None or is_constant(v) for v in node.inputs):
            self.compute(node)
        elif node.op_type == "Reshape" and len(node.inputs) > 1 and not is_constant(node.inputs[1]):
            self.settle_target(node)

    def lift(self, node: ir.Node) -> None:
        """Make an initializer of a Constant node."""
        tensor = _constant_tensor(node)
        if tensor is None:
            self.declines.append(
                Decline(node.name or "", "DTYPE", f"{next(iter(node.attributes), 'no attribute')} is not a numeric tensor")
            )
            return
        self.become(node, [tensor], "lifted to an initializer")

    def settle_type(self, node: ir.Node) -> None:
        """Turn CastLike into Cast, as soon as the type of its second input is known."""
        target = node.inputs[1].dtype if node.inputs[1] is not None else None
        if target is None:
            return
        graph, old = self.graph, node.outputs[0]
        cast = ir.node("Cast", [node.inputs[0]], {"to": int(target)}, name=node.name)
        new = cast.outputs[0]
        new.name, new.type, new.shape = old.name, ir.TensorType(target), old.shape
        cast.metadata_props.update(node.metadata_props)
        graph.insert_before(node, cast)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        self.rewrites.append(Rewrite(cast.name or "", f"CastLike became a Cast to {target}"))
        self.fold(cast)

    def integers(self, node: ir.Node) -> np.ndarray | None:
        """Return the elements of a node of shape arithmetic if every one of them is a number."""
        output = node.outputs[0] if node.outputs else None
        elements = self.known.get(output) if output is not None else None
        if output is None or elements is None or output.dtype not in INTEGERS or len(node.outputs) != 1:
            return None
        bits = 31 if output.dtype == ir.DataType.INT32 else 63
        if not all(isinstance(e, (int, bool, np.bool_)) and -(2**bits) <= int(e) < 2**bits for e in elements.flat):
            return None
        return elements.astype(output.dtype.numpy())

    def compute(self, node: ir.Node) -> None:
        """Evaluate a node all of whose inputs are constant."""
        results = evaluate(node, [constant(v) for v in node.inputs], opset=self.opset, growth_limit=self.growth_limit)
        if isinstance(results, Refusal):
            self.declines.append(Decline(node.name or "", results.code, results.reason))
        else:
            proof = _ROUNDED if any(v.dtype in FLOAT_TYPES for v in node.outputs) else "exact"
            self.become(node, list(results), f"evaluated {node.op_type}", proof)

    def settle_target(self, node: ir.Node) -> None:
        """Replace a computed target shape of which all but one dimension are known by a constant with one -1."""
        sizes = output_sizes(node, self.known)
        target = None if sizes is None else _target_of(sizes)
        if sizes is None or target is None:
            return
        if 0 in target:
            self.declines.append(Decline(node.name or "", "ZERO_SIZE", f"the target {target} has a zero, which Reshape reads as 'keep'"))
            return
        name = fresh_name(f"{node.outputs[0].name}_shape", self.taken)
        node.replace_input_with(1, self.initializer(name, ir.tensor(np.array(target, dtype=np.int64))))
        node.attributes.pop("allowzero", None)
        self.rewrites.append(Rewrite(node.name or "", f"the computed target shape is {target}"))

    def become(self, node: ir.Node, results: list[np.ndarray | ir.TensorProtocol], what: str, proof: str = "exact") -> None:
        """Replace the outputs of ``node`` by initializers of the same names."""
        if any(v.is_graph_output() for v in node.outputs):
            self.declines.append(Decline(node.name or "", "GRAPH_OUTPUT", "a constant output of the graph stays a node"))
            return
        for old, result in zip(node.outputs, results, strict=True):
            name, old.name = old.name or "constant", None
            tensor = result if not isinstance(result, np.ndarray) else ir.Tensor(np.ascontiguousarray(result).reshape(result.shape))
            old.replace_all_uses_with(self.initializer(name, tensor))
        self.graph.remove(node, safe=True)
        self.rewrites.append(Rewrite(node.name or "", what, proof))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Register a tensor under a name that is free."""
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _target_of(sizes: tuple[Size, ...]) -> list[int] | None:
    dynamic = [d for d in sizes if not isinstance(d, int)]
    return [d if isinstance(d, int) else -1 for d in sizes] if len(dynamic) <= 1 else None


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | np.ndarray | None:
    for name, found in node.attributes.items():
        match name:
            case "value":
                return found.as_tensor() if found.as_tensor().dtype != ir.DataType.STRING else None
            case "value_float" | "value_floats":
                return np.array(found.value, dtype=np.float32)
            case "value_int" | "value_ints":
                return np.array(found.value, dtype=np.int64)
    return None
