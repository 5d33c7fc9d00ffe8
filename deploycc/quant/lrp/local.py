"""What a walk knows at the place where a region is quantized: its own error there, and the gradient that meets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from deploycc.core.formats import FP8, INT8, NVFP4, Format
from deploycc.core.graph import constant
from deploycc.core.placement import weight_axis
from deploycc.core.quantizers import largest_code
from deploycc.quant.lrp.movement import to_torch
from deploycc.quant.lrp.program import Program
from deploycc.quant.lrp.rules import propagator, ruled_functions
from deploycc.quant.lrp.scoring import batch_of, per_sample, taped
from deploycc.quant.lrp.tape import both, walk
from deploycc.quant.lrp.targets import explained_values, seeds
from deploycc.quant.sensitivity import Scales, fake_quantized_weight, quantized_operands

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.data import Dataset
    from deploycc.core.plan import Region
    from deploycc.quant.lrp.tape import Passage, Step

Seed = Callable[[Tensor, "np.ndarray | None", Tensor], Tensor]


class LocalNoise:
    """The error at the output of each quantized node when its own operands alone are quantized: a visitor of walks.

    Per node (anchors, and residual Adds by rule P4): ``signal`` is the sum of squares of its output over all samples, ``noise`` that
    of the error in each format.
    """

    def __init__(self, model: ir.Model, regions: Sequence[Region], formats: Sequence[Format], scales: Scales) -> None:
        nodes = {n.name: n for n in model.graph}
        self._operands = {name: operands for r in regions for name, operands in quantized_operands(r, nodes)}
        self._formats = {name: [f for f in formats if f.name in r.formats] for r in regions for name in r.nodes}
        self._scales = scales
        self.samples: dict[str, int] = {}
        self.signal: dict[str, float] = {}
        self.noise: dict[str, dict[str, float]] = {}

    def visit(self, passage: Passage) -> None:
        """Measure one node."""
        step, name = passage.step, passage.step.node.name or ""
        if name not in self._operands:
            return
        exact = step.outputs[0].detach()
        self.signal[name] = self.signal.get(name, 0.0) + _energy(exact)
        self.samples[name] = self.samples.get(name, 0) + step.samples
        errors = self.noise.setdefault(name, {})
        for format, error in self.errors_of(step):
            errors[format] = errors.get(format, 0.0) + _energy(error)

    def errors_of(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        """Yield each format that a node may have and the error at its output; nothing for a node that is not quantized."""
        name = step.node.name or ""
        for format in self._formats.get(name, ()) if name in self._operands else ():
            yield format.name, self._quantized(step, format) - step.outputs[0].detach()

    def ratio(self, name: str, format: str) -> float:
        """Return the noise-to-signal ratio at the output of a node."""
        return self.noise[name][format] / self.signal[name] if self.signal.get(name) else 0.0

    def energy(self, name: str, format: str) -> float:
        """Return the sum of squares of the error at the output of a node, the mean over the samples; 0 for what no gradient passes."""
        return self.noise[name][format] / self.samples[name] if name in self.samples else 0.0

    def _quantized(self, step: Step, format: Format) -> Tensor:
        inputs = [None if x is None else x.detach() for x in step.inputs]
        for i in self._operands[step.node.name or ""]:
            value, plain = step.node.inputs[i], inputs[i]
            if value is None or plain is None:
                continue
            weight = constant(value)
            if weight is None:
                inputs[i] = fake_quantized(plain, self._scales.get(value.name or "", {}).get(format.name, 1.0), format)
            else:
                inputs[i] = to_torch(fake_quantized_weight(weight, weight_axis(step.node), format))
        with torch.no_grad():
            result = step.compute(step.node, inputs)
        return result if isinstance(result, Tensor) else result[0]


def fake_quantized(x: Tensor, scale: float, format: Format) -> Tensor:
    """Return ``x`` as an engine sees it in ``format``: with one calibrated scale, with one per block besides, or as it is."""
    if format.activations == "none":
        return x
    if format.activations == "dynamic":
        return _in_blocks(x.reshape(*x.shape[:-1], -1, format.block), scale, format).flatten(-2)
    if format == INT8:
        return torch.clamp(torch.round(x / scale), -128, 127) * scale
    return _eight_bits(x / scale) * scale


def _eight_bits(x: Tensor) -> Tensor:
    top = largest_code(FP8)
    return torch.clamp(x, -top, top).to(torch.float8_e4m3fn).to(x.dtype)


def _in_blocks(blocks: Tensor, whole: float, format: Format) -> Tensor:
    """Return ``blocks``, the last axis of which shares a scale, quantized by the formulas of ``deploycc.core.blocks``."""
    limit, top = blocks.abs().amax(-1, keepdim=True), largest_code(format)
    if format == NVFP4:
        scale = _eight_bits(limit / (top * whole)) * whole
        ratio = torch.where(scale > 0, blocks / scale, 0.0).clamp(-top, top)
        step = torch.where(ratio.abs() < 2, 0.5, torch.where(ratio.abs() < 4, 1.0, 2.0))
        return torch.round(ratio / step) * step * scale
    mantissa, exponent = torch.frexp(limit / top)
    scale = torch.ldexp(torch.ones_like(limit), exponent - (mantissa == 0.5).int())
    return _eight_bits(blocks / scale) * scale


class SquaredGradients:
    """The mean square of the gradient at the output of each quantized node, per sample: a visitor of walks."""

    def __init__(self, names: Sequence[str], samples: int) -> None:
        self._columns = {name: i for i, name in enumerate(names)}
        self.rows = np.zeros((samples, len(names)))

    def visit(self, passage: Passage) -> None:
        """Take in one node."""
        column, gradient = self._columns.get(passage.step.node.name or ""), passage.gradient_out[0]
        if column is not None and gradient is not None:
            rows = per_sample(gradient, passage.step.axis, len(self.rows))
            self.rows[:, column] = rows.square().mean(1).double().numpy()


class SquaredEffects:
    """The squared first-order effect of each region's own error, ``(sum over its nodes of g . e)^2``, per sample: a visitor of walks."""

    def __init__(self, owner: Mapping[str, str], noise: LocalNoise, samples: int) -> None:
        self._owner, self._noise, self._samples = owner, noise, samples
        self._sums: dict[tuple[str, str], Tensor] = {}

    def visit(self, passage: Passage) -> None:
        """Take in one node."""
        step, gradient = passage.step, passage.gradient_out[0]
        region = self._owner.get(step.node.name or "")
        if region is None or gradient is None:
            return
        for format, error in self._noise.errors_of(step):
            effect = per_sample(gradient * error, step.axis, self._samples).sum(1)
            self._sums[region, format] = self._sums.get((region, format), torch.zeros(())) + effect

    @property
    def rows(self) -> dict[tuple[str, str], np.ndarray]:
        """Return the squares by region and format, one per sample."""
        return {key: total.double().square().numpy() for key, total in self._sums.items()}


