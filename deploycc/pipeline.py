"""One way from a model to its engines: load, canonicalize, analyse, plan, quantize, lower, verify, build, report.

Every stage is a function from data to data; only ``_guarded`` loops, and at most ``GUARD_ROUNDS`` times.
"""

from __future__ import annotations

import resource
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploycc import reproducer
from deploycc.building import build_engines
from deploycc.core.errors import BackendError, BudgetError, ContractError
from deploycc.core.formats import FORMATS, FP16, INT8, SIMULATIONS
from deploycc.core.identity import identities
from deploycc.core.passes import PassCrashed
from deploycc.core.rescaling import Rescale
from deploycc.interop import save_model
from deploycc.output import BuildDirectory, digest_file, versions, write_manifest
from deploycc.quant.calibrate import calibrate
from deploycc.quant.clipping import AUTO
from deploycc.quant.cost import boundaries, estimate_all
from deploycc.quant.decide import Analysis, analyse, decide, first_noise_bound, values_of
from deploycc.quant.islands import islands_of
from deploycc.quant.overrides import settle
from deploycc.quant.paper import analyse_simulation
from deploycc.quant.paper_reparameterize import DEFAULT, parse_reparameterization
from deploycc.quant.ranges import RANGES, load_ranges, save_ranges
from deploycc.quant.reapply import check_fit
from deploycc.quant.regions import partition
from deploycc.quant.rescale import channels_of, find_rescales, find_sites, rescaled
from deploycc.quant.rounding import round_weights
from deploycc.render import write_reports
from deploycc.request import SYNTHETIC_SAMPLES, BuildRequest, Job, Silent, Watcher, resolve
from deploycc.rewriting import canonicalize, canonicalize_for, lower, reparameterize
from deploycc.verify import accuracy, audit, numerics

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from deploycc.core.artefact import Artefact
    from deploycc.core.backend import Engine
    from deploycc.core.plan import PrecisionPlan
    from deploycc.core.report import BuildReport

GUARD_ROUNDS = 4
VERIFY_SAMPLES = 128
SUSPICIOUS_DB = 15.0
SLOWER = 1.02  # times the estimated latency of the base format: from here on a warning says so


def build(request: BuildRequest, watch: Watcher | None = None) -> tuple[BuildReport, Path]:
    """Build the engines of ``request`` and return the report and the build directory.

    Raises:
        DeployccError: see ``deploycc.core.errors``. Nothing is written, except that a missed budget or a failed target
            keeps the directory with everything that could be built, and a pass that crashes leaves a reproducer beside it.
    """
    directory = BuildDirectory(request.directory)
    directory.check()
    job = resolve(request, watch or Silent())
    try:
        misses = _staged(job, directory)
    except PassCrashed as error:
        reproducer.keep(error, directory.path)
        raise
    _raise_failures(job, directory, misses)
    return job.report, directory.path


def _staged(job: Job, directory: BuildDirectory) -> list[str]:
    """Do the work and write the directory; return the bounds that were missed."""
    with job.stage("canonicalize"):
        canonical = canonicalize(job) if job.plan is None else canonicalize_for(job, job.plan)
    canonical, analysis = _analyse(job, canonical)
    with directory.staged() as folder:
        plan, lowered, misses = _guarded(job, canonical, analysis)
        save_model(lowered.model, folder / "model.onnx")
        engines = build_engines(job, folder)
        _conclude(job, folder, plan, lowered, analysis, engines)
    return misses


def _analyse(job: Job, canonical: Artefact) -> tuple[Artefact, Analysis]:
    """Calibrate, rescale where INT8 gains by it, and analyse the result; the digest in the plan is that of the graph before."""
    if job.plan is not None:
        return _reapply(job, canonical, job.plan)
    if job.request.precision in SIMULATIONS:
        return _simulate(job, canonical)
    digest, rescales = canonical.digest, dict[str, Rescale]()
    known = load_ranges(job.request.directory / RANGES, key=_ranges_key(job, digest)) if job.formats else None
    if known is not None:
        canonical, rescales = reparameterize(job, canonical, known[1])
        known = known if rescales == known[1] else None  # With `--verify-each` a pass may be rolled back that was not before.
    elif _rescales(job) and (sites := find_sites(canonical.model)):
        regions = partition(canonical.model, samples_codes=job.samples_codes, batch=job.batch)
        ranges = values_of(settle(regions, job.overrides, base=job.base)[0])
        with job.stage("calibrate"):
            seen = calibrate(
                canonical.model,
                job.calibration,
                ranges=ranges,
                channels=channels_of(sites, ranges),
                reference=job.reference,
                batch=job.batch,
                progress=job.watch.progress,
            )
        with job.stage("rescale"):
            canonical, rescales = reparameterize(job, canonical, find_rescales(sites, seen, base=job.base))
            known = rescaled(seen, sites, rescales), rescales
    analysis = analyse(
        canonical.model,
        digest=digest,
        base=job.base,
        formats=job.formats,
        choose=job.request.precision == "mixed",
        target=job.targets[0],
        data=job.calibration,
        reference=job.reference,
        batch=job.batch,
        stage=job.stage,
        progress=job.watch.progress,
        rescales=rescales,
        sensitivity=job.request.sensitivity,
        fallback=job.request.relevance_fallback,
        overrides=job.overrides,
        clipping=job.clipping,
        known=known[0] if known else None,
        samples_codes=job.samples_codes,
    )
    _report_analysis(job, analysis)
    return canonical, analysis


