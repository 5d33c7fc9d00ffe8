"""Fold batch normalization into the convolution or matrix product beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import (
    add_initializer,
    constant,
    float_attribute,
    fresh_name,
    inherit_metadata,
    int_attribute,
    is_constant,
    rank,
    replace_value,
    substitute,
    taken_names,
    widened,
)
from deploycc.core.linear import Affine, pads_borders, scale_inputs, scale_outputs
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_PROOF = "exact in float64, rounded once"


@dataclass(frozen=True, slots=True)
class FoldBatchnorm:
    """Fold batch normalization into the convolution or matrix product beside it.

    Why: in inference it is an affine map per channel, which the weights beside it can carry. With t = g / sqrt(v + e):
    after a linear node, W' = t W along its output axis and b' = s + t (b - m); before one, W' = W t along its input axis and
    b' = b + sum W (s - m t).

    Before / After:
        ``BatchNormalization(Conv(x, w, b), g, s, m, v)`` / ``Conv(x, w', b')``
        ``Conv(BatchNormalization(x, g, s, m, v), w, b)`` without padding / ``Conv(x, w', b')``

    Declines when:
        TRAINING_MODE: the statistics are those of the batch.
        NONCONST_PARAMETERS, NONCONST_WEIGHT, NONCONST_BIAS: a factor is computed at run time.
        MULTI_CONSUMER: the value between the two nodes is read elsewhere.
        GRAPH_OUTPUT: the value between the two nodes is an output of the graph.
        AXIS: the channel axis of the normalization is not the output axis of the matrix product.
        PAD2_NONZERO: the convolution behind the normalization pads, and the border would be normalized too.
        NUMERIC: a folded weight is not finite, or exceeds what FP16 holds where the original did not.
        STANDALONE: nothing linear is beside it.

    Options:
        magnitude_limit: the largest folded weight; the default is the largest FP16 number.

    See: ONNX BatchNormalization-15.
    """

    magnitude_limit: float = 65504.0

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity", "fold-border")

    def __call__(self, model: ir.Model) -> PassResult:
        """Fold every normalization that can be, until nothing changes."""
        rewrites: list[Rewrite] = []
        taken = taken_names(model.graph)
        while True:
            results = [self.fold(node, taken) for node in list(model.graph) if node.op_type == "BatchNormalization"]
            found = [r for r in results if isinstance(r, Rewrite)]
            rewrites += found
            if not found:
                return PassResult(tuple(rewrites), tuple(r for r in results if isinstance(r, Decline)))

    def fold(self, node: ir.Node, taken: set[str]) -> Rewrite | Decline:
        """Fold one normalization backwards if it can be, else forwards."""
        affine = _affine_map(node)
        if isinstance(affine, Decline):
            return affine
        backward = self.fold_backward(node, affine, taken)
        if isinstance(backward, Rewrite):
            return backward
        forward = self.fold_forward(node, affine, taken)
        return forward if isinstance(forward, Rewrite) or backward.code == "STANDALONE" else backward

    def fold_backward(self, node: ir.Node, affine: Affine, taken: set[str]) -> Rewrite | Decline:
        """Fold into the linear node whose output is normalized."""
        found = _before(node)
        if isinstance(found, Decline):
            return found
        linear, addition = found
        folded = scale_outputs(linear, affine, constant(addition.bias) if addition else None)
        if reason := self.refusal(linear, *folded):
            return Decline(node.name or "", "NUMERIC", reason)
        _store(linear, 1, folded[0], "folded", taken)
        bias = _as_type(linear, folded[1])
        if linear.op_type != "MatMul":
            _store(linear, 2, bias, "bias", taken)
            inherit_metadata(linear, [node])
            _bypass(node)
        elif addition:
            _store(addition.node, addition.position, bias, "bias", taken)
            inherit_metadata(addition.node, [node])
            _bypass(node)
        else:
            substitute(node, "Add", [node.inputs[0], _constant(linear, "bias", bias, taken)])
        return Rewrite(node.name or "", f"folded into '{linear.name}' before it", _PROOF)

    def fold_forward(self, node: ir.Node, affine: Affine, taken: set[str]) -> Rewrite | Decline:
        """Fold into the linear nodes that read the normalized value, if each of them can take it."""
        readers = _after(node, affine)
        if isinstance(readers, Decline):
            return readers
        folded = [scale_inputs(reader, affine) for reader in readers]
        for reader, (weight, bias) in zip(readers, folded, strict=True):
            if reason := self.refusal(reader, weight, bias):
                return Decline(node.name or "", "NUMERIC", reason)
        for reader, (weight, bias) in zip(readers, folded, strict=True):
            _store(reader, 1, weight, "folded", taken)
            inherit_metadata(reader, [node])
            if reader.op_type == "MatMul":
                _add_after(reader, _as_type(reader, bias), taken)
            else:
                _store(reader, 2, _as_type(reader, bias), "bias", taken)
        _bypass(node)
        names = ", ".join(f"'{r.name}'" for r in readers)
        return Rewrite(node.name or "", f"folded into {names} after it", _PROOF)

    def refusal(self, linear: ir.Node, weight: np.ndarray, bias: np.ndarray) -> str | None:
        """Return why folded parameters are not fit for use, if they are not."""
        largest = max(_largest(weight), _largest(bias))
        if not np.isfinite(largest):
            return "a folded parameter is not finite"
        if largest <= self.magnitude_limit:
            return None
        before = widened(linear.inputs[1])
        original = 0.0 if before is None else _largest(before)
        return f"the largest folded parameter is {largest:g}" if largest > max(self.magnitude_limit, original) else None


@dataclass(frozen=True, slots=True)
class _Addition:
    """An Add of a constant behind a MatMul."""

    node: ir.Node
    position: int

    @property
    def bias(self) -> ir.Value | None:
        return self.node.inputs[self.position]


def _largest(array: np.ndarray) -> float:
    """Return the largest magnitude, NaN if there is one, without a copy of the array."""
    return float(np.maximum(np.max(array, initial=0.0), -np.min(array, initial=0.0)))


def _affine_map(node: ir.Node) -> Affine | Decline:
    if int_attribute(node, "training_mode", 0) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return Decline(node.name or "", "TRAINING_MODE", "the statistics are those of the batch")
    arrays = [constant(v) for v in node.inputs[1:5]]
    found = [a.astype(np.float64) for a in arrays if a is not None]
    if len(found) != 4:
        return Decline(node.name or "", "NONCONST_PARAMETERS", "scale, shift, mean or variance is computed")
    gamma, beta, mean, variance = found
    epsilon = float_attribute(node, "epsilon", 1e-5)
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(variance + epsilon)
        return Affine(factor, beta - mean * factor)


def _before(node: ir.Node) -> tuple[ir.Node, _Addition | None] | Decline:
    """Return the linear node whose output is normalized, and the Add between them if there is one."""
    anchor, value = node.name or "", node.inputs[0]
    producer = value.producer() if value is not None else None
    addition = _addition(producer)
    linear = addition.node.inputs[1 - addition.position].producer() if addition else producer  # type: ignore[union-attr]
    if linear is None or linear.op_type not in _LINEAR or linear.graph is not node.graph:
        return Decline(anchor, "STANDALONE", "nothing linear is beside it")
    between = [value, *([linear.outputs[0]] if addition else [])]
    for each in between:
        if each is not None and each.is_graph_output():
            return Decline(anchor, "GRAPH_OUTPUT", f"'{each.name}' is an output of the graph")
        if each is not None and len(each.uses()) > 1:
            return Decline(anchor, "MULTI_CONSUMER", f"'{each.name}' is read {len(each.uses())} times")
    if not is_constant(linear.inputs[1]):
        return Decline(anchor, "NONCONST_WEIGHT", f"the weight of '{linear.name}' is computed")
    if len(linear.inputs) > 2 and linear.inputs[2] is not None and constant(linear.inputs[2]) is None:
        return Decline(anchor, "NONCONST_BIAS", f"the bias of '{linear.name}' is computed")
    if linear.op_type == "MatMul" and rank(value) != 2:
        return Decline(anchor, "AXIS", f"axis 1 is not the last one of '{linear.name}'")
    return linear, addition


def _addition(node: ir.Node | None) -> _Addition | None:
    """Return ``node`` as the Add of a constant vector to a MatMul, if that is what it is."""
    if node is None or node.op_type != "Add":
        return None
    for position, value in enumerate(node.inputs):
        other = node.inputs[1 - position]
        producer = other.producer() if other is not None else None
        array = constant(value)
        if producer is not None and producer.op_type == "MatMul" and array is not None and array.ndim <= 1:
            return _Addition(node, position)
    return None


def _after(node: ir.Node, affine: Affine) -> list[ir.Node] | Decline:
    """Return the nodes that read the normalized value if every one of them can take the map into its weight."""
    anchor, output = node.name or "", node.outputs[0]
    readers = [use.node for use in output.uses()]
    linear = [n for n in readers if n.op_type in _LINEAR and n.graph is node.graph]
    if not linear:
        return Decline(anchor, "STANDALONE", "nothing linear is beside it")
    if output.is_graph_output():
        return Decline(anchor, "GRAPH_OUTPUT", f"'{output.name}' is an output of the graph")
    if len(linear) != len(readers) or len(set(readers)) != len(readers) or any(n.inputs[0] is not output for n in readers):
        return Decline(anchor, "MULTI_CONSUMER", f"'{output.name}' is read by something that is not linear in it")
    for reader in readers:
        if not is_constant(reader.inputs[1]):
            return Decline(anchor, "NONCONST_WEIGHT", f"the weight of '{reader.name}' is computed")
        if len(reader.inputs) > 2 and reader.inputs[2] is not None and constant(reader.inputs[2]) is None:
            return Decline(anchor, "NONCONST_BIAS", f"the bias of '{reader.name}' is computed")
        if reader.op_type in {"Gemm", "MatMul"} and (rank(output) != 2 or int_attribute(reader, "transA", 0)):
            return Decline(anchor, "AXIS", f"axis 1 is not what '{reader.name}' sums over")
        if pads_borders(reader) and np.any(affine.offset):
            return Decline(anchor, "PAD2_NONZERO", f"'{reader.name}' pads with zeros, which the normalization would shift")
    return readers


def _as_type(linear: ir.Node, array: np.ndarray) -> np.ndarray:
    weight = linear.inputs[1]
    return array.astype(weight.dtype.numpy()) if weight is not None and weight.dtype is not None else array


def _constant(linear: ir.Node, role: str, array: np.ndarray, taken: set[str]) -> ir.Value:
    if not isinstance(linear.graph, ir.Graph):
        raise TypeError(f"'{linear.name}' belongs to no graph")
    return add_initializer(linear.graph, fresh_name(f"{linear.outputs[0].name}_{role}", taken), array)


def _store(node: ir.Node, position: int, array: np.ndarray, role: str, taken: set[str]) -> None:
    """Give ``node`` a new constant input; a Gemm no longer scales its bias then."""
    value = _constant(node, role, array if node.op_type == "Add" else _as_type(node, array), taken)
    if len(node.inputs) <= position:
        node.resize_inputs(position + 1)
    node.replace_input_with(position, value)
    if node.op_type == "Gemm" and position == 2:
        node.attributes.pop("beta", None)


def _add_after(node: ir.Node, bias: np.ndarray, taken: set[str]) -> None:
    output, graph = node.outputs[0], node.graph
    value = _constant(node, "bias", bias, taken)
    add = ir.node("Add", [output, value], name=fresh_name(f"{node.name}_bias", taken))
    add.outputs[0].type, add.outputs[0].shape = output.type, output.shape
    name = output.name
    replace_value(output, add.outputs[0])
    add.outputs[0].name, output.name = name, fresh_name(f"{name}_product", taken)
    add.replace_input_with(0, output)
    if graph is not None:
        graph.insert_after(node, add)


def _bypass(node: ir.Node) -> None:
    source = node.inputs[0]
    if source is not None:
        replace_value(node.outputs[0], source)
    if node.graph is not None:
        node.graph.remove(node, safe=True)
