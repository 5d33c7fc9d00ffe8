"""Record one batch through a graph and walk it backwards once, with gradients and relevance side by side.

Every node is recorded with an autograd graph of its own: its inputs are leaves. The walk asks it for vector-Jacobian products, drops it,
and so needs less and less memory. Nothing of the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deploycc.quant.lrp.operators import Compute

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from deploycc.quant.lrp.program import Program

Parts = list[Tensor | None]


@dataclass(slots=True)
class Step:
    """One executed node: its inputs (leaves where they carry a gradient) and outputs.

    ``carries`` says which inputs depend on the fed data. ``axes`` are those along which the samples lie in the inputs, ``axis`` that
    of the first output. ``at_image`` marks the first linear layer, whose input is the image.
    """

    node: ir.Node
    compute: Compute
    inputs: Parts
    outputs: tuple[Tensor, ...]
    carries: tuple[bool, ...]
    samples: int
    axes: tuple[int | None, ...]
    axis: int | None
    at_image: bool = False

    @property
    def carrying(self) -> list[int]:
        """Return the positions of the inputs that carry a gradient."""
        return [i for i, carries in enumerate(self.carries) if carries]

    def pull(self, cotangents: Sequence[Tensor | None]) -> Parts:
        """Return the vector-Jacobian product for every carrying input, None for the others. May be called again."""
        return pull(self.outputs, self.inputs, self.carries, cotangents)

    def totals(self, value: Tensor) -> Tensor:
        """Return the sums over each sample of a tensor shaped like the first output, in a shape that broadcasts to it."""
        axis = self.axis
        if axis is None or value.ndim <= axis or value.shape[axis] % self.samples:
            return value.sum()
        rows = value.movedim(axis, 0)
        sums = rows.reshape(self.samples, -1).sum(1).repeat_interleave(rows.shape[0] // self.samples)
        return sums.reshape([-1 if i == axis else 1 for i in range(value.ndim)])


@dataclass(frozen=True, slots=True)
class Passage:
    """What the walk knows at one node; gradients and relevance are None where none arrived."""

    step: Step
    gradient_out: Parts
    gradient_in: Parts
    relevance_out: Parts
    relevance_in: Parts


Cotangents = dict["ir.Value", Tensor]
Propagate = Callable[[Step, list[Tensor]], Parts]
Visit = Callable[[Passage], None]


@dataclass(slots=True)
class Tape:
    """The steps of one batch in the order of execution, and the values that were asked for."""

    samples: int
    steps: list[Step] = field(default_factory=list)
    kept: dict[ir.Value, Tensor] = field(default_factory=dict)


def pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], carries: Sequence[bool], cotangents: Sequence[Tensor | None]) -> Parts:
    """Return ``cotangents^T J`` for every carrying input of ``outputs = f(inputs)``."""
    pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
    leaves = [x for x, needed in zip(inputs, carries, strict=True) if needed and x is not None]
    if not pairs:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad([y for y, _ in pairs], leaves, [c for _, c in pairs], retain_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in carries]


def record(program: Program, feeds: Mapping[str, np.ndarray], *, keep: Sequence[ir.Value]) -> Tape:
    """Execute one batch and return its tape.

    Args:
        program: the graph.
        feeds: arrays by input name; the first axis of the first counts the samples.
        keep: values whose tensors are wanted.

    Raises:
        UsageError: for an operator that torch has not been taught, naming the node.
    """
    values, carrying = program.feed(feeds)
    tape = Tape(samples=len(next(iter(feeds.values()))))
    for node in program.nodes:
        carries = tuple(v in carrying for v in node.inputs)
        tensors = [None if v is None else program.lookup(v, values) for v in node.inputs]
        leaves: Parts = [t.detach().requires_grad_() if c and t is not None else t for t, c in zip(tensors, carries, strict=True)]
        with torch.set_grad_enabled(any(carries)):
            compute, outputs = program.execute(node, leaves, differentiable=any(carries))
        moving = [v for v, t in zip(node.outputs, outputs, strict=False) if t.requires_grad]
        if moving:
            axes = tuple(None if v is None else program.batch_axis(v) for v in node.inputs)
            axis = program.batch_axis(node.outputs[0])
            tape.steps.append(Step(node, compute, leaves, outputs, carries, tape.samples, axes, axis, program.is_at_image(node)))
            carrying.update(moving)
        for value, tensor in zip(node.outputs, outputs, strict=False):
            values[value] = tensor.detach()
        for value in program.last_reads.get(node, ()):
            values.pop(value, None)
    tape.kept = {value: values[value] for value in keep}
    return tape


def walk(
    tape: Tape, *, gradient: Mapping[ir.Value, Tensor], relevance: Mapping[ir.Value, Tensor], propagate: Propagate, visit: Visit
) -> tuple[Cotangents, Cotangents]:
    """Walk the tape backwards, emptying it.

    Args:
        tape: of one batch.
        gradient: the cotangents where gradients start; empty for relevance alone.
        relevance: the relevance of the values where it starts; empty for gradients alone.
        propagate: gives the relevance of a step's inputs, from that of its outputs.
        visit: called at every node that something reached, after its inputs are known.

    Returns:
        The gradients and the relevance of the values that nothing produces: the inputs of the model.
    """
    gradients, relevances = dict(gradient), dict(relevance)
    while tape.steps:
        step = tape.steps.pop()
        gradient_out: Parts = [gradients.pop(v, None) for v in step.node.outputs[: len(step.outputs)]]
        relevance_out: Parts = [relevances.pop(v, None) for v in step.node.outputs[: len(step.outputs)]]
        gradient_in = step.pull(gradient_out)
        relevance_in: Parts = [None] * len(step.inputs)
        if any(r is not None for r in relevance_out):
            filled = [torch.zeros_like(y) if r is None else r for r, y in zip(relevance_out, step.outputs, strict=True)]
            relevance_in = propagate(step, filled)
        if any(part is not None for part in (*gradient_out, *relevance_out)):
            visit(Passage(step, gradient_out, gradient_in, relevance_out, relevance_in))
        _add(gradients, step.node.inputs, gradient_in)
        _add(relevances, step.node.inputs, relevance_in)
    return gradients, relevances


def both(first: Visit, second: Visit | None) -> Visit:
    """Return a visitor that is two."""

    def visit(passage: Passage) -> None:
        first(passage)
        if second is not None:
            second(passage)

    return visit


def _add(totals: dict[ir.Value, Tensor], values: Sequence[ir.Value | None], parts: Sequence[Tensor | None]) -> None:
    """Sum what arrives at a value along several branches."""
    for value, part in zip(values, parts, strict=True):
        if value is not None and part is not None:
            totals[value] = totals[value] + part if value in totals else part