def _rescales(job: Job) -> bool:
    """Return whether normalizations are rescaled where that pays, which only INT8 gains by."""
    return INT8 in job.formats and job.request.rescale == "auto"


def _ranges_key(job: Job, digest: str) -> str:
    """Name everything that decides raw ranges: the graph, the data, and how they were observed."""
    tools = {name: found for name, found in versions().items() if name in ("deploycc", "numpy", "onnxruntime")}
    return f"{digest} {job.calibration.digest} batch={job.batch} base={job.base} rescale={_rescales(job)} {tools}"


def _reapply(job: Job, canonical: Artefact, plan: PrecisionPlan) -> tuple[Artefact, Analysis]:
    """Take the decisions of a plan from a file: nothing is calibrated, scored or chosen again."""
    # What regions cost is counted in the graph, since a plan may be edited or older.
    at = f"--plan {job.request.plan}"
    regions = check_fit(plan, canonical.model, digest=canonical.digest, at=at, samples_codes=job.samples_codes, batch=job.batch)
    analysis = Analysis(regions, plan.base, job.formats, job.targets[0], job.batch, canonical.digest, settled=plan)
    analysis.costs = estimate_all(regions, job.targets[0], batch=job.batch)
    analysis.boundaries = boundaries(regions, job.targets[0], batch=job.batch)
    _report_analysis(job, analysis)
    return reparameterize(job, canonical, plan.rescales)[0], analysis


def _simulate(job: Job, canonical: Artefact) -> tuple[Artefact, Analysis]:
    """Settle the bits and the quantizers of paper mode, and reparameterize as it asks."""
    analysis = analyse_simulation(
        canonical.model,
        digest=canonical.digest,
        precision=job.request.precision,
        reparameterization=parse_reparameterization(job.request.reparam or DEFAULT),
        target=job.targets[0],
        data=job.calibration,
        batch=job.batch,
        stage=job.stage,
        progress=job.watch.progress,
    )
    _report_analysis(job, analysis)
    job.warn(f"--precision {job.request.precision} simulates quantizers that no engine has: the result shows accuracy, not speed or size")
    return reparameterize(job, canonical, analysis.rescales)[0], analysis


def _report_analysis(job: Job, analysis: Analysis) -> None:
    seen = analysis.statistics
    job.report.calibration = {
        "source": job.calibration.source,
        "synthetic": job.calibration.synthetic,
        "samples": seen.samples if seen else 0,
        "seconds": seen.seconds if seen else 0.0,
        "method": str(analysis.clipping) if seen and not analysis.settled else "",
        "cached": bool(seen and seen.cached),
        "values": len(analysis.settled.quantizers if analysis.settled else seen.observers) if seen else 0,
    }
    for note in analysis.notes:
        job.warn(note)
    if analysis.scores:
        job.report.scores = {"method": analysis.scores.method, "samples": analysis.scores.samples, "seconds": analysis.scores.seconds}


def _guarded(job: Job, canonical: Artefact, analysis: Analysis) -> tuple[PrecisionPlan, Artefact, list[str]]:
    """Decide, quantize, lower and verify until the budget holds or the rounds are over; return what the last round missed."""
    bound = first_noise_bound(job.budget)
    front = list(job.report.passes)
    known: dict[tuple[str, str], np.ndarray] = {}
    for attempt in range(1, GUARD_ROUNDS + 1):
        with job.stage("quantize"):
            try:
                plan = decide(analysis, precision=job.request.precision, budget=job.budget, noise_bound=bound)
            except BudgetError:
                if attempt == 1:
                    raise
                break  # Nothing tighter fits the other bounds: the last round is the best there is.
            plan, weights = _round(job, canonical, plan, known)
            lowered, records = lower(job, canonical, plan, weights)
            job.report.passes = front + records
        with job.stage("verify"):
            misses, worst = _verify(job, lowered)
        job.report.guard.append(
            {"round": attempt, "regions": plan.count(), "average_bits": plan.average_bits(), "sqnr_db": worst, "missed": misses}
        )
        if analysis.settled is not None or (not _suspicious(job, plan, worst) and not misses):
            break
        spent = sum(a.noise.get(a.format.name, 0.0) for a in plan.assignments)
        found = _find_islands(job, canonical, analysis) if _suspicious(job, plan, worst) else False
        if not found and (not misses or job.request.precision != "mixed" or spent <= 0.0):
            break
        bound = bound if found else min(spent, bound or spent) / 4.0
    if any(not c["finite"] for c in job.report.verification):
        raise ContractError(
            "the built model gives NaN or infinite outputs on data where the original does not",
            at="verification of model.onnx against the FP32 original",
            fix="use --precision bf16 or fp32, and report the model",
        )
    return plan, lowered, misses


