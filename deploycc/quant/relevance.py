"""Relevance of each layer, as LRP-QViT scores it: the positive part of gradient times relevance at the layer's input.

    c_l = mean over the map of (grad * R)^+,   C_l = mean over samples of c_l,   Omega_l = C_l / sum of all C
    type-normalised: n_l^2 C_l / (mean over the layers of the same kind of n^2 C)

``n`` is the number of elements of the map. Relevance is conserved, so it and the gradient thin out as ``1/n`` each: means over maps
of different sizes (the stages of a CNN) compare only after multiplication by ``n^2``, which changes nothing where sizes are equal.
Samples are streamed, and each has a row of its own in the result, so that neither the batch size nor an interruption matters.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.errors import UsageError
from deploycc.quant.ranks import CHECKPOINTS, Order, agreement, agreement_of, standard_error
from deploycc.quant.roles import Layer, layers_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.data import Dataset
    from deploycc.core.plan import Region
    from deploycc.quant.lrp.tape import Visit

Progress = Callable[[int, int], None]
MEMORY = 2**30
STABLE = 0.95


@dataclass(frozen=True, slots=True)
class LayerRelevance:
    """The figures of one layer; ``mean`` and ``stderr`` are those of ``c_l`` over the samples."""

    region: str
    kind: str
    mean: float
    stderr: float
    omega: float
    normalised: float


@dataclass(frozen=True)
class Relevance:
    """Every layer's relevance, and how well two halves of the samples agree on the order of the layers.

    ``agreement`` has pairs of a number of samples and the Spearman correlation between the odd and the even ones among them.
    """

    layers: tuple[LayerRelevance, ...]
    samples: int
    seconds: float
    agreement: tuple[tuple[int, float], ...]
    stopped_early: bool

    @property
    def stability(self) -> float | None:
        """Return the agreement over all samples, None where there is too little to compare."""
        return self.agreement[-1][1] if self.agreement else None

    def of(self, region: str) -> float:
        """Return the type-normalised relevance of a region: the mean over its layers."""
        return float(np.mean([each.normalised for each in self.layers if each.region == region]))


def measure_relevance(
    model: ir.Model,
    regions: Sequence[Region],
    data: Dataset,
    *,
    batch: int | None = None,
    memory: int = MEMORY,
    fallback: str | None = None,
    stable: float | None = STABLE,
    checkpoint: Path | None = None,
    also: Visit | None = None,
    progress: Progress = lambda done, total: None,
) -> Relevance:
    """Return the relevance of every layer of ``regions``.

    Args:
        model: a CANONICAL graph; it is not changed.
        regions: its partition.
        data: samples; the class is the label where there is one, else the prediction.
        batch: samples per sweep; default: as many as ``memory`` holds. The result does not depend on it.
        memory: bytes that the values of one sweep may take.
        fallback: ``gradient`` to pass operators that have no rule by their gradient.
        stable: stop when the order of the layers correlates this well between the odd and the even samples, and did at the
            checkpoint before; None to take every sample.
        checkpoint: a file that keeps what was measured; a run that finds it goes on where it ended.
        also: sees every node of every walk.
        progress: called with samples done and in all.

    Raises:
        UsageError: for an operator that cannot be executed or has no rule, naming the node, or a checkpoint of another run.
    """
    start, layers = time.perf_counter(), layers_of(model, regions)
    from deploycc.quant.lrp.scoring import sweeps

    table = _Table.open(checkpoint, _fingerprint(model, layers, data, fallback), len(layers))
    stop = _stable_count(table, layers, stable)
    if stop is None:
        done = len(table.rows)
        for rows, sizes in sweeps(model, layers, data, batch=batch, memory=memory, fallback=fallback, skip=done, also=also):
            table.add(rows, sizes)
            progress(len(table.rows), data.samples)
            if (stop := _stable_count(table, layers, stable)) is not None:
                progress(data.samples, data.samples)
                break
    rows = table.rows[:stop]
    figures, agreed = _figures(rows, table.sizes, layers), agreement_of(rows, _order(table.sizes, layers))
    return Relevance(figures, len(rows), time.perf_counter() - start, agreed, stop is not None)


@dataclass
class _Table:
    """One row per sample, one column per layer: what has been measured so far, and the file that keeps it."""

    path: Path | None
    fingerprint: str
    rows: np.ndarray
    sizes: np.ndarray = field(default_factory=lambda: np.ones(0))

    @classmethod
    def open(cls, path: Path | None, fingerprint: str, columns: int) -> _Table:
        """Return the table that ``path`` keeps, or an empty one.

        Raises:
            UsageError: when the file belongs to another model, other data or another layout.
        """
        if path is None or not path.exists():
            return cls(path, fingerprint, np.zeros((0, columns)))
        try:
            with np.load(path, allow_pickle=False) as kept:
                known, rows, sizes = str(kept["fingerprint"]), kept["rows"], kept["sizes"]
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"the checkpoint cannot be read: {error}", at=str(path), fix="delete the file to start anew") from error
        if known != fingerprint:
            raise UsageError(
                "the checkpoint belongs to another model or to other data", at=str(path), fix="name another file, or delete this one"
            )
        return cls(path, fingerprint, rows, sizes)

    def add(self, rows: np.ndarray, sizes: np.ndarray) -> None:
        """Append the rows of a batch and keep them."""
        self.rows, self.sizes = np.concatenate([self.rows, rows]), sizes
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".partial.npz")
            np.savez(partial, fingerprint=self.fingerprint, rows=self.rows, sizes=self.sizes)
            partial.replace(self.path)


def _fingerprint(model: ir.Model, layers: Sequence[Layer], data: Dataset, fallback: str | None) -> str:
    """Return what must be equal for two runs to be parts of one: the graph with its weights, the layers, the samples."""
    digest = hashlib.sha256(repr((layers, data.digest, fallback)).encode())
    digest.update(repr([(n.op_type, n.name) for n in model.graph]).encode())
    for name, value in sorted(model.graph.initializers.items()):
        if value.const_value is not None:
            digest.update(name.encode() + np.ascontiguousarray(value.const_value.numpy()).tobytes())
    return digest.hexdigest()


def _figures(rows: np.ndarray, sizes: np.ndarray, layers: Sequence[Layer]) -> tuple[LayerRelevance, ...]:
    means, errors = rows.mean(axis=0), standard_error(rows)
    omega = means / (means.sum() or 1.0)
    normalised = _normalised(means, sizes, layers)
    return tuple(
        LayerRelevance(layer.region, layer.kind, float(means[i]), float(errors[i]), float(omega[i]), float(normalised[i]))
        for i, layer in enumerate(layers)
    )


def _normalised(means: np.ndarray, sizes: np.ndarray, layers: Sequence[Layer]) -> np.ndarray:
    """Return ``n^2 C`` over its mean among the layers of the same kind; 1 where nothing of the kind is relevant."""
    whole = means * sizes**2
    result = np.ones(len(layers))
    for kind in {layer.kind for layer in layers}:
        same = [i for i, layer in enumerate(layers) if layer.kind == kind]
        if (mean := whole[same].mean()) > 0:
            result[same] = whole[same] / mean
    return result


def _order(sizes: np.ndarray, layers: Sequence[Layer]) -> Order:
    """Return what puts layers in order within their kinds; kinds of one layer say nothing."""
    kinds = [layer.kind for layer in layers]
    several = [i for i, kind in enumerate(kinds) if kinds.count(kind) > 1]
    return lambda means: _normalised(means, sizes, layers)[several]


def _stable_count(table: _Table, layers: Sequence[Layer], stable: float | None) -> int | None:
    """Return the number of samples at which the order was stable for the second time in a row, None where it is not yet.

    It is judged at fixed numbers of samples, so that the batch size does not matter.
    """
    before = False
    for count in CHECKPOINTS:
        if stable is None or count > len(table.rows):
            return None
        agreed = agreement(table.rows[:count], _order(table.sizes, layers))
        now = agreed is not None and agreed >= stable
        if now and before:
            return count
        before = now
    return None
