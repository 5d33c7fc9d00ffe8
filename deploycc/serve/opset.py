"""Lower the opset of a model, for runtimes that read old ones only.

onnx's own converter has no way down for most operators, even those that only gained types. Here an operator goes down when
the older schema has every attribute that is not at its default and every input; reductions get their axes as an attribute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import onnx

# Reductions take their axes as an input since these versions.
AXES_AS_INPUT = {"ReduceSum": 13} | dict.fromkeys(
    ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"), 18
)


class NoOlderForm(Exception):
    """A node means something that the older opset cannot say."""


def lower_opset(model: ir.Model, opset: int) -> None:
    """Lower ``model`` to ``opset`` in place, without changing what it computes.

    Raises:
        NoOlderForm: naming the node and the reason; the model is then half converted and of no use.
    """
    before = model.opset_imports.get("", 0)
    if before <= opset:
        return
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.domain not in {"", "ai.onnx"}:
            raise NoOlderForm(f"node '{node.name}' is of the domain '{node.domain}'")
        _lower(node, before, opset)
        node.version = None
    model.opset_imports[""] = opset
    model.ir_version = min(model.ir_version, 8)


def _lower(node: ir.Node, before: int, opset: int) -> None:
    if before >= AXES_AS_INPUT.get(node.op_type, before + 1) > opset and len(node.inputs) > 1:
        _axes_to_attribute(node)
    new, old = _schema(node, before), _schema(node, opset)
    for name, attribute in list(node.attributes.items()):
        if name not in old.attributes:
            if not _is_default(attribute, new):
                raise NoOlderForm(f"'{name}' of node '{node.name}' ({node.op_type}) came after opset {opset}")
            del node.attributes[name]
    if len(node.inputs) > old.max_input:
        raise NoOlderForm(f"node '{node.name}' ({node.op_type}) has {len(node.inputs)} inputs, more than in opset {opset}")


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema:
    import onnx

    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        raise NoOlderForm(f"node '{node.name}': {node.op_type} came after opset {opset}") from None


def _is_default(attribute: ir.Attr, schema: onnx.defs.OpSchema) -> bool:
    import onnx

    declared = schema.attributes[attribute.name].default_value if attribute.name in schema.attributes else None
    return declared is not None and bool(declared.type) and onnx.helper.get_attribute_value(declared) == attribute.value


def _axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1]
    if axes is not None:
        if axes.const_value is None:
            raise NoOlderForm(f"the axes of node '{node.name}' ({node.op_type}) are computed")
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(a) for a in axes.const_value.numpy().reshape(-1)])
    node.resize_inputs(1)
