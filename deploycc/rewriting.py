"""Run the registered passes of a build: with which options, watched by which instruments, and what is said when one is rolled back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deploycc import registry
from deploycc.core.artefact import Artefact, Stage
from deploycc.core.contract import CANONICAL, LOWERED, QUANTIZED
from deploycc.core.passes import run
from deploycc.core.shapes import probe_shapes
from deploycc.instruments import Dump, VerifyEach, executable, random_feeds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from deploycc.core.passes import Instrument, Pass, PassRecord
    from deploycc.core.plan import PrecisionPlan
    from deploycc.core.rescaling import Rescale
    from deploycc.instruments import Feeds
    from deploycc.request import Job

VERIFY_EACH_SAMPLES = 8


def canonicalize(job: Job, *, prepare: bool | None = None) -> Artefact:
    """Run the exact passes: those of the phase ``canonicalize``, and of ``prepare`` where something may be quantized (or as said)."""
    phases = ("canonicalize", "prepare") if prepare or (prepare is None and job.formats) else ("canonicalize",)
    chosen = [each for phase in phases for each in chosen_passes(job, phase)]
    model, records = run(job.imported.model, chosen, contract=CANONICAL, instruments=[*_verifiers(job), *_dumps(job)])
    _warn(job, records)
    job.report.passes = [*job.report.passes, *(asdict(r) for r in records)]
    return Artefact(model, Stage.CANONICAL, job.imported)


def canonicalize_for(job: Job, plan: PrecisionPlan) -> Artefact:
    """Canonicalize as when ``plan`` was made: it does not say whether something could be quantized then, but its digest does."""
    before = job.report.passes
    first = canonicalize(job)
    if plan.model in ("", first.digest):
        return first
    passes, job.report.passes = job.report.passes, before
    other = canonicalize(job, prepare=not job.formats)
    if other.digest == plan.model:
        return other
    job.report.passes = passes
    return first


def reparameterize(job: Job, canonical: Artefact, rescales: Mapping[str, Rescale]) -> tuple[Artefact, dict[str, Rescale]]:
    """Run the exact passes that only move parameters, so that what is quantized later loses less; return which rescales they did."""
    chosen = chosen_passes(job, "reparameterize", rescales=rescales)
    model, records = run(canonical.model, chosen, contract=CANONICAL, instruments=[*_verifiers(job), *_dumps(job)])
    _warn(job, records)
    job.report.passes += [asdict(r) for r in records]
    done = {rewrite.anchor for record in records for rewrite in record.rewrites}
    return Artefact(model, Stage.CANONICAL, canonical), {name: rescale for name, rescale in rescales.items() if name in done}


def lower(job: Job, canonical: Artefact, plan: PrecisionPlan, weights: Mapping[str, np.ndarray]) -> tuple[Artefact, list[dict[str, Any]]]:
    """Insert the precision that ``plan`` asks for, and lower for the target; return the graph and what the report says of the passes."""
    watchers = _dumps(job)
    chosen = chosen_passes(job, "quantize", plan=plan, weights=weights)
    quantized, records = run(canonical.model, chosen, contract=QUANTIZED, instruments=watchers)
    lowered, more = run(quantized, chosen_passes(job, "lower"), contract=LOWERED, instruments=watchers)
    _warn(job, [*records, *more])
    middle = Artefact(quantized, Stage.QUANTIZED, canonical)
    return Artefact(lowered, Stage.LOWERED, middle), [asdict(r) for r in (*records, *more)]


def chosen_passes(job: Job, phase: str, **options: Any) -> list[Pass]:
    """Return the passes of a phase; a pass gets ``options``, ``merge``, ``arch`` and ``batch`` where it has a field of that name."""
    target = job.targets[0]
    offered = {"merge": job.request.merge, "batch": job.batch, **({"arch": target.archs[0]} if target.archs else {}), **options}
    chosen: list[Pass] = []
    for _, cls in registry.passes(phase):
        fields = {f.name for f in registry.options(cls)}
        chosen.append(cls(**{name: value for name, value in offered.items() if name in fields}))
    return chosen


def _verifiers(job: Job) -> list[Instrument]:
    return [VerifyEach(job.reference, verification_feeds(job))] if job.request.verify_each else []


def _dumps(job: Job) -> list[Instrument]:
    if job.request.dump is None:
        return []
    job.dump = job.dump or Dump(job.request.dump)
    return [job.dump]


def verification_feeds(job: Job) -> list[Feeds]:
    """Return calibration samples, and random inputs at the smallest, the largest and odd sizes.

    Odd sizes that the original itself cannot compute (a patch embedding that does not divide them) are left out.
    """
    inputs = job.imported.model.graph.inputs
    samples: list[Feeds] = list(job.calibration.take(VERIFY_EACH_SAMPLES).batches(job.batch))
    corners, odd = probe_shapes(inputs, job.profiles)
    possible = executable(job.reference.executor(job.imported.model), random_feeds(inputs, odd, seed=job.request.seed + 1))
    return [*samples, *random_feeds(inputs, corners, seed=job.request.seed), *possible]


def _warn(job: Job, records: Sequence[PassRecord]) -> None:
    for record in records:
        if record.rolled_back:
            job.warn(f"the pass {record.spec} was rolled back: {record.rolled_back}")
