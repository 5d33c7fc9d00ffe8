"""Which nodes stay in FP32: decisions (D1), sampling offsets (D2), decomposed norms (S9), and values near the largest FP16 number (N1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycc.core.dcnv3 import OFFSET, nodes_of
from deploycc.core.formats import BF16
from deploycc.core.graph import FLOAT_TYPES
from deploycc.quant.calibrate import calibrate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycc.core.backend import Reference
    from deploycc.core.data import Dataset
    from deploycc.core.formats import Format
    from deploycc.core.plan import Region

# fmt: off
DECIDING_OPS = frozenset({
    "ArgMax", "ArgMin", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "NonMaxSuppression", "NonZero",
    "Round", "TopK",
})
# fmt: on
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
HALF_LIMIT = 65504.0 / 4


def decision_islands(model: ir.Model, regions: Sequence[Region]) -> dict[str, str]:
    """Return the float nodes between the last weighted op and a comparison or an index, with the reason."""
    covered = {name for region in regions for name in region.nodes}
    islands: dict[str, str] = {}
    pending = [n for n in model.graph if _decides(n)]
    goal = {n: n for n in pending}
    while pending:
        node = pending.pop()
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is None or value is None or value.dtype not in FLOAT_TYPES or (producer.name or "") in covered or producer in goal:
                continue
            goal[producer] = goal[node]
            islands[producer.name or ""] = f"D1: reaches the decision '{goal[node].name}' ({goal[node].op_type})"
            pending.append(producer)
    return islands


def _decides(node: ir.Node) -> bool:
    """Return whether ``node`` turns floating-point numbers into decisions; a Cast to integers truncates, and so decides."""
    reads_floats = any(v is not None and v.dtype in FLOAT_TYPES for v in node.inputs)
    return reads_floats and (node.op_type in DECIDING_OPS or (node.op_type == "Cast" and node.outputs[0].dtype not in FLOAT_TYPES))


def sampling_islands(model: ir.Model, base: Format) -> dict[str, str]:
    """Return the nodes that compute sampling offsets, from the weighted op on, where ``base`` is too coarse for positions (D2)."""
    islands: dict[str, str] = {}
    if base != BF16:
        return islands
    pending = [node.inputs[OFFSET] for node in nodes_of(model)]
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None or (node.name or "") in islands:
            continue
        islands[node.name or ""] = "D2: computes sampling offsets, for which BF16 is too coarse"
        if node.op_type not in WEIGHTED:
            pending.extend(v for v in node.inputs if v is not None and v.dtype in FLOAT_TYPES)
    return islands


def islands_of(model: ir.Model, data: Dataset, *, reference: Reference, batch: int) -> dict[str, str]:
    """Return nodes whose outputs come within a factor of four of the largest FP16 number on ``data``."""
    values = {v.name or "": n.name or "" for n in model.graph for v in n.outputs if v.dtype == ir.DataType.FLOAT}
    seen = calibrate(model, data, ranges=(), extremes=list(values), reference=reference, batch=batch)
    return {
        values[name]: f"N1: reaches {observer.limit:.3g}, FP16 ends at 65504"
        for name, observer in seen.observers.items()
        if observer.limit > HALF_LIMIT
    }
