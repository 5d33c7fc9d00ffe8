"""Ways of scoring regions, behind one interface: a question in, ``Scores`` out, found by name.

``sqnr`` and ``kl`` run the model once per region and format. ``lrp``, ``fisher`` and ``hessian`` make one forward and one backward sweep
per batch whatever the number of regions, and know only proportions. So their scores are scaled, format by format, to add up to the
measured noise of the model with every region quantized: all methods speak in shares of output noise, and ``allocate`` takes any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.errors import UsageError
from deploycc.quant.ranks import agreement_of, standard_error
from deploycc.quant.relevance import MEMORY, Relevance, measure_relevance
from deploycc.quant.roles import layers_of
from deploycc.quant.sensitivity import DIVERGENCE, Evidence, Scales, Scores, measure_noise, measure_whole, quantized_operands

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.backend import Reference
    from deploycc.core.data import Dataset
    from deploycc.core.formats import Format
    from deploycc.core.plan import Region
    from deploycc.quant.lrp.local import LocalNoise, Seed

Raw = Mapping[str, Mapping[str, float]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be scored: ``regions`` of ``model`` in ``formats``, with calibrated ``scales``, on ``data``."""

    model: ir.Model
    regions: Sequence[Region]
    formats: Sequence[Format]
    scales: Scales
    data: Dataset
    reference: Reference
    batch: int = 8
    memory: int = MEMORY
    fallback: str | None = None
    progress: Progress = lambda done, total: None


@dataclass(frozen=True, slots=True)
class Method:
    """A way of scoring, what its figures mean, and its cost in runs of the model per sample: None for one per region and format."""

    score: Callable[[Question], Scores]
    meaning: str
    sweeps: int | None


# Not a method: `sqnr` where it is affordable, else `hybrid`.
AUTO = "auto"
_METHODS: dict[str, Method] = {}
Scoring = Callable[[Question], Scores]


def method(name: str, meaning: str, *, sweeps: int | None = None) -> Callable[[Scoring], Scoring]:
    """Register a way of scoring; ``sweeps`` is its cost in runs of the model where that does not grow with the regions."""

    def register(score: Scoring) -> Scoring:
        _METHODS[name] = Method(score, meaning, sweeps)
        return score

    return register


def method_named(name: str) -> Method:
    """Return the way of scoring called ``name``.

    Raises:
        UsageError: when there is none.
    """
    if name not in _METHODS:
        raise UsageError(f"unknown sensitivity '{name}'", at="--sensitivity", fix=f"use one of {', '.join((AUTO, *_METHODS))}")
    return _METHODS[name]


def check_fallback(fallback: str | None) -> None:
    """Refuse a way for relevance to pass operators without a rule that does not exist.

    Raises:
        UsageError: for anything but ``gradient`` and None.
    """
    if fallback not in {None, "gradient"}:
        raise UsageError(f"unknown fallback '{fallback}'", at="--relevance-fallback", fix="use gradient, or leave it out")


def method_names() -> tuple[str, ...]:
    """Return the names of all ways of scoring."""
    return tuple(_METHODS)


@method("sqnr", "noise-to-signal ratio at the outputs when this region alone is quantized, measured")
def _sqnr(question: Question) -> Scores:
    return _measured(question)


@method("kl", "divergence of the class probabilities when this region alone is quantized, measured; as a share of the whole noise")
def _kl(question: Question) -> Scores:
    scores = _measured(question, divergence=True)
    return replace(scores, method="kl", noise=_anchored(question, scores.noise))


@method("lrp", "relevance of this region times its own noise-to-signal ratio; as a share of the whole noise", sweeps=12)
def _lrp(question: Question) -> Scores:
    """``sum over nodes of Omega~ |e|^2 / |y|^2``, with the relevance of the node's layer and the error at the node's output."""
    from deploycc.quant.lrp.local import LocalNoise

    start = time.perf_counter()
    noise = LocalNoise(question.model, question.regions, question.formats, question.scales)
    found = measure_relevance(
        question.model,
        question.regions,
        question.data,
        memory=question.memory,
        fallback=question.fallback,
        also=noise.visit,
        progress=question.progress,
    )
    raw = _weighted_ratios(question, found, noise)
    evidence = {r.name: _relevance_evidence(found, r.name) for r in question.regions}
    return Scores("lrp", found.samples, time.perf_counter() - start, _anchored(question, raw), evidence, found.agreement)


@method("fisher", "mean squared gradient of the loss times the energy of this region's own error; as a share of the whole noise", sweeps=6)
def _fisher(question: Question) -> Scores:
    """``sum over nodes of E[mean g^2] E|e|^2``, with the gradient ``g`` of the negative log-likelihood at the node's output."""
    from deploycc.quant.lrp.targets import loss_gradient

    return _by_energy(question, "fisher", loss_gradient)


@method("hessian", "trace of the Gauss-Newton Hessian times the energy of this region's own error; as a share of the whole noise", sweeps=6)
def _hessian(question: Question) -> Scores:
    """``sum over nodes of tr(H)/n E|e|^2``, the trace by Hutchinson's estimate with one probe per sample."""
    from deploycc.quant.lrp.targets import curvature_probe

    return _by_energy(question, "hessian", lambda y, labels, samples: curvature_probe(y, samples))


