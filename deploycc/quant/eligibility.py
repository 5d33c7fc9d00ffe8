"""Which quantized formats the skip rules allow for an op (rules S1 to S7, P16, T1, D2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.blocks import block_axis, block_size
from deploycc.core.dcnv3 import feeds_offsets
from deploycc.core.formats import FORMATS
from deploycc.core.graph import attribute, int_attribute, static_shape
from deploycc.core.placement import weight_axis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycc.core.formats import Format

Verdict = tuple[tuple[str, ...], tuple[str, ...]]
TILE = 16  # rows, columns and terms of the smallest product of the tensor cores


def conv_formats(node: ir.Node) -> Verdict:
    """Return the formats allowed for a convolution and the rules that took one away."""
    weight = node.inputs[1]
    if node.op_type == "ConvTranspose" or weight is None or weight.shape is None or len(weight.shape) > 4:
        return (), ("T1",)
    shape = [int(d) for d in weight.shape]  # type: ignore[arg-type]
    group = int(attribute(node, "group", 1))  # type: ignore[call-overload]
    out, per_group, kernel = shape[0], shape[1], shape[2:]
    rules: list[str] = []
    formats: list[str] = []
    if _int8_pays(out, per_group, kernel, group):
        formats.append("int8")
    else:
        rules.append("S5" if group > 1 else "S2")
    if min(out, per_group * group) > 16 and int(np.prod(kernel)) <= 32 and (group == 1 or per_group % 4 == 0):
        formats.append("fp8")
    else:
        rules.append("S3")
    return tuple(formats), tuple(rules)


def _int8_pays(out: int, per_group: int, kernel: Sequence[int], group: int) -> bool:
    """Rules S2 and S5: enough channels, or one of the shapes that still have an INT8 kernel."""
    if group > 1:
        return out % 8 == 0 and (all(k >= 3 for k in kernel) if per_group == 1 else per_group % 4 == 0)
    if min(out, per_group) >= 16:
        return True
    square = len(set(kernel)) <= 1
    return square and (out % 8 == 0 or per_group % 8 == 0) and max(out, per_group) >= 16


def linear_formats(group: Sequence[ir.Node], *, transformer: bool, batch: int = 0) -> Verdict:
    """Return the formats allowed for tied matrix products with constant weights; none where one computes sampling offsets.

    ``batch`` is the batch that the engine is tuned for, 0 where that is unknown.
    """
    if any(feeds_offsets(node.outputs[0]) for node in group):
        return (), ("D2",)
    shapes = [static_shape(node.inputs[1]) or (0,) for node in group]
    if min(map(min, shapes)) < TILE:
        return (), ("S1",)
    blocked = [f.name for f in FORMATS.values() if f.block and all(_fills_blocks(n, s, f) for n, s in zip(group, shapes, strict=True))]
    is_head = transformer and any(v.is_graph_output() for n in group for v in _tail(n))
    rules = ("P16",) if is_head else () if blocked else ("R6",)
    waits = all(0 < _rows(node, batch) < TILE for node in group)  # for its weight
    return (("int8",) if is_head else ("int8", "fp8", *blocked)), (("S1",) if waits else ()) + rules


def _rows(node: ir.Node, batch: int) -> int:
    """Return how many rows a product has where the batch, if dynamic, is ``batch``; 0 where that is unknown."""
    shape = node.outputs[0].shape
    given = node.graph.inputs[0].shape if node.graph is not None and node.graph.inputs else None
    if shape is None or len(shape) < 2:
        return 0
    named = given[0] if given and isinstance(given[0], ir.SymbolicDim) and given[0].value else None
    rows = [batch if named is not None and d == named else d for d in shape[:-1]]
    known = [d for d in rows if isinstance(d, int)]
    return math.prod(known) if len(known) == len(rows) else 0


def _fills_blocks(node: ir.Node, shape: tuple[int, ...], format: Format) -> bool:
    """Return whether the product sums over whole blocks of ``format``."""
    if len(shape) != 2 or int_attribute(node, "transA", 0):
        return False
    return block_size(format, shape[block_axis(weight_axis(node))]) > 0


def _tail(node: ir.Node) -> list[ir.Value]:
    values = [node.outputs[0]]
    for use in node.outputs[0].uses():
        if use.node.op_type == "Add":
            values.append(use.node.outputs[0])
    return values


def attention_formats(product: ir.Node) -> Verdict:
    """Return the formats allowed for an attention core, given its first product ``Q @ K^T``."""
    query, scores = product.inputs[0], product.outputs[0]
    head = _dim(query, -1)
    sequence = max(_dim(scores, -1) or 0, _dim(scores, -2) or 0)
    formats, rules = [], []
    if sequence <= 512 and head in {16, 32, 64}:
        formats.append("int8")
    else:
        rules.append("S6")
    if head is not None and 8 < head <= 256:
        formats.append("fp8")
    else:
        rules.append("S7")
    return tuple(formats), tuple(rules)


def _dim(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or len(value.shape) < 2:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None
