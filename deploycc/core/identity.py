"""Who is who: PyTorch module, ONNX node, region, and the Q/DQ nodes that precision added."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.core.blocks import BLOCK_OPERATORS
from deploycc.core.graph import inherit_metadata

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.plan import PrecisionPlan, Region

SCOPES = "pkg.torch.onnx.name_scopes"
PAIRED = frozenset({"QuantizeLinear", "DequantizeLinear"}) | BLOCK_OPERATORS


@dataclass(frozen=True, slots=True)
class Identity:
    """One region: the PyTorch modules of its anchors, in the anchors' order, and its Q/DQ nodes in a lowered graph."""

    torch: tuple[str, ...]
    qdq: tuple[str, ...]


def scope_of(node: ir.Node) -> str:
    """Return the PyTorch module path of ``node``, or an empty string.

    It is what ``torch.onnx.export`` recorded in the metadata; the exporter before ``dynamo=True`` wrote it into the node's name.
    """
    recorded = node.metadata_props.get(SCOPES)
    if not recorded:
        return _path_in_name(node.name or "")
    try:
        scopes = ast.literal_eval(recorded)
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _path_in_name(name: str) -> str:
    """Return ``layer1.0.conv1`` for ``/layer1/layer1.0/conv1/Conv``, where each part may repeat the parts before it."""
    path: list[str] = []
    for part in name.split("/")[1:-1] if name.startswith("/") else ():
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return ".".join(path)


def pairs_before(node: ir.Node, index: int) -> list[ir.Node]:
    """Return the QuantizeLinear and DequantizeLinear directly before operand ``index`` of ``node``, in order."""
    found: list[ir.Node] = []
    value = node.inputs[index]
    while value is not None and (producer := value.producer()) is not None and producer.op_type in PAIRED:
        found.insert(0, producer)
        value = producer.inputs[0]
    return found


def adopt_pairs(node: ir.Node, index: int) -> None:
    """Give the pairs before an operand the metadata of ``node``, so that they are known by its PyTorch module; the first reader counts."""
    for each in pairs_before(node, index):
        inherit_metadata(each, [node])


def identities(plan: PrecisionPlan, model: ir.Model) -> dict[str, Identity]:
    """Return the identity of each region of ``plan`` by name, read from the lowered graph ``model``."""
    nodes = {n.name or "": n for n in model.graph}
    return {a.region.name: _identity(a.region, nodes) for a in plan.assignments}


def _identity(region: Region, nodes: dict[str, ir.Node]) -> Identity:
    members = [nodes[name] for name in region.nodes if name in nodes]
    paths = (scope_of(nodes[name]) for name in region.anchors if name in nodes)
    pairs = (pair.name or "" for node in members for i in range(len(node.inputs)) for pair in pairs_before(node, i))
    return Identity(tuple(dict.fromkeys(filter(None, paths))), tuple(dict.fromkeys(pairs)))
