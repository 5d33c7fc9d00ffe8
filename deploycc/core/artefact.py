"""An artefact: one graph at one stage of the flow, immutable by convention, with its digest and its parent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import onnx_ir as ir


class Stage(Enum):
    """How far a graph has come. Every stage has a contract (``deploycc.core.contract``)."""

    IMPORTED = "imported"
    CANONICAL = "canonical"
    QUANTIZED = "quantized"
    LOWERED = "lowered"


@dataclass(frozen=True)
class Artefact:
    """A model at a stage. Nobody edits ``model``; ``deploycc.core.passes.run`` works on a clone."""

    model: ir.Model
    stage: Stage
    parent: Artefact | None = None

    @cached_property
    def digest(self) -> str:
        """Return a SHA-256 over structure and weights, equal for equal graphs whatever file they came from."""
        return digest_of(self.model)


def digest_of(model: ir.Model) -> str:
    """Return the SHA-256 of inputs, nodes in order, attributes, and initializers."""
    sha = hashlib.sha256()
    for value in (*model.graph.inputs, *model.graph.outputs):
        sha.update(f"{value.name}:{value.type}:{value.shape};".encode())
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        if tensor is not None:
            sha.update(f"{name}:{tensor.dtype}:{tensor.shape};".encode())
            sha.update(tensor.tobytes())
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        attributes = ",".join(f"{k}={_attribute_text(a)}" for k, a in sorted(node.attributes.items()))
        inputs = ",".join(v.name or "" if v is not None else "" for v in node.inputs)
        outputs = ",".join(v.name or "" for v in node.outputs)
        sha.update(f"{node.domain}::{node.op_type}({inputs})->({outputs})[{attributes}];".encode())
    return sha.hexdigest()


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    if attribute.type == ir.AttributeType.TENSOR:
        return hashlib.sha256(attribute.value.tobytes()).hexdigest()
    return repr(attribute.value)
