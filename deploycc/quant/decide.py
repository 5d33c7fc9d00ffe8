"""From a CANONICAL graph to a PrecisionPlan: partition, calibrate, score, estimate, allocate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS, FP8, INT8, Format
from deploycc.core.plan import Assignment, PrecisionPlan, Region
from deploycc.core.quantizers import activation_scale
from deploycc.core.rescaling import Rescale
from deploycc.quant.allocate import allocate, bit_operations, pays, uniform
from deploycc.quant.calibrate import Statistics, calibrate
from deploycc.quant.clipping import CANDIDATES, DEFAULT, Clipping, clip_limit
from deploycc.quant.cost import Boundary, boundaries, estimate_all, is_apart, machine_of, total
from deploycc.quant.islands import decision_islands, sampling_islands
from deploycc.quant.methods import AUTO, Question, method_named
from deploycc.quant.overrides import Override, islands_of_overrides, settle
from deploycc.quant.regions import partition
from deploycc.quant.sensitivity import measure_scales

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.backend import Reference
    from deploycc.core.budget import Budget
    from deploycc.core.data import Dataset
    from deploycc.core.target import Target
    from deploycc.quant.sensitivity import Scores

Progress = Callable[[int, int], None]
Stage = Callable[[str], Any]
SCORING_BUDGET = 4e11
CLIPPING_SAMPLES = 8  # to choose how far ranges reach
SCORING_SAMPLES = (4, 32)
# Where the fewest samples would take more multiplications than this, `--sensitivity auto` estimates instead of measuring.
AFFORDABLE = 5 * SCORING_BUDGET
# A sweep costs the same for any number of regions, and the order that it finds needs more samples.
SWEEPING_SAMPLES = (4, 256)


@dataclass
class Analysis:
    """Everything known about a model before deciding, and the bound that the guard tightens."""

    regions: tuple[Region, ...]
    base: Format
    formats: tuple[Format, ...]
    target: Target
    batch: int
    digest: str
    statistics: Statistics | None = None
    scores: Scores | None = None
    scales: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    boundaries: tuple[Boundary, ...] = ()
    islands: dict[str, str] = field(default_factory=dict)
    sensitivity: str = "sqnr"
    rescales: Mapping[str, Rescale] = field(default_factory=dict)
    settled: PrecisionPlan | None = None
    meaning: str = ""
    notes: tuple[str, ...] = ()
    forced: Mapping[str, Override] = field(default_factory=dict)
    clipping: Clipping = DEFAULT

    @property
    def noise(self) -> Mapping[str, Mapping[str, float]]:
        """Return the noise per region and format, empty when nothing was scored."""
        return self.scores.noise if self.scores else {}

    def summary(self, plan: PrecisionPlan) -> dict[str, Any]:
        """Return the plan's figures for the report."""
        computed_in = {a.region.name: plan.base if a.format.is_simulated else a.format for a in plan.assignments}
        latency = total(self.costs, self.boundaries, computed_in)
        base = sum(self.costs[a.region.name][plan.base.name] for a in plan.assignments)
        parameters = sum(a.region.parameters for a in plan.assignments)
        operations = sum(bit_operations(a.region, a.format, plan.base) for a in plan.assignments)
        whole = sum(bit_operations(a.region, plan.base, plan.base) for a in plan.assignments)
        return {
            "base": plan.base.name,
            "regions": plan.count(),
            "average_bits": round(plan.average_bits(), 4),
            "weight_bytes": int(sum(a.region.parameters * a.format.weight_bits for a in plan.assignments) // 8),
            "weight_parameters": parameters,
            "bit_operations_ratio": round(operations / whole, 4) if whole else 1.0,
            "estimated_latency_us": round(latency, 2),
            "estimated_latency_ratio": round(latency / base, 4) if base else 1.0,
            "conversions": [
                {"value": b.value, "producer": b.producer, "format": format, "estimated_us": round(b.microseconds, 2)}
                for b in self.boundaries
                for format in b.conversions(computed_in)
            ],
            "estimated_on": f"{machine_of(self.target).name}, batch {self.batch} (roofline estimate, not a measurement)",
            "batch": self.batch,
            "expected_noise": sum(a.noise.get(a.format.name, 0.0) for a in plan.assignments),
            "fp32_islands": len(plan.islands),
        }

    def is_apart(self, plan: PrecisionPlan) -> bool:
        """Return whether a kernel of its own stands behind a region as ``plan`` computes it."""
        return any(is_apart(a.region, a.format, self.target) for a in plan.assignments)

    def scores_json(self) -> str:
        """Return the scores file: same analysis, same bytes."""
        body = {
            "schema": "deploycc.scores/2",
            "method": self.scores.method if self.scores else "none",
            "meaning": self.meaning or (method_named(self.sensitivity).meaning if self.scores else ""),
            "samples": self.scores.samples if self.scores else 0,
            "stability": _rounded(self.scores.stability) if self.scores else None,
            "agreement": [[count, _rounded(value)] for count, value in (self.scores.agreement if self.scores else ())],
            "regions": {name: {k: _rounded(v) for k, v in sorted(by.items())} for name, by in self.noise.items()},
            "evidence": {
                name: {"mean": _rounded(e.mean), "stderr": _rounded(e.stderr), "samples": e.samples}
                for name, e in (self.scores.evidence.items() if self.scores else ())
            },
        }
        return json.dumps(body, indent=1) + "\n"


def analyse(
    model: ir.Model,
    *,
    digest: str,
    base: Format,
    formats: Sequence[Format],
    choose: bool,
    target: Target,
    data: Dataset,
    reference: Reference,
    batch: int,
    stage: Stage,
    progress: Progress,
    rescales: Mapping[str, Rescale] | None = None,
    sensitivity: str = "sqnr",
    fallback: str | None = None,
    overrides: Sequence[Override] = (),
    clipping: Clipping | None = None,
    known: Statistics | None = None,
    samples_codes: bool = False,
) -> Analysis:
    """Partition and, where formats are to be inserted, calibrate; where they are to be chosen, score.

    Args:
        model: the CANONICAL graph, in FP32.
        digest: of the artefact, for the plan.
        base: the floating-point format.
        formats: quantized formats on offer.
        choose: whether formats are chosen per region, which needs scores.
        target: whose costs are estimated.
        data: calibration data.
        reference: executes graphs.
        batch: samples per run.
        stage: a context manager per named stage.
        progress: called with work done and in all.
        rescales: what was done to the normalizations of ``model`` already, for the plan.
        sensitivity: how regions are scored, by name (``deploycc.quant.methods``), or ``auto``.
        fallback: how relevance passes an operator without a rule: ``gradient``, or None to refuse.
        overrides: what the user decided about regions.
        clipping: how far the range of an activation reaches; None for what errs least at the outputs.
        known: statistics of the same graph on the same data, if there are any; what they lack is observed in a pass over the data.
        samples_codes: whether DCNv3 is computed by a kernel that reads INT8 (``regions.partition``).

    Raises:
        UsageError: for an unknown sensitivity, where the model cannot be scored by it, or for an override that fits no region.
    """
    regions, forced = settle(partition(model, samples_codes=samples_codes, batch=batch), overrides, base=base)
    analysis = Analysis(
        regions, base, tuple(formats), target, batch, digest,
        sensitivity=sensitivity, rescales=rescales or {}, forced=forced,
    )  # fmt: skip
    analysis.costs = estimate_all(analysis.regions, target, batch=batch)
    analysis.boundaries = boundaries(analysis.regions, target, batch=batch)
    analysis.islands = decision_islands(model, analysis.regions) | sampling_islands(model, base)
    analysis.islands |= islands_of_overrides(regions, forced, base=base)
    eligible = [r for r in analysis.regions if any(f.name in r.formats for f in formats)]
    if any(f.reach is not None for f in formats):
        with stage("calibrate"):
            values, needed = values_of(analysis.regions), values_of(eligible if known is not None else analysis.regions)
            known = known or Statistics({}, data.samples, 0.0)
            if missing := [v for v in needed if v not in known.observers]:
                known |= calibrate(model, data, ranges=missing, reference=reference, batch=batch, progress=progress)
            analysis.statistics = known = replace(known, observers={v: o for v, o in known.observers.items() if v in values})
            analysis.clipping, analysis.scales = _scaled(analysis, model, known, eligible, clipping, data.take(CLIPPING_SAMPLES), reference)
    if formats and choose:
        question = Question(
            model, analysis.regions, formats, analysis.scales, data, reference, batch=batch, fallback=fallback, progress=progress
        )
        with stage("score"):
            _score(analysis, question, sensitivity, runs=len(eligible) * len(formats))
    return analysis


def values_of(regions: Sequence[Region]) -> list[str]:
    """Return the values that regions read in codes, of every region, whatever formats are on offer, so that others find ranges known."""
    return list(dict.fromkeys(v for r in regions if r.formats for v in (*r.activations, *r.residuals)))


def _scaled(
    analysis: Analysis,
    model: ir.Model,
    known: Statistics,
    eligible: Sequence[Region],
    clipping: Clipping | None,
    data: Dataset,
    reference: Reference,
) -> tuple[Clipping, dict[str, dict[str, float]]]:
    """Return scales, and how far their ranges reach: as told, or as errs least at the outputs with every region in INT8."""
    softmax = _softmax_outputs(model)
    candidates = (clipping,) if clipping else CANDIDATES if INT8 in analysis.formats else (DEFAULT,)
    found = [(each, scales_of(known, eligible, analysis.formats, analysis.base, softmax=softmax, clipping=each)) for each in candidates]
    usual = [r for r in eligible if pays(r, INT8)]
    if len(found) == 1 or not usual:
        return found[0]
    noise = measure_scales(model, usual, INT8, [scales for _, scales in found], data, reference=reference, batch=analysis.batch)
    return found[int(np.argmin(noise))]


def _score(analysis: Analysis, question: Question, sensitivity: str, *, runs: int) -> None:
    """Score by ``sensitivity``, on as many samples as the work allows; where `auto` does not measure, a note says so."""
    work = SCORING_SAMPLES[0] * runs * sum(r.macs for r in analysis.regions)
    if sensitivity == AUTO and work > AFFORDABLE:
        try:
            analysis.sensitivity, analysis.scores = "hybrid", _scored(analysis, question, "hybrid", runs)
            told = f"to measure every region in every format would take {work / SCORING_BUDGET:.1f} times the arithmetic allowed for it"
            analysis.notes = (f"{told}: regions were scored by --sensitivity hybrid; sqnr measures them nonetheless",)
            return
        except UsageError:  # An operator without a gradient: then measuring is the only way.
            pass
    analysis.sensitivity = "sqnr" if sensitivity == AUTO else sensitivity
    analysis.scores = _scored(analysis, question, analysis.sensitivity, runs)


def _scored(analysis: Analysis, question: Question, name: str, runs: int) -> Scores:
    method = method_named(name)
    limits = SCORING_SAMPLES if method.sweeps is None else SWEEPING_SAMPLES
    few = question.data.take(_scoring_samples(analysis.regions, runs=method.sweeps or runs, limits=limits))
    return method.score(replace(question, data=few))


def _scoring_samples(regions: Sequence[Region], *, runs: int, limits: tuple[int, int]) -> int:
    """Return how many samples ``runs`` passes over the model may take within the budget of arithmetic."""
    low, high = limits
    return int(min(max(SCORING_BUDGET / max(sum(r.macs for r in regions) * max(1, runs), 1), low), high))


def scales_of(
    statistics: Statistics,
    regions: Sequence[Region],
    formats: Sequence[Format],
    base: Format,
    *,
    softmax: frozenset[str],
    clipping: Clipping = DEFAULT,
) -> dict[str, dict[str, float]]:
    """Return the scale of every activation in every format that some region may use; FP8 softmax is fixed (F4)."""
    scales: dict[str, dict[str, float]] = {}
    for region in regions:
        for name in (*region.activations, *region.residuals):
            for format in formats:
                if format.reach is None or format.name not in region.formats or format.name in scales.get(name, {}):
                    continue
                observer = statistics.observers[name]
                limit = 1.0 if name in softmax and format == FP8 else clip_limit(observer, format, clipping)
                scales.setdefault(name, {})[format.name] = activation_scale(limit, format, base)
    return scales


def _rounded(number: float | None) -> float | None:
    """Return six digits of a number, None where there is none."""
    return None if number is None or math.isnan(number) else float(f"{number:.6g}")


def _softmax_outputs(model: ir.Model) -> frozenset[str]:
    return frozenset(n.outputs[0].name or "" for n in model.graph if n.op_type == "Softmax")


def decide(analysis: Analysis, *, precision: str, budget: Budget, noise_bound: float | None) -> PrecisionPlan:
    """Return the plan for ``precision``; for ``mixed``, the optimum under the budget and the noise bound."""
    if analysis.settled is not None:
        return analysis.settled  # Paper mode has nothing to search.
    assignments: tuple[Assignment, ...]
    if precision == "mixed":
        assignments = allocate(
            analysis.regions,
            analysis.formats,
            analysis.base,
            noise=analysis.noise,
            latency=analysis.costs,
            boundaries=analysis.boundaries,
            budget=budget,
            noise_bound=noise_bound,
            forced={name: override.format for name, override in analysis.forced.items()},
        )
    else:
        assignments = uniform(analysis.regions, FORMATS[precision], analysis.base, analysis.noise)
    assignments = tuple(_overridden(a, analysis.forced.get(a.region.name)) for a in assignments)
    used = {(v, a.format.name) for a in assignments for v in (*a.region.activations, *a.region.residuals) if a.format.is_quantized}
    scales = {v: {f: s for f, s in by.items() if (v, f) in used} for v, by in analysis.scales.items()}
    return PrecisionPlan(
        analysis.base, assignments, {v: by for v, by in scales.items() if by}, dict(analysis.islands), analysis.digest, analysis.rescales,
        calibration=str(analysis.clipping) if analysis.formats else "", scored_by=analysis.sensitivity if analysis.scores else "",
    )  # fmt: skip


def _overridden(assignment: Assignment, override: Override | None) -> Assignment:
    return assignment if override is None else replace(assignment, format=override.format, reason=override.reason, rules=())


def first_noise_bound(budget: Budget) -> float | None:
    """Return where to start: the SQNR bound itself, or 15 dB when only accuracy is bounded."""
    if budget.sqnr is not None:
        return float(10 ** (-budget.sqnr / 10))
    return float(10**-1.5) if budget.accuracy_drop is not None else None
