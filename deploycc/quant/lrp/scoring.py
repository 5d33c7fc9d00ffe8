"""Sweeps over the data: the relevance score of every layer for every sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deploycc.quant.lrp.program import Program
from deploycc.quant.lrp.rules import propagator, ruled_functions
from deploycc.quant.lrp.tape import Passage, Tape, Visit, both, record, walk
from deploycc.quant.lrp.targets import chosen, explained_values, seeds

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.data import Dataset
    from deploycc.quant.roles import Layer, Read


def batch_of(program: Program, *, batch: int | None, memory: int) -> int:
    """Return the samples of one sweep: ``batch``, or as many as ``memory`` bytes hold."""
    return batch if batch is not None else max(1, memory // max(program.bytes_per_sample, 1))


def taped(
    program: Program, targets: Sequence[ir.Value], data: Dataset, *, batch: int, skip: int = 0
) -> Iterator[tuple[Tape, np.ndarray | None, Tensor]]:
    """Yield the tape of each batch, its labels, and the numbers of its samples in the data set; the first ``skip`` samples are left out."""
    start = 0
    for feeds in data.batches(batch):
        count = len(next(iter(feeds.values())))
        first, start = max(start, min(skip, start + count)), start + count
        if first == start:
            continue
        rest = {name: array[count - (start - first) :] for name, array in feeds.items()}
        labels = None if data.labels is None else data.labels[first:start]
        yield record(program, rest, keep=targets), labels, torch.arange(first, start)


def sweeps(
    model: ir.Model,
    layers: Sequence[Layer],
    data: Dataset,
    *,
    batch: int | None,
    memory: int,
    fallback: str | None,
    skip: int,
    also: Visit | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each batch the scores ``[samples, layers]``, and the number of elements of each layer's input map.

    A layer's score of a sample is the mean over its map of the positive part of gradient times relevance, both as they
    arrive through this layer alone; a layer with two maps (a product of two computed operands) scores their mean. ``also`` sees
    every node of every walk.

    Raises:
        UsageError: for an operator that cannot be executed or has no rule, naming the node.
    """
    program, propagate = Program(model, atomic=ruled_functions()), propagator(fallback=fallback)
    targets = explained_values(program.graph)
    for tape, labels, numbers in taped(program, targets, data, batch=batch_of(program, batch=batch, memory=memory), skip=skip):
        collected = _Maps(layers, len(numbers))
        weights = seeds(tape.kept, labels, chosen)
        walk(tape, gradient=weights, relevance=weights, propagate=propagate, visit=both(collected.visit, also))
        yield collected.scores, collected.sizes


class _Maps:
    """Sums gradient and relevance of each map over the operands that read it, and scores it when all have been seen."""

    def __init__(self, layers: Sequence[Layer], samples: int) -> None:
        self.scores, self.sizes = np.zeros((samples, len(layers))), np.ones(len(layers))
        self._samples = samples
        self._maps = [(i, reads) for i, layer in enumerate(layers) for reads in layer.maps]
        self._counts = [len(layer.maps) for layer in layers]
        self._where: dict[Read, int] = {read: m for m, (_, reads) in enumerate(self._maps) for read in reads}
        self._anchors = {name for name, _ in self._where}
        self._sums: dict[int, tuple[Tensor, Tensor, int]] = {}

    def visit(self, passage: Passage) -> None:
        """Take in one node of the walk."""
        step = passage.step
        if step.node.name not in self._anchors:
            return
        for position, (gradient, relevance) in enumerate(zip(passage.gradient_in, passage.relevance_in, strict=True)):
            found = self._where.get((step.node.name or "", position))
            if found is None or gradient is None or relevance is None:
                continue
            g, r, seen = self._sums.pop(found, (torch.zeros(()), torch.zeros(()), 0))
            g, r, seen = g + gradient, r + relevance, seen + 1
            if seen < len(self._maps[found][1]):
                self._sums[found] = (g, r, seen)
            else:
                self._score(found, (g * r).clamp(min=0), step.axes[position])

    def _score(self, found: int, product: Tensor, axis: int | None) -> None:
        layer, _ = self._maps[found]
        rows = per_sample(product, axis, self._samples)
        self.scores[:, layer] += rows.mean(1).double().numpy() / self._counts[layer]
        self.sizes[layer] = rows.shape[1]


def per_sample(value: Tensor, axis: int | None, samples: int) -> Tensor:
    """Return ``value`` as ``[samples, elements]``; one that does not tell samples apart counts for each alike."""
    if axis is None or value.ndim <= axis or value.shape[axis] % samples:
        return value.reshape(1, -1).expand(samples, -1)
    return value.movedim(axis, 0).reshape(samples, -1)
