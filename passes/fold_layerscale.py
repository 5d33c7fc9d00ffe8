"""Fold constant scales and shifts of channels into the linear node before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from deploycc.core.affine import Link, per_channel, read_convolution, unfit, weight_type, write_constant, write_convolution
from deploycc.core.between import shared
from deploycc.core.convolution import Convolution, Refusal, compose, diagonal
from deploycc.core.graph import constant, int_attribute, ints_attribute, is_constant, rank, replace_value, sole_consumer, taken_names
from deploycc.core.matrix import form_of, read_linear, write_linear
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

if TYPE_CHECKING:
    import onnx_ir as ir

_PROOF = "exact in float64, rounded once"
_OPERATORS = frozenset({"Mul", "Div", "Add", "Sub"})


@dataclass(frozen=True, slots=True)
class FoldLayerscale:
    """Fold constant scales and shifts of channels into the linear node before them.

    Why: LayerScale, a bias that the exporter left apart and a constant factor are diagonal maps: y = g (W x + b) + t has the weight
    g W along the output axis and the bias g b + t. What follows, a skip above all, then sees the linear node itself.

    Before / After:
        ``Mul(Conv(x, w, b), g [C,1,1])`` / ``Conv(x, g w, g b)``
        ``Mul(Add(MatMul(x, w), b), g [C])`` / ``Add(MatMul(x, w'), g b)``
        ``Mul(Transpose(MatMul(x, w), [0,3,1,2]), g [C,1,1])`` / ``Transpose(MatMul(x, w'), [0,3,1,2])``

    Declines when:
        MULTI_CONSUMER: the value between the two is read elsewhere.
        GRAPH_OUTPUT: the value between the two is an output of the graph.
        NONCONST_WEIGHT: the weight or bias is computed at run time.
        DTYPE: the weight is quantized already.
        DYNAMIC_SHAPE: the padding of the convolution depends on the size of the image.
        NUMERIC: a folded weight is not finite, or exceeds what FP16 holds where the original did not.

    Options:
        layernorm: ``fold`` moves the scale and shift of a LayerNormalization into the only linear node that reads it; ``keep`` leaves
            them, for passes that rewrite the normalization itself.

    See: ONNX Mul-14, Conv-11, MatMul-13, LayerNormalization-17.
    """

    layernorm: Literal["keep", "fold"] = "keep"

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity", "fold-batchnorm", "fuse-layernorm", "fuse-gelu")

    def __call__(self, model: ir.Model) -> PassResult:
        """Fold until nothing changes."""
        rewrites: list[Rewrite] = []
        taken = taken_names(model.graph)
        while True:
            results = [self.fold(node, taken) for node in list(model.graph) if node.op_type in _OPERATORS]
            if self.layernorm == "fold":
                results += [_fold_layernorm(node, taken) for node in list(model.graph) if node.op_type == "LayerNormalization"]
            found = [r for r in results if isinstance(r, Rewrite)]
            rewrites += found
            if not found:
                return PassResult(tuple(rewrites), tuple(r for r in results if isinstance(r, Decline)))

    def fold(self, node: ir.Node, taken: set[str]) -> Rewrite | Decline | None:
        """Fold one node into the linear node before it; None where there is none."""
        position = next((i for i, v in enumerate(node.inputs) if is_constant(v)), None)
        source = node.inputs[1 - position] if position is not None and len(node.inputs) == 2 else None
        if source is None or position is None or isinstance(read_linear(node), Link) or rank(node.outputs[0]) != rank(source):
            return None
        path = _path(source)
        producer, axes = path[-1].producer(), rank(path[-1])
        link = read_convolution(producer) or read_linear(producer) if producer is not None and producer.graph is node.graph else None
        if link is None or axes is None:
            return None
        is_vector = node.inputs[position].const_value.size > 1  # type: ignore[union-attr]
        if isinstance(link, Refusal):
            return Decline(node.name or "", link.code, link.reason) if is_vector else None
        axis = _followed(1 if link.geometry.rank else axes - 1, path)
        array = per_channel(node.inputs[position], link.geometry.outputs, axes, axis=axis)
        map_ = None if array is None else _map(node.op_type, array, position, link.geometry.rank)
        if map_ is None:
            return None
        # A number beside a value with several readers is part of an activation more often than not.
        if refusal := next((r for r in map(shared, path) if r), None):
            return Decline(node.name or "", refusal.code, refusal.reason) if is_vector else None
        return _fold_behind(node, link, map_, path, taken)


def _path(value: ir.Value) -> list[ir.Value]:
    """Return ``value`` and, if a Transpose made it, what that was made from."""
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
    return [value] if source is None or producer is None or "perm" not in producer.attributes else [value, source]


def _followed(axis: int, path: list[ir.Value]) -> int:
    """Return where ``axis`` of the last value of ``path`` is in the first."""
    producer = path[0].producer()
    order = ints_attribute(producer, "perm") if len(path) > 1 and producer is not None else None
    return axis if order is None else order.index(axis)


def _map(operator: str, array: np.ndarray, position: int, axes: int) -> Convolution | None:
    """Return the diagonal map of ``operator`` with a constant at ``position``."""
    ones, zeros = np.ones_like(array), np.zeros_like(array)
    if operator == "Add":
        return diagonal(ones, array, rank=axes)
    if operator == "Sub":
        return diagonal(ones, -array, rank=axes) if position == 1 else diagonal(-ones, array, rank=axes)
    if operator == "Mul":
        return diagonal(array, zeros, rank=axes)
    with np.errstate(all="ignore"):
        return diagonal(1 / array, zeros, rank=axes) if position == 1 else None


def _fold_behind(node: ir.Node, link: Link, map_: Convolution, path: list[ir.Value], taken: set[str]) -> Rewrite | Decline:
    with np.errstate(all="ignore"):
        merged = compose(link.load(), map_)
    verdict = merged if isinstance(merged, Refusal) else unfit(merged, [link]) or merged
    if isinstance(verdict, Refusal):
        return Decline(node.name or "", verdict.code, verdict.reason)
    dtype, moved = weight_type([link]), len(path) > 1
    last, absorbed = (link.nodes[-1], link.nodes[:-1]) if moved else (node, link.nodes)
    if link.geometry.rank:
        write_convolution(last, link.source, verdict, absorbed=absorbed, dtype=dtype, taken=taken)
    else:
        write_linear(last, link.source, verdict, form=form_of([link]), absorbed=absorbed, dtype=dtype, taken=taken)
    if moved and node.graph is not None:
        replace_value(node.outputs[0], path[0])
        node.graph.remove(node, safe=True)
    return Rewrite(node.name or "", f"folded into '{link.name}' before it", _PROOF)


def _fold_layernorm(node: ir.Node, taken: set[str]) -> Rewrite | Decline | None:
    """Fold W (g z + t) + b into (W g) z + (W t + b), z being normalized without scale and shift."""
    value, axes = node.outputs[0], rank(node.outputs[0])
    arrays = [constant(v).astype(np.float64).reshape(-1) for v in node.inputs[1:] if constant(v) is not None]  # type: ignore[union-attr]
    if axes is None or len(arrays) != len(node.inputs) - 1 or int_attribute(node, "axis", -1) not in {-1, axes - 1}:
        return None
    gamma, beta = arrays[0], arrays[1] if len(arrays) > 1 else np.zeros_like(arrays[0])
    if np.all(gamma == 1) and not np.any(beta):
        return None
    readers = [use.node for use in value.uses()]
    links = [link for n in readers for link in [_linear_at(n)] if isinstance(link, Link) and link.source is value]
    if not links:
        return None
    if refusal := shared(value):
        return Decline(node.name or "", refusal.code, refusal.reason)
    merged = compose(diagonal(gamma, beta, rank=0), links[0].load())
    verdict = merged if isinstance(merged, Refusal) else unfit(merged, links) or merged
    if isinstance(verdict, Refusal):
        return Decline(node.name or "", verdict.code, verdict.reason)
    last, dtype = links[0].nodes[-1], node.inputs[1].dtype if node.inputs[1] is not None else None
    write_linear(last, value, verdict, form=form_of(links), absorbed=links[0].nodes[:-1], dtype=weight_type(links), taken=taken)
    node.replace_input_with(
        1, write_constant(node, f"{value.name}_ones", np.ones_like(gamma), dtype=dtype or weight_type(links), taken=taken)
    )
    node.resize_inputs(2)
    return Rewrite(node.name or "", f"scale and shift folded into '{links[0].name}' behind it", _PROOF)


def _linear_at(node: ir.Node) -> Link | Refusal | None:
    """Return the link that begins at ``node``, the bias behind it included."""
    reader = sole_consumer(node.outputs[0])
    behind = read_linear(reader) if reader is not None and reader.op_type == "Add" else None
    return behind if isinstance(behind, Link) and behind.nodes[0] is node else read_linear(node)
