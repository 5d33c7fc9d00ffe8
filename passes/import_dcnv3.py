"""Import the DCNv3 nodes that InternImage's own exporter writes for mmdeploy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from deploycc.core.dcnv3 import OFFSET, DCNv3, X, check_operands, make_node, nodes_of, provide_functions
from deploycc.core.errors import UsageError
from deploycc.core.graph import attribute, float_attribute, inherit_metadata, int_attribute, replace_value
from deploycc.core.passes import PassResult, Phase, Rewrite

if TYPE_CHECKING:
    from collections.abc import Sequence

_INTEGERS = (*("group", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "remove_center"),)
_REQUIRED = _INTEGERS[:-1]


@dataclass(frozen=True, slots=True)
class ImportDcnv3:
    """Import the nodes ``mmdeploy::TRTDCNv3`` that InternImage's own exporter writes.

    Why: such a file runs nowhere but in a TensorRT with mmdeploy's FP32 plugin. As ``deploycc::DCNv3`` it runs in ONNX Runtime, builds for
    TensorRT-RTX, and can be quantized. Both versions of the operator are read, with and without the attribute ``remove_center``.
    The attribute ``im2col_step`` only splits the batch and has no meaning here.

    Before / After:
        ``TRTDCNv3<kernel_h=3, .., im2col_step=256>(x, offset, mask)`` / ``DCNv3<kernel_h=3, ..>(x, offset, mask)`` and its function

    Declines when:
        never: a node that cannot be imported is an error (UsageError), because nothing can execute it.

    Options: none.

    See: ``deploycc.core.dcnv3``.
    """

    phase: ClassVar[Phase] = "import"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        foreign = [n for n in model.graph if n.domain == "mmdeploy" and n.op_type == "TRTDCNv3"]
        rewrites = tuple(_import(model.graph, node) for node in foreign)
        for node in nodes_of(model):
            check_operands(node)
        if rewrites:
            model.graph.opset_imports.pop("mmdeploy", None)
            provide_functions(model)
            # Types and shapes ended at the first of these nodes, which no shape inference knew.
            ShapeInferencePass(strict_mode=False)(model)
        return PassResult(rewrites)


def _import(graph: ir.Graph, node: ir.Node) -> Rewrite:
    what = _attributes(node)
    operands = [v for v in node.inputs if v is not None]
    made = make_node(operands, what, name=node.name)
    old, new = node.outputs[0], made.outputs[0]
    name = old.name
    replace_value(old, new)
    new.name, new.type = name, operands[X].type
    new.shape = _output_shape(node, operands, what)
    inherit_metadata(made, [node])
    graph.insert_before(node, made)
    graph.remove(node, safe=True)
    return Rewrite(made.name or "", f"imported with {len(node.attributes)} attributes")


def _attributes(node: ir.Node) -> DCNv3:
    at = f"node '{node.name}' (mmdeploy::TRTDCNv3)"
    missing = [name for name in (*_REQUIRED, "offset_scale") if name not in node.attributes]
    if missing or len([v for v in node.inputs if v is not None]) != 3:
        why = f"it has no attribute {missing[0]}" if missing else f"it has {len(node.inputs)} inputs instead of 3"
        raise UsageError(f"the node is no DCNv3: {why}", at=at, fix="export the model again with InternImage's exporter")
    values = {name: int_attribute(node, name, 0) for name in _INTEGERS}
    what = DCNv3(**values, offset_scale=float_attribute(node, "offset_scale", 1.0))
    channels = attribute(node, "group_channels")
    x = node.inputs[X]
    width = x.shape[3] if x is not None and x.shape is not None and len(x.shape) == 4 else None
    if isinstance(channels, int) and isinstance(width, int) and channels * what.group != width:
        raise UsageError(
            f"{what.group} groups of {channels} channels do not make the {width} channels of x", at=at, fix="export the model again"
        )
    return what


def _output_shape(node: ir.Node, operands: Sequence[ir.Value], what: DCNv3) -> ir.Shape:
    """Return the shape of the result, as far as it is known."""
    x, offset = (list(operands[i].shape) if operands[i].shape is not None else [None] * 4 for i in (X, OFFSET))  # type: ignore[arg-type]
    declared = node.outputs[0].shape
    if isinstance(x[1], int) and isinstance(x[2], int):
        return ir.Shape([x[0], *what.output_size(x[1], x[2]), x[3]])
    return ir.Shape([x[0], offset[1], offset[2], x[3]]) if declared is None else declared
