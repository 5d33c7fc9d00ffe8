"""A graph prepared for execution in torch: constants as tensors, functions inlined or wrapped, samples located."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

from deploycc.core.dimensions import Dim, dimensions
from deploycc.core.errors import UsageError
from deploycc.core.evaluation import Refusal, evaluate
from deploycc.core.graph import is_constant, opset
from deploycc.quant.lrp import linear, movement, spatial  # noqa: F401  (they register their operators)
from deploycc.quant.lrp.movement import to_torch
from deploycc.quant.lrp.operators import Compute, Inputs, computation

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

GROWTH_LIMIT = 2**30
COPIES = 12
# Between the image and the first linear layer these change neither which pixel a number is nor, up to a constant, its value.
_STILL_IMAGE = frozenset(
    {"Identity", "Cast", "Dropout", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Pad", "Add", "Sub", "Mul", "Div", "Clip"}
)
_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})


class Program:
    """The nodes of a model in order, with what executing them in torch takes.

    Model-local functions are inlined, except those that ``atomic`` names (domain and name), which stay one node with one rule.

    Args:
        model: a CANONICAL graph; it is not changed.
        atomic: functions that are executed as a whole.
    """

    def __init__(self, model: ir.Model, *, atomic: Iterable[tuple[str, str]] = ()) -> None:
        whole = frozenset(atomic)
        if any((f.domain, f.name) not in whole for f in model.functions.values()):
            model = model.clone()
            InlinePass(criteria=lambda f: (f.domain, f.name) not in whole)(model)
            model.graph.sort()
        self.model, self.graph, self.opset = model, model.graph, opset(model)
        self.nodes = list(self.graph)
        self.last_reads = _last_reads(self.graph)
        self._constants: dict[ir.Value, Tensor] = {}
        self._axes: dict[ir.Value, int | None] = {}
        self._wrapped: dict[ir.Node, Compute] = {}
        first = self.graph.inputs[0].shape if self.graph.inputs else None
        self._symbol = str(first[0]) if first is not None and len(first) and not isinstance(first[0], int) else None

    def feed(self, feeds: Mapping[str, np.ndarray]) -> tuple[dict[ir.Value, Tensor], set[ir.Value]]:
        """Return the fed values as tensors, and which of them carry gradients."""
        values = {v: to_torch(feeds[v.name or ""]) for v in self.graph.inputs if v.name in feeds}
        return values, {v for v, tensor in values.items() if tensor.is_floating_point()}

    def lookup(self, value: ir.Value, values: Mapping[ir.Value, Tensor]) -> Tensor:
        """Return the tensor of a computed, fed or constant value."""
        if value in values:
            return values[value]
        if value not in self._constants:
            if value.const_value is None:
                raise KeyError(f"'{value.name}' is neither computed nor fed nor constant")
            self._constants[value] = to_torch(value.const_value.numpy())
        return self._constants[value]

    def execute(self, node: ir.Node, inputs: list[Tensor | None], *, differentiable: bool) -> tuple[Compute, tuple[Tensor, ...]]:
        """Return how ``node`` computes, and its outputs."""
        compute = computation(node) or self._composite(node)
        if compute is None and differentiable:
            raise _untaught(node, f"the operator {node.op_type} has no computation in torch")
        try:
            outputs = self._evaluated(node, inputs) if compute is None else compute(node, inputs)
        except NotImplementedError as error:
            raise _untaught(node, f"{error} has no computation in torch") from error
        return compute or _constant_only, outputs if isinstance(outputs, tuple) else (outputs,)

    @property
    def bytes_per_sample(self) -> int:
        """Return an estimate of the memory that one sample takes: every value once, and working copies of the largest."""
        sizes = [4 * _elements(v) for node in self.nodes for v in node.outputs]
        first = self.graph.inputs[0].shape if self.graph.inputs else None
        batch = first[0] if first is not None and len(first) and isinstance(first[0], int) else 1
        return (sum(sizes) + COPIES * max(sizes, default=0)) // max(batch, 1)

    def batch_axis(self, value: ir.Value) -> int | None:
        """Return the axis along which ``value`` holds the samples, None for a scalar."""
        if value not in self._axes:
            sizes = dimensions(value) or ()
            named = (i for i, d in enumerate(sizes) if isinstance(d, Dim) and any(self._symbol in m for m, _ in d.terms))
            self._axes[value] = next(named, 0 if sizes or value.shape is None else None)
        return self._axes[value]

    def is_at_image(self, node: ir.Node) -> bool:
        """Return whether ``node`` is a linear layer with constant weights that reads the image."""
        if node.op_type not in _LINEAR or len(node.inputs) < 2 or not is_constant(node.inputs[1]):
            return False
        value = node.inputs[0]
        while value is not None and (producer := value.producer()) is not None:
            if producer.op_type not in _STILL_IMAGE or not all(is_constant(v) for v in producer.inputs[1:] if v is not None):
                return False
            value = producer.inputs[0]
        return value is not None and value.is_graph_input()

    def _evaluated(self, node: ir.Node, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
        """Return the outputs of a node that no gradient passes, by ONNX's own implementation."""
        arrays = [None if x is None else x.numpy() for x in inputs]
        found = evaluate(node, arrays, opset=self.opset, growth_limit=GROWTH_LIMIT)
        if isinstance(found, Refusal):
            raise _untaught(node, f"the operator {node.op_type} cannot be evaluated: {found.reason}")
        return tuple(to_torch(a) for a in found)

    def _composite(self, node: ir.Node) -> Compute | None:
        """Return the computation of a function's node: its body, with the node's attributes in place."""
        if node in self._wrapped:
            return self._wrapped[node]
        if node.op_identifier() not in self.model.functions:
            return None
        inputs = [ir.Value(name=f"i{k}") if v is not None else None for k, v in enumerate(node.inputs)]
        call = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
        fed = [v for v in inputs if v is not None]
        graph = ir.Graph(fed, call.outputs, nodes=[call], opset_imports=dict(self.graph.opset_imports), name=node.op_type)
        alone = ir.Model(graph, ir_version=self.model.ir_version, functions=[f.clone() for f in self.model.functions.values()])
        InlinePass()(alone)
        body = Program(alone)

        def compute(call: ir.Node, tensors: Inputs) -> tuple[Tensor, ...]:
            values: dict[ir.Value, Tensor] = dict(zip(body.graph.inputs, [t for t in tensors if t is not None], strict=True))
            for each in body.nodes:
                found = [None if v is None else body.lookup(v, values) for v in each.inputs]
                carried = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in found)
                _, outputs = body.execute(each, found, differentiable=carried)
                values.update(zip(each.outputs, outputs, strict=False))
            return tuple(body.lookup(v, values) for v in body.graph.outputs)

        self._wrapped[node] = compute
        return compute


def _elements(value: ir.Value) -> int:
    """Return the number of elements of one sample: dynamic dimensions count as their coefficients."""
    return math.prod(d if isinstance(d, int) else max(1, sum(c for _, c in d.terms)) for d in dimensions(value) or ())


def _last_reads(graph: ir.Graph) -> dict[ir.Node, list[ir.Value]]:
    """Return the computed values that may be dropped after each node."""
    last = {v: node for node in graph for v in node.inputs if v is not None and v.producer() is not None and not v.is_graph_output()}
    reads: dict[ir.Node, list[ir.Value]] = {}
    for value, node in last.items():
        reads.setdefault(node, []).append(value)
    return reads


def _constant_only(node: ir.Node, inputs: Inputs) -> Tensor:
    raise NotImplementedError(f"'{node.name}' was evaluated without gradients")


def _untaught(node: ir.Node, what: str) -> UsageError:
    return UsageError(
        what,
        at=f"node '{node.name}'",
        fix="use --sensitivity sqnr, which needs no gradients, or register a computation with deploycc.quant.lrp.operators.operator",
    )
