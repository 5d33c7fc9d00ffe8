"""Operators whose change between opsets onnx's converter gets wrong or refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from deploycc.core.errors import UsageError
from deploycc.interop.protos import anchor, definitions, graphs, nodes

if TYPE_CHECKING:
    from collections.abc import Container, Mapping


def decompose_group_normalization(model: onnx.ModelProto) -> None:
    """Write GroupNormalization of opsets 18 to 20 as InstanceNormalization over groups, in place.

    That version has one scale per group instead of one per channel and is deprecated; onnx's checker refuses it, and the
    converter to opset 21 keeps the wrong number of scales. With x seen as [N, G, -1] it is exactly InstanceNormalization.
    """
    taken = definitions(model.graph)
    for graph in graphs(model.graph):
        rewritten: list[onnx.NodeProto] = []
        for node in graph.node:
            old = node.op_type == "GroupNormalization" and not node.domain
            rewritten.extend(_over_groups(node, taken.keys()) if old else [node])
        if len(rewritten) > len(graph.node):
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rewritten]
            del graph.node[:]
            graph.node.extend(copies)


def _over_groups(node: onnx.NodeProto, taken: Container[str]) -> list[onnx.NodeProto]:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    stem, x, y = node.output[0], node.input[0], node.output[0]
    while any(f"{stem}_{suffix}" in taken for suffix in ("groups", "grouped", "normal", "shape")):
        stem += "_"
    target = numpy_helper.from_array(np.array([0, attributes["num_groups"], -1], np.int64))
    result = [
        helper.make_node("Constant", [], [f"{stem}_groups"], value=target),
        helper.make_node("Reshape", [x, f"{stem}_groups"], [f"{stem}_grouped"]),
        helper.make_node(
            "InstanceNormalization", [f"{stem}_grouped", *node.input[1:]], [f"{stem}_normal"], epsilon=attributes.get("epsilon", 1e-5)
        ),
        helper.make_node("Shape", [x], [f"{stem}_shape"]),
        helper.make_node("Reshape", [f"{stem}_normal", f"{stem}_shape"], [y], name=node.name),
    ]
    for each in result:
        each.metadata_props.extend(node.metadata_props)
    return result


def resize_rounding(graph: onnx.GraphProto, path: str) -> dict[str, str]:
    """Return the rounding of each Upsample and Resize of opset 10 or below.

    They sample at x / scale and round down where they enlarge, up where they shrink. onnx's converter leaves the defaults
    of opset 11 (half_pixel, round_prefer_floor), which mean something else. Keys are the names of the outputs.

    Raises:
        UsageError: when one node shrinks one axis and enlarges another, which no newer opset can say.
    """
    constants = {t.name: t for t in graph.initializer}
    constants |= {n.output[0]: a.t for n in nodes(graph) if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    rounding: dict[str, str] = {}
    for node in nodes(graph):
        if node.op_type not in {"Resize", "Upsample"} or node.domain:
            continue
        known = constants.get(node.input[1]) if len(node.input) > 1 else None
        attribute = next((a for a in node.attribute if a.name == "scales"), None)
        scales = numpy_helper.to_array(known) if known is not None else np.array(attribute.floats if attribute is not None else [1.0])
        if np.any(scales < 1) and np.any(scales > 1):
            raise UsageError(
                "a Resize of opset 10 that shrinks one axis and enlarges another has no equal in newer opsets",
                at=f"{anchor(node)} of '{path}'",
                fix="export the model with opset 11 or later",
            )
        rounding[node.output[0]] = "ceil" if np.any(scales < 1) else "floor"
    return rounding


def set_resize_modes(graph: onnx.GraphProto, rounding: Mapping[str, str]) -> None:
    """Write the sampling of opset 10 into the Resize nodes that produce the keys of ``rounding``."""
    for node in nodes(graph):
        if node.op_type == "Resize" and node.output[0] in rounding:
            _set_mode(node, rounding[node.output[0]])


def _set_mode(node: onnx.NodeProto, rounding: str) -> None:
    wanted = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": rounding}
    kept = [a for a in node.attribute if a.name not in wanted]
    del node.attribute[:]
    node.attribute.extend([*kept, *(onnx.helper.make_attribute(name, value) for name, value in wanted.items())])