def _round(
    job: Job, canonical: Artefact, plan: PrecisionPlan, known: dict[tuple[str, str], np.ndarray]
) -> tuple[PrecisionPlan, dict[str, np.ndarray]]:
    """Round weights for the outputs of their layers on real data; return the plan that says so, and the weights.

    Synthetic samples say nothing about which inputs occur together, so without real data every weight goes to its nearest code.
    """
    data, is_asked = job.calibration, job.request.rounding == "auto" and (job.plan is None or bool(job.plan.rounded_on))
    if data.synthetic or not is_asked or not any(a.format.is_quantized for a in plan.assignments):
        if job.plan is not None and job.plan.rounded_on:
            job.warn("the plan's weights were rounded for calibration data that is not given, so they go to their nearest codes")
        return replace(plan, rounded_on=""), {}
    if job.plan is not None and job.plan.rounded_on != data.digest:
        job.warn("the plan's weights were rounded for other calibration data: the weights will differ from those of the build it is from")
    found = round_weights(canonical.model, plan, data, reference=job.reference, batch=job.batch, known=known, progress=job.watch.progress)
    return replace(plan, rounded_on=data.digest), found


def _suspicious(job: Job, plan: PrecisionPlan, worst: float) -> bool:
    """Return whether an FP16 overflow could explain the result."""
    finite = all(c["finite"] for c in job.report.verification)
    return plan.base == FP16 and (not finite or worst < SUSPICIOUS_DB) and len(job.report.guard) < GUARD_ROUNDS


def _find_islands(job: Job, canonical: Artefact, analysis: Analysis) -> bool:
    """Look for values that FP16 cannot hold; return whether new ones were found."""
    data = job.calibration.take(SYNTHETIC_SAMPLES)
    found = islands_of(canonical.model, data, reference=job.reference, batch=job.batch)
    new = {name: reason for name, reason in found.items() if name not in analysis.islands}
    analysis.islands.update(new)
    return bool(new)


def _verify(job: Job, lowered: Artefact) -> tuple[list[str], float]:
    """Measure the lowered graph against the original; return the missed bounds and the worst SQNR."""
    built = job.reference.executor(lowered.model, simulate=True)
    data = (job.evaluation or job.calibration).take(VERIFY_SAMPLES)
    compared = numerics.compare(job.original, built, data, batch=job.largest_batch, progress=job.watch.progress)
    job.report.verification = [{**asdict(c), "executed": "model.onnx on the CPU", "data": data.source} for c in compared]
    worst = min((c.sqnr_db for c in compared), default=0.0)
    misses = []
    if job.budget.sqnr is not None and worst < job.budget.sqnr:
        misses.append(f"SQNR is {worst:.1f} dB, the budget asks for {job.budget.sqnr:g} dB")
    if job.evaluation is not None:
        # A later round of the guard changes the built model only.
        known = {"fp32": job.report.accuracy["fp32"]} if job.report.accuracy else {}
        executors = {"built": built} if known else {"fp32": job.original, "built": built}
        metric, points = accuracy.score(executors, job.evaluation, batch=job.largest_batch, progress=job.watch.progress)
        points = {**known, **points}
        result = accuracy.Accuracy(metric, points["fp32"], points["built"], job.evaluation.samples)
        job.report.accuracy = {**asdict(result), "drop": result.drop}
        if job.budget.accuracy_drop is not None and result.drop > job.budget.accuracy_drop:
            misses.append(f"{metric} fell by {result.drop:.2f} points, the budget allows {job.budget.accuracy_drop:g}")
    return misses, worst


