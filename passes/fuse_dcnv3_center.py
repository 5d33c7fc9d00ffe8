"""Fuse the blend of DCNv3's result with its own input, the ``center_feature_scale`` of large models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploycc.core.dcnv3 import PLAIN, SCALED, X, attributes_of, make_node, nodes_of, provide_functions
from deploycc.core.graph import constant, inherit_metadata, opset, remove_dead_nodes, replace_value, sole_consumer
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite
from deploycc.core.tracing import Trace, counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

_SPREADING = frozenset({"Expand", "Flatten", "Identity", "Reshape", "Tile", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class FuseDcnv3Center:
    """Fuse y (1 - c) + x c behind DCNv3, c one share per group, into the operator.

    Why: the blend reads x and y once more and c spread over all channels; inside, x is in the cache, and c is one number per thread.

    Before / After:
        ``Add(Mul(DCNv3(x, ..), Sub(1, C)), Mul(x, C))``, ``C = Reshape(Expand(Unsqueeze(c)))`` / ``DCNv3Center(x, .., c)``

    Declines when:
        SHARE: the share is not one number per pixel and group, or its shape is unknown.
        MULTI_CONSUMER: something else reads the result before the blend.

    Options: none.

    See: ``deploycc.core.dcnv3``.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity", "fuse-dcnv3-projections")

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        plain = [node for node in nodes_of(model) if node.op_type == PLAIN]
        results = [_fuse(node, model) for node in plain]
        rewrites = tuple(r for r in results if isinstance(r, Rewrite))
        if rewrites:
            provide_functions(model)
        return PassResult(rewrites, tuple(r for r in results if isinstance(r, Decline)))


def _fuse(node: ir.Node, model: ir.Model) -> Rewrite | Decline | None:
    found = next(_blends(node), None)
    if found is None:
        return None
    name, (add, scaled, own, spread, rest) = node.name or "", found
    what, x = attributes_of(node), node.inputs[X]
    share = _share(spread, x, what.group, opset(model))
    if share is None or x is None:
        return Decline(name, "SHARE", f"'{spread.name}' is not one share per pixel and group")
    if sole_consumer(node.outputs[0]) is not scaled:
        return Decline(name, "MULTI_CONSUMER", "something else reads the result before the blend")
    made = make_node([v for v in (*node.inputs, share) if v is not None], what, name=node.name, operator=SCALED)
    output, result = add.outputs[0], made.outputs[0]
    result.name, result.type, result.shape = f"{node.outputs[0].name}_blended", output.type, output.shape
    inherit_metadata(made, [node, add])
    model.graph.insert_before(add, made)
    replace_value(output, result)
    model.graph.remove(add, safe=True)
    while remove_dead_nodes(model.graph, [node, *_before(spread), scaled, own, rest][::-1]):
        pass
    return Rewrite(name, f"took over the blend '{add.name}'", "the same products in FP32, to a rounding each")


def _blends(node: ir.Node) -> Iterator[tuple[ir.Node, ir.Node, ir.Node, ir.Value, ir.Node]]:
    """Yield (Add, Mul of the result, Mul of x, spread share, Sub) of every y (1 - C) + x C."""
    x = node.inputs[X]
    for use in node.outputs[0].uses():
        scaled = use.node
        rest = _other(scaled, node.outputs[0], "Mul")
        subtraction = rest.producer() if rest is not None else None
        if subtraction is None or subtraction.op_type != "Sub" or not _is_one(subtraction.inputs[0]):
            continue
        spread, add = subtraction.inputs[1], sole_consumer(scaled.outputs[0])
        added = _other(add, scaled.outputs[0], "Add") if add is not None else None
        own = added.producer() if added is not None else None
        if add is not None and own is not None and spread is not None and x is not None and _other(own, x, "Mul") is spread:
            yield add, scaled, own, spread, subtraction


def _other(node: ir.Node, value: ir.Value, operator: str) -> ir.Value | None:
    """Return the operand beside ``value`` of a node of two operands, if it is an ``operator``."""
    if node.op_type != operator or value not in node.inputs:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _is_one(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and bool(np.all(array == 1))


def _before(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that spread ``value``, last first."""
    nodes: list[ir.Node] = []
    while (producer := value.producer()) is not None and producer.op_type in _SPREADING and producer.inputs[0] is not None:
        nodes.append(producer)
        value = producer.inputs[0]
    return nodes


def _share(spread: ir.Value, x: ir.Value | None, group: int, version: int) -> ir.Value | None:
    """Return the value [N, H, W, G] of which ``spread`` holds each number once per channel of its group."""
    if x is None or x.shape is None or len(x.shape) != 4:
        return None
    sizes = {str(d.value): size for d, size in zip(x.shape, (2, 3, 5, 0), strict=True) if not isinstance(d, int)}
    shape = Trace({}, version, sizes).shape(x)
    for node in _before(spread):
        share = node.inputs[0]
        if share is None or share.shape is None or shape is None or list(share.shape) != [*x.shape[:3], group]:
            continue
        given = counted((*shape[:3], group))
        found = Trace({share: given}, version, sizes).of(spread)
        if found is not None and np.array_equal(np.broadcast_to(found, shape), given.repeat(shape[3] // group, axis=3)):
            return share
    return None
