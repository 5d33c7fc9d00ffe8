"""Fuse decomposed softmax into ``Softmax``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from deploycc.core.graph import FLOAT_TYPES, axes_of, escapes, int_attribute, opset, rank, substitute
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite


@dataclass(frozen=True, slots=True)
class FuseSoftmax:
    """Fuse decomposed softmax into ``Softmax``.

    Why: attention is recognised, quantized and fused by TensorRT around a ``Softmax``, and one kernel does the work of four.

    Before / After:
        ``e = Exp(x - ReduceMax(x))``, ``e / ReduceSum(e)`` / ``Softmax(x)``
        The maximum may be absent: what is subtracted cancels, and ``Softmax`` subtracts it again.

    Declines when:
        OPSET: the model is below opset 13, whose Softmax flattens the axes behind its own.
        AXIS: the sum is over several axes or over computed ones.
        MULTI_CONSUMER: a value inside the pattern is read elsewhere or is a graph output.

    Options: none.

    See: ONNX Softmax-13.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity")

    def __call__(self, model: ir.Model) -> PassResult:
        """Fuse every softmax of the graph."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        for node in [n for n in model.graph if n.op_type == "Div" and n.domain == ""]:
            region = _recognise(node)
            if region is None:
                continue
            result = _fuse(node, region, opset(model))
            (rewrites if isinstance(result, Rewrite) else declines).append(result)  # type: ignore[arg-type]
        return PassResult(tuple(rewrites), tuple(declines))


def _reduction(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator and int_attribute(node, "keepdims", 1) else None


def _axis(node: ir.Node) -> int | None:
    """Return the only axis of a reduction, counted from the end, or None."""
    axes, size = axes_of(node), rank(node.inputs[0])
    if axes is None or len(axes) != 1 or (size is None and axes[0] >= 0):
        return None
    return axes[0] if axes[0] < 0 else axes[0] - (size or 0)


def _recognise(last: ir.Node) -> list[ir.Node] | None:
    """Return the nodes before ``last`` that make it a softmax: the exponential, the sum, and the shift where there is one."""
    exponential = last.inputs[0].producer() if last.inputs[0] is not None else None
    total = _reduction(last.inputs[1], "ReduceSum")
    if exponential is None or exponential.op_type != "Exp" or total is None or total.inputs[0] is not exponential.outputs[0]:
        return None
    if exponential.inputs[0] is None or exponential.inputs[0].dtype not in FLOAT_TYPES:
        return None
    shift = exponential.inputs[0].producer()
    if shift is not None and shift.op_type == "Sub":
        largest = _reduction(shift.inputs[1], "ReduceMax")
        if largest is not None and largest.inputs[0] is shift.inputs[0] and _axis(largest) == _axis(total):
            return [total, exponential, shift, largest]
    return [total, exponential]


def _fuse(last: ir.Node, region: list[ir.Node], version: int) -> Rewrite | Decline:
    anchor, axis = last.name or "", _axis(region[0])
    if version < 13:
        return Decline(anchor, "OPSET", f"Softmax over one axis came with opset 13, the model is at {version}")
    if axis is None:
        return Decline(anchor, "AXIS", "the sum is not over one known axis")
    if (value := escapes(region, last)) is not None:
        return Decline(anchor, "MULTI_CONSUMER", f"'{value.name}' is read outside the pattern")
    source = region[2].inputs[0] if len(region) > 2 else region[1].inputs[0]
    substitute(last, "Softmax", [source], attributes=[ir.AttrInt64("axis", axis)], absorbed=region)
    return Rewrite(anchor, f"{len(region) + 1} nodes became Softmax", "roundings of one element")
