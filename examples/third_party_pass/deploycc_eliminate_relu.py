"""A pass of a third party. It needs the base library's ``deploycc.core`` and one entry point, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import FLOAT_TYPES, can_take_name, constant, remove_dead_nodes, replace_value
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

NEVER_NEGATIVE = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"})
# Never negative where none of their data is. Dropout and Pad are left out: their other operands say what they do.
KEEP_THE_SIGN = frozenset({
    *("Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "Max", "Transpose"),
})  # fmt: skip
FIRST_ONLY = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather"})


@dataclass(frozen=True, slots=True)
class EliminateRelu:
    """Remove a ``Relu`` whose input is never negative.

    Why: blocks that each end in an activation, pruned until nothing lies between them, leave one activation behind another; so does
    a pooling between two blocks. max(0, x) = x where x >= 0, so it is exact.

    Before / After:
        ``Relu(MaxPool(Relu(x)))`` / ``MaxPool(Relu(x))``

    Declines when:
        GRAPH_OUTPUT: the Relu gives an output of the graph its name, and its input cannot take that name.
        DEPTH: the input comes through more than ``depth`` nodes that keep the sign.

    Options:
        depth: how many nodes back the sign is followed.

    See: ONNX Relu-14.
    """

    depth: int = 8

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("eliminate-identity",)

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        for node in list(model.graph):
            if node.op_type != "Relu" or node.domain not in {"", "ai.onnx"}:
                continue
            reason = self.refusal(node)
            if isinstance(reason, Decline):
                declines.append(reason)
            elif reason is None and node.inputs[0] is not None:
                replace_value(node.outputs[0], node.inputs[0])
                rewrites.append(Rewrite(node.name or "", "removed: its input is never negative"))
                remove_dead_nodes(model.graph, [node])
        return PassResult(tuple(rewrites), tuple(declines))

    def refusal(self, node: ir.Node) -> Decline | str | None:
        """Return None where the Relu may go, a decline where it could but must not, and a word where there is nothing to do."""
        source, anchor = node.inputs[0], node.name or ""
        if source is None or source.dtype not in FLOAT_TYPES:
            return "not a float"
        sign = self.is_never_negative(source, self.depth)
        if sign is None:
            return Decline(anchor, "DEPTH", f"the sign of '{source.name}' was followed through {self.depth} nodes without an end")
        if not sign:
            return "may be negative"
        if node.outputs[0].is_graph_output() and not can_take_name(source):
            return Decline(anchor, "GRAPH_OUTPUT", f"'{source.name}' cannot take the name of the output '{node.outputs[0].name}'")
        return None

    def is_never_negative(self, value: ir.Value | None, depth: int) -> bool | None:
        """Return whether ``value`` is known to be at least zero; None when ``depth`` nodes did not tell."""
        known = constant(value)
        if known is not None:
            return bool(np.all(known >= 0))
        node = value.producer() if value is not None else None
        if node is None or node.domain not in {"", "ai.onnx"}:
            return False
        if node.op_type in NEVER_NEGATIVE:
            return True
        if node.op_type not in KEEP_THE_SIGN | FIRST_ONLY:
            return False
        if depth == 0:
            return None
        read = node.inputs[:1] if node.op_type in FIRST_ONLY else node.inputs
        signs = [self.is_never_negative(each, depth - 1) for each in read]
        return False if False in signs else None if None in signs else True
