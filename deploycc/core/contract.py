"""What must hold of a graph at each stage, as functions that yield violations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploycc.core.blocks import is_scale_of_blocks
from deploycc.core.graph import constant

Clause = Callable[[ir.Model], Iterator[str]]
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
OWN_DOMAINS = frozenset({"deploycc", "trt"})
# Operators of others that a canonical pass turns into ours; no other step knows them.
IMPORTABLE = frozenset({("mmdeploy", "TRTDCNv3")})


@dataclass(frozen=True, slots=True)
class Contract:
    """A named list of clauses."""

    name: str
    clauses: tuple[Clause, ...]


def violations(model: ir.Model, contract: Contract) -> Iterator[str]:
    """Yield every violation of every clause."""
    for clause in contract.clauses:
        yield from clause(model)


def nodes_have_unique_names(model: ir.Model) -> Iterator[str]:
    """TensorRT refuses duplicate names of Q/DQ nodes, and every report needs unique anchors."""
    counts = Counter(node.name for node in model.graph)
    yield from (f"the node name {name!r} is used {count} times" for name, count in counts.items() if count > 1 or not name)


def values_are_defined(model: ir.Model) -> Iterator[str]:
    """Every input of a node is produced before it, fed, or constant."""
    known = set(model.graph.inputs) | set(model.graph.initializers.values())
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in known:
                yield f"'{node.name}' reads '{value.name}', which nothing before it produces"
        known.update(node.outputs)
    yield from (f"the output '{v.name}' is never produced" for v in model.graph.outputs if v not in known)


def functions_are_inlined(model: ir.Model) -> Iterator[str]:
    """Model-local functions outside our own domain are inlined."""
    yield from (f"the function '{f.domain}::{f.name}' is not inlined" for f in model.functions.values() if f.domain not in OWN_DOMAINS)


def operators_are_imported(model: ir.Model) -> Iterator[str]:
    """Operators of others are turned into ours before anything else looks at them."""
    yield from (f"'{n.name}' is still {n.domain}::{n.op_type}" for n in model.graph if (n.domain, n.op_type) in IMPORTABLE)


def scales_are_sound(model: ir.Model) -> Iterator[str]:
    """Rules R1 and R2: scales constant, finite and positive, or those of blocks; zero points constant zeros."""
    for node in model.graph:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        scale = constant(node.inputs[1])
        if scale is None and is_scale_of_blocks(node.inputs[1]):
            continue  # Its own scale is looked at where it is dequantized.
        if scale is None:
            yield f"'{node.name}' has a computed scale (R1)"
        elif not np.all(np.isfinite(scale.astype(np.float32))) or not np.all(scale.astype(np.float32) > 0):
            yield f"'{node.name}' has a scale that is not finite and positive (R2)"
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        zeros = constant(zero_point)
        if zero_point is not None and (zeros is None or np.any(zeros.astype(np.float32) != 0)):
            yield f"'{node.name}' has a zero point that is not a constant zero (R1)"


def activations_are_per_tensor(model: ir.Model) -> Iterator[str]:
    """Rules R4 and T2: only weights have scales per axis; the scale of an activation is a scalar, not a vector of one."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and constant(node.inputs[0]) is None:
            scale = constant(node.inputs[1])
            if scale is not None and scale.size != 1:
                yield f"'{node.name}' quantizes an activation with {scale.size} scales (R4)"
            elif scale is not None and scale.ndim:
                yield f"'{node.name}' has a scale of shape {list(scale.shape)} instead of [] (T2)"


_SOUND = (nodes_have_unique_names, values_are_defined, functions_are_inlined)
SOUND = Contract("sound", _SOUND)
CANONICAL = Contract("canonical", (*_SOUND, operators_are_imported))
QUANTIZED = Contract("quantized", (*_SOUND, scales_are_sound, activations_are_per_tensor))
LOWERED = Contract("lowered", (*_SOUND, scales_are_sound, activations_are_per_tensor))