def _conclude(job: Job, folder: Path, plan: PrecisionPlan, lowered: Artefact, analysis: Analysis, engines: Sequence[Engine]) -> None:
    """Fill the report and write every file of the build directory."""
    report, request = job.report, job.request
    wanted = FORMATS.get(request.precision, plan.base)
    if (wanted.is_quantized or request.precision == "mixed") and not any(a.format.is_quantized for a in plan.assignments):
        where = "`deploycc explain` says why" if request.precision == "mixed" else "report.md names the rules"
        narrow = (
            "; tuned for more rows, products are quantized too: --shape NAME=1:32:64"
            if any(a.rules == ("S1",) for a in plan.assignments)
            else ""
        )
        job.warn(f"--precision {request.precision} quantized nothing: every region computes in {plan.base}; {where}{narrow}")
    findings = {str(e.target): audit.audit(plan, e) for e in engines}
    for engine in engines:
        for text in (*audit.warnings_of(findings[str(engine.target)], engine), *engine.warnings):
            job.warn(text)
    report.model = _model_row(job)
    report.request = {
        "precision": request.mode,
        "regions": [[o.pattern, o.format.name] for o in job.overrides],
        "targets": [str(t) for t in job.targets],
        "budget": str(job.budget),
        "seed": request.seed,
        "strict": request.strict,
        "calibration": str(job.clipping or AUTO) if analysis.formats and analysis.settled is None else None,
        "merge": request.merge,
        "rescale": request.rescale,
        "rounding": request.rounding,
        "reparam": request.reparam,
        "sensitivity": request.sensitivity,
        "relevance_fallback": request.relevance_fallback,
        "verify_each": request.verify_each,
        "dcn": request.dcn,
        "compatibility": request.compatibility,
    }
    report.plan = analysis.summary(plan)
    if report.plan["estimated_latency_ratio"] > SLOWER and any(a.format.is_quantized for a in plan.assignments):
        job.warn(
            f"the estimate for {job.targets[0]} is {report.plan['estimated_latency_ratio']:.2f} times the latency of {plan.base}: "
            + ("behind every convolution and product of codes TensorRT-RTX runs a kernel of its own; " if analysis.is_apart(plan) else "")
            + f"if size does not matter, use --precision {plan.base}"
        )
    report.engines = [_engine_row(e, folder) for e in engines]
    report.regions = audit.region_rows(plan, findings, identities(plan, lowered.model))
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    report.peak_rss_mb = round(max(usage) / 1024, 1)
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "scores.json").write_text(analysis.scores_json())
    if analysis.statistics is not None and analysis.settled is None:
        save_ranges(folder / RANGES, analysis.statistics, analysis.rescales, key=_ranges_key(job, analysis.digest))
    limits = {"profiles": report.model["profiles"], "timeout": request.timeout, "workspace": request.workspace}
    paths = {"model": str(request.model), "data": request.data, "eval": request.eval}
    if request.plan is not None:
        paths["plan"] = str(request.plan)
    write_manifest(folder, inputs=digests_of(job), options={**report.request, **limits}, paths=paths)
    write_reports(folder, report)


def digests_of(job: Job) -> dict[str, Any]:
    """Return a hash of every input: the model, the files in which it keeps its weights, and the samples."""
    tensors = (v.const_value for v in job.imported.model.graph.initializers.values())
    files = {str(t.location): Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)}
    return {
        "model": digest_file(job.request.model),
        "weights": {name: digest_file(path) for name, path in sorted(files.items())},
        "calibration": job.calibration.digest,
        "evaluation": job.evaluation.digest if job.evaluation else None,
        **({"plan": digest_file(job.request.plan)} if job.request.plan else {}),
        **({"dcn": digest_file(library)} if (library := job.request.plugin_library) else {}),
    }


def _model_row(job: Job) -> dict[str, Any]:
    graph = job.imported.model.graph
    return {
        "path": job.request.model.name,
        "sha256": digest_file(job.request.model),
        "nodes": len(graph),
        "parameters": sum(v.const_value.size for v in graph.initializers.values() if v.const_value is not None),
        "profiles": [str(p) for p in job.profiles],
        "outputs": [v.name for v in graph.outputs],
    }


def _engine_row(engine: Engine, folder: Path) -> dict[str, Any]:
    return {
        "target": str(engine.target),
        "version": engine.version,
        "path": str(engine.path.relative_to(folder)),
        "bytes": engine.bytes,
        "sha256": digest_file(engine.path),
        "build_seconds": round(engine.build_seconds, 3),
        "peak_rss_mb": round(engine.peak_rss_mb, 1),
        "fused_attention": engine.realised.fused_attention,
        "counts": dict(engine.realised.counts),
        "listing": engine.realised.source or engine.realised.note,
    }


def _raise_failures(job: Job, directory: BuildDirectory, misses: Sequence[str]) -> None:
    if job.report.failures:
        first = job.report.failures[0]
        kept = f"{len(job.report.engines)} of {len(job.targets)} engines were built; they and model.onnx are kept in {directory.path}"
        raise BackendError(f"{first['target']}: {first['what']} ({kept})", at=first["at"], fix=first["fix"])
    if misses:
        report = directory.path / "report.md"
        raise BudgetError(
            "; ".join(misses), at=f"--budget {job.budget}", fix=f"relax the bound, or read {report} for the regions that cost most"
        )
