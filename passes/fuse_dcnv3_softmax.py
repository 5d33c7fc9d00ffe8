"""Fuse the softmax over kernel points into DCNv3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from deploycc.core.dcnv3 import MASK, DCNv3, attributes_of, nodes_of, replace_attributes
from deploycc.core.graph import inherit_metadata, int_attribute, remove_dead_nodes, sole_consumer
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class FuseDcnv3Softmax:
    """Fuse the softmax over kernel points into DCNv3.

    Why: as a kernel of its own it reads and writes every mask once more, 31 % on top of what the operator itself moves; inside, it costs
    6 % more instructions.

    Before / After:
        ``DCNv3(x, offset, Reshape(Softmax(Reshape(logits))))`` / ``DCNv3<softmax=1>(x, offset, logits)``

    Declines when:
        AXIS: the softmax does not run over the kernel points of one group.
        SHAPE: the logits are not laid out [N, Ho, Wo, G K], or their shape is unknown.
        MULTI_CONSUMER: something else reads the masks.

    Options: none.

    See: ``deploycc.core.dcnv3``; ONNX Softmax-13.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity", "fuse-softmax", "raise-dcnv3")

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        results = [_fuse(node, attributes_of(node)) for node in nodes_of(model)]
        declines = tuple(r for r in results if isinstance(r, Decline))
        return PassResult(tuple(r for r in results if isinstance(r, Rewrite)), declines)


def _fuse(node: ir.Node, what: DCNv3) -> Rewrite | Decline | None:
    path = _path(node)
    if what.softmax or what.record or path is None:
        return None
    name, softmax, logits = node.name or "", path[-1], path[-1].inputs[0]
    before = logits.producer() if logits is not None else None
    if before is not None and before.op_type == "Reshape":
        path, logits = [*path, before], before.inputs[0]
    source, shape = softmax.inputs[0], node.inputs[MASK]
    if source is None or source.shape is None or logits is None or logits.shape is None or shape is None or shape.shape is None:
        return Decline(name, "SHAPE", "the shape of the logits is unknown")
    rank = len(source.shape)
    if int_attribute(softmax, "axis", -1) % rank != rank - 1 or source.shape[-1] != what.points:
        return Decline(name, "AXIS", f"the softmax does not run over the {what.points} kernel points")
    # The numbers are the same and in the same order: equal inner dimensions mean equal batches.
    if len(logits.shape) != 4 or list(logits.shape[1:]) != list(shape.shape[1:]):
        return Decline(name, "SHAPE", f"the logits are {list(logits.shape)}, the masks {list(shape.shape)}")
    if any(sole_consumer(each.outputs[0]) is None for each in path[: path.index(softmax) + 1]):
        return Decline(name, "MULTI_CONSUMER", "something else reads the masks")
    node.replace_input_with(MASK, logits)
    replace_attributes(node, replace(what, softmax=1))
    inherit_metadata(node, [softmax])
    if softmax.graph is not None:
        remove_dead_nodes(softmax.graph, path[::-1])
    return Rewrite(name, f"took over the softmax '{softmax.name}'", "the same sums in FP32, to a rounding each")


def _path(node: ir.Node) -> list[ir.Node] | None:
    """Return the nodes from the mask back to a softmax: a Reshape or none, then the softmax."""
    path: list[ir.Node] = []
    value = node.inputs[MASK]
    while value is not None and (producer := value.producer()) is not None and len(path) < 2:
        path.append(producer)
        if producer.op_type == "Softmax":
            return path
        if producer.op_type != "Reshape":
            return None
        value = producer.inputs[0]
    return None
