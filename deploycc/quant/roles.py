"""What part a region plays in its network: only layers of one kind have relevance that may be compared as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.core.graph import int_attribute, is_constant
from deploycc.quant.regions import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from deploycc.core.plan import Region

_MOVEMENT = frozenset(
    {"Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Dropout"}
)
Read = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer in the sense of LRP-QViT: its kind, and the operands that are its input.

    ``maps`` holds one entry per input map; an entry lists the operands (anchor, position) through which the map is read, several
    where projections share it.
    """

    region: str
    kind: str
    maps: tuple[tuple[Read, ...], ...]


def layers_of(model: ir.Model, regions: Sequence[Region]) -> tuple[Layer, ...]:
    """Return the layers of every region: one each, two of an attention core (``matmul1`` is QK, ``matmul2`` is AV)."""
    nodes = {n.name or "": n for n in model.graph}
    kinds = kinds_of(model, regions)
    layers = []
    for region in regions:
        if region.kind == "attention":
            both = tuple((name, i) for name in region.anchors for i in (0, 1))
            layers.append(Layer(region.name, "matmul1", ((both[0],), (both[1],))))
            layers.append(Layer(region.name, "matmul2", ((both[2],), (both[3],))))
        else:
            reads = tuple((name, _data_operand(nodes[name])) for name in region.anchors)
            layers.append(Layer(region.name, kinds[region.name], (reads,)))
    return tuple(layers)


def kinds_of(model: ir.Model, regions: Sequence[Region]) -> dict[str, str]:
    """Return each region's kind.

    Those of a transformer are told by their neighbours: ``qkv`` feeds an attention core, ``proj`` reads one, ``fc1`` ends in an
    activation that ``fc2`` reads. Convolutions are ``conv`` or ``depthwise``, the rest ``linear``.
    """
    nodes = {n.name or "": n for n in model.graph}
    owner = {nodes[name]: region for region in regions for name in region.nodes}
    kinds = {region.name: _weighted_kind(nodes[region.anchors[0]], region) for region in regions}
    for region in regions:
        sources = [s for name in region.anchors for v in nodes[name].inputs if (s := _source(v, owner, region)) is not None]
        if region.kind == "attention":
            kinds.update({s.name: "qkv" for s in sources if s.kind == "linear"})
        elif region.kind == "linear" and any(s.kind == "attention" for s in sources):
            kinds[region.name] = "proj"
        elif region.kind == "linear":
            for source in sources:
                if source.kind == "linear" and any(nodes[name].op_type in ACTIVATIONS for name in source.nodes):
                    kinds[source.name], kinds[region.name] = "fc1", "fc2"
    return kinds


def _weighted_kind(anchor: ir.Node, region: Region) -> str:
    return "depthwise" if region.kind == "conv" and int_attribute(anchor, "group", 1) > 1 else region.kind


def _data_operand(anchor: ir.Node) -> int:
    return 1 if is_constant(anchor.inputs[0]) else 0


def _source(value: ir.Value | None, owner: Mapping[ir.Node, Region], reader: Region) -> Region | None:
    """Return the region that computes ``value``, through nodes that only move or scale it."""
    while value is not None and (node := value.producer()) is not None:
        if (found := owner.get(node)) is not None and found is not reader:
            return found
        scaled = node.op_type in {"Mul", "Div"} and all(is_constant(v) for v in node.inputs[1:])
        if node.op_type not in _MOVEMENT and not scaled:
            return None
        value = node.inputs[0]
    return None
