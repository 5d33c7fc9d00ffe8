"""Facts about operands that analysis and insertion must agree on."""

from __future__ import annotations

import onnx_ir as ir

from deploycc.core.graph import attribute, rank


def weight_axis(node: ir.Node) -> int:
    """Return the axis of output channels in the weight of ``node`` (rule R5)."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return (rank(node.inputs[1]) or 2) - 1