@method("hybrid", "squared effect of this region's own error on the loss, from its gradient; as a share of the whole noise", sweeps=6)
def _hybrid(question: Question) -> Scores:
    """``E (sum over nodes of g . e)^2``: the error as measured, the loss by its Gauss-Newton Hessian.

    With probes ``g = J^T u``, ``E u u^T = H``, this is ``E e^T J^T H J e``, twice the divergence to second order. ``hessian`` replaces the
    error by noise of equal energy in every direction; here its direction counts, and errors of a region's nodes may cancel.
    """
    from deploycc.quant.lrp.local import LocalNoise, SquaredEffects, gradient_walks
    from deploycc.quant.lrp.targets import curvature_probe

    start, nodes = time.perf_counter(), {n.name: n for n in question.model.graph}
    noise = LocalNoise(question.model, question.regions, question.formats, question.scales)
    owner = {name: r.name for r in question.regions for name, _ in quantized_operands(r, nodes)}
    found = gradient_walks(
        question.model,
        question.data,
        seed=lambda y, labels, samples: curvature_probe(y, samples),
        visitor=partial(SquaredEffects, owner, noise),
        memory=question.memory,
        progress=question.progress,
    )
    batches = [each.rows for each in found]
    rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    raw = {r.name: {f.name: _mean(rows.get((r.name, f.name))) for f in question.formats if f.name in r.formats} for r in question.regions}
    coarse = {r.name: rows[r.name, f] for r in question.regions for f in list(raw[r.name])[:1] if (r.name, f) in rows}
    evidence = {name: Evidence(float(v.mean()), float(standard_error(v[:, None])[0]), len(v)) for name, v in coarse.items()}
    samples, seconds = len(next(iter(rows.values()), ())), time.perf_counter() - start
    agreed = agreement_of(np.stack(list(coarse.values()), axis=1)) if coarse else ()
    return Scores("hybrid", samples, seconds, _anchored(question, raw), evidence, agreed)


def _mean(values: np.ndarray | None) -> float:
    return 0.0 if values is None else float(values.mean())


def _measured(question: Question, *, divergence: bool = False) -> Scores:
    return measure_noise(
        question.model,
        question.regions,
        question.formats,
        question.scales,
        question.data,
        reference=question.reference,
        batch=question.batch,
        metric=DIVERGENCE if divergence else None,
        progress=question.progress,
    )


def _anchored(question: Question, raw: Raw) -> dict[str, dict[str, float]]:
    """Return ``raw`` scaled per format to add up to the measured noise with every region quantized."""
    whole = measure_whole(
        question.model,
        question.regions,
        question.formats,
        question.scales,
        question.data,
        reference=question.reference,
        batch=question.batch,
    )
    sums = {f: sum(by.get(f, 0.0) for by in raw.values()) for f in whole}
    return {r: {f: v * (whole[f] / sums[f] if sums[f] > 0 else 1.0) for f, v in by.items()} for r, by in raw.items()}


def _weighted_ratios(question: Question, found: Relevance, noise: LocalNoise) -> dict[str, dict[str, float]]:
    """Return per region and format the noise-to-signal ratios of its nodes, weighted by the relevance of their layers."""
    nodes = {n.name: n for n in question.model.graph}
    places = {r.name: [name for name, _ in quantized_operands(r, nodes)] for r in question.regions}
    raw = {r.name: {f.name: 0.0 for f in question.formats if f.name in r.formats} for r in question.regions}
    read: set[str] = set()
    for layer, figures in zip(layers_of(question.model, question.regions), found.layers, strict=True):
        anchors = {name for reads in layer.maps for name, _ in reads}
        read |= anchors
        for f in raw[layer.region]:
            raw[layer.region][f] += figures.normalised * float(np.mean([noise.ratio(name, f) for name in sorted(anchors)]))
    for region, names in places.items():
        for f in raw[region]:
            raw[region][f] += found.of(region) * sum(noise.ratio(name, f) for name in names if name not in read)
    return raw


def _relevance_evidence(found: Relevance, region: str) -> Evidence:
    own = [each for each in found.layers if each.region == region]
    return Evidence(float(np.mean([e.mean for e in own])), float(np.sqrt(np.sum([e.stderr**2 for e in own])) / len(own)), found.samples)


def _by_energy(question: Question, name: str, seed: Seed) -> Scores:
    """Return ``E[mean g^2] E|e|^2`` summed over the nodes of each region, for the gradient that ``seed`` starts."""
    from deploycc.quant.lrp.local import LocalNoise, SquaredGradients, gradient_walks

    start, nodes = time.perf_counter(), {n.name: n for n in question.model.graph}
    noise = LocalNoise(question.model, question.regions, question.formats, question.scales)
    own = {r.name: [n for n, _ in quantized_operands(r, nodes)] for r in question.regions}
    names = list(dict.fromkeys(n for group in own.values() for n in group))
    found = gradient_walks(
        question.model,
        question.data,
        seed=seed,
        visitor=partial(SquaredGradients, names),
        also=noise.visit,
        memory=question.memory,
        progress=question.progress,
    )
    rows = np.concatenate([each.rows for each in found])
    means = dict(zip(names, rows.mean(axis=0), strict=True))
    raw = {
        r.name: {
            f.name: float(sum(means[n] * noise.energy(n, f.name) for n in own[r.name])) for f in question.formats if f.name in r.formats
        }
        for r in question.regions
    }
    columns = [[names.index(n) for n in own[r.name]] for r in question.regions]
    per_region = np.stack([rows[:, c].sum(axis=1) for c in columns], axis=1)
    errors = standard_error(per_region)
    evidence = {r.name: Evidence(float(per_region[:, i].mean()), float(errors[i]), len(rows)) for i, r in enumerate(question.regions)}
    seconds = time.perf_counter() - start
    return Scores(name, len(rows), seconds, _anchored(question, raw), evidence, agreement_of(per_region))
