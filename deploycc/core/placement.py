"""Facts about operands that analysis and insertion must agree on."""

from __future__ import annotations

import onnx_ir as ir

from deploycc.core.dcnv3 import PLAIN, is_dcnv3
from deploycc.core.formats import INT8, Format
from deploycc.core.graph import attribute, rank


def takes_codes(node: ir.Node, format: Format) -> bool:
    """Return whether ``node``, though no anchor, reads a residual of its region in ``format``: an Add any (P4), DCNv3 its x in INT8."""
    return node.op_type == "Add" or (is_dcnv3(node) and node.op_type == PLAIN and format == INT8)


def weight_axis(node: ir.Node) -> int:
    """Return the axis of output channels in the weight of ``node`` (rule R5)."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return (rank(node.inputs[1]) or 2) - 1
