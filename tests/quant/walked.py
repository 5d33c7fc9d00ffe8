"""Walk a small graph with given relevance at its output, and look at what arrives everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploycc.quant.lrp.program import Program
from deploycc.quant.lrp.rules import propagator, ruled_functions
from deploycc.quant.lrp.tape import record, walk

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.quant.lrp.tape import Passage


@dataclass
class Walked:
    """Outputs, gradients and relevance of the inputs, and the sums of relevance on both sides of every node."""

    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    relevance: dict[str, np.ndarray]
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)


def walked(
    model: ir.Model, relevance: np.ndarray | None = None, *, fallback: str | None = None, atomic: bool = True, **feeds: np.ndarray
) -> Walked:
    """Walk ``model`` back from its first output; the seed of both gradient and relevance is ``relevance``, default ones."""
    program = Program(model, atomic=ruled_functions() if atomic else ())
    target = program.graph.outputs[0]
    tape = record(program, feeds, keep=[*program.graph.outputs])
    outputs = {v.name or "": t.numpy() for v, t in tape.kept.items()}
    seed = torch.ones_like(tape.kept[target]) if relevance is None else torch.from_numpy(np.asarray(relevance, np.float32))
    sums: dict[str, tuple[float, float]] = {}

    def visit(passage: Passage) -> None:
        arrived, passed = (sum(float(r.sum()) for r in parts if r is not None) for parts in (passage.relevance_out, passage.relevance_in))
        sums[passage.step.node.name or ""] = (arrived, passed)

    gradients, relevances = walk(
        tape, gradient={target: seed}, relevance={target: seed}, propagate=propagator(fallback=fallback), visit=visit
    )
    named = [{v.name or "": t.numpy() for v, t in found.items()} for found in (gradients, relevances)]
    return Walked(outputs, named[0], named[1], sums)