V = TypeVar("V", SquaredGradients, SquaredEffects)


def gradient_walks(
    model: ir.Model,
    data: Dataset,
    *,
    seed: Seed,
    visitor: Callable[[int], V],
    also: Callable[[Passage], None] = lambda passage: None,
    memory: int,
    progress: Callable[[int, int], None],
) -> list[V]:
    """Walk gradients alone, and return the visitor of every batch.

    Args:
        model: a CANONICAL graph.
        data: samples.
        seed: gives the cotangent of an explained value from its tensor, the labels and the numbers of the samples.
        visitor: makes what sees the walk of a batch, from its number of samples.
        also: sees every node of every walk.
        memory: bytes that the values of one sweep may take.
        progress: called with samples done and in all.
    """
    program, done, found = Program(model, atomic=ruled_functions()), 0, []
    targets = explained_values(program.graph)
    for tape, labels, numbers in taped(program, targets, data, batch=batch_of(program, batch=None, memory=memory)):
        watching = visitor(len(numbers))
        start = seeds(tape.kept, labels, partial(_numbered, seed, numbers))
        walk(tape, gradient=start, relevance={}, propagate=propagator(), visit=both(watching.visit, also))
        found.append(watching)
        done += len(numbers)
        progress(done, data.samples)
    return found


def _numbered(seed: Seed, numbers: Tensor, y: Tensor, labels: np.ndarray | None) -> Tensor:
    return seed(y, labels, numbers)


def _energy(value: Tensor) -> float:
    return float(value.double().square().sum())
