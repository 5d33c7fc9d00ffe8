"""Which regions of a build lose the accuracy? Restore some of them to floating point, measure, and search."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from deploycc.configuration import read_preprocessing
from deploycc.core.data import open_data
from deploycc.core.errors import UsageError
from deploycc.core.formats import FP32
from deploycc.core.graph import constant
from deploycc.core.identity import pairs_before
from deploycc.core.plan import PrecisionPlan
from deploycc.core.quantizers import decode
from deploycc.interop.inspecting import read_model
from deploycc.recorded import request_of
from deploycc.request import BuildRequest, Job, Silent, Watcher, resolve
from deploycc.rewriting import canonicalize_for, lower, reparameterize
from deploycc.verify import accuracy, numerics
from deploycc.verify.culprits import NOTABLE, Search, most_runs, search

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from deploycc.core.artefact import Artefact
    from deploycc.core.data import Dataset
    from deploycc.core.plan import Assignment

SCHEMA = "deploycc.bisection/1"
SAMPLES, LABELLED = 128, 2048
# Fewer samples than this that change sides say nothing about a region.
FEWEST = 3


@dataclass(frozen=True)
class Bisection:
    """What a bisection found; scores are accuracies in percent, or SQNR in dB, against the original."""

    directory: str
    metric: str
    data: str
    samples: int
    original: float | None
    built: float
    restored: float
    restored_to: str
    candidates: int
    runs: int
    explained: float
    together: float
    suspects: tuple[dict[str, Any], ...]
    verdict: str

    def to_json(self) -> str:
        """Return the findings as indented JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    def __str__(self) -> str:
        unit = "dB" if self.metric == "SQNR" else "%"
        original = "" if self.original is None else f"original {self.original:.2f} {unit}, "
        head = f"{self.metric} on {self.samples} samples of {self.data}: {original}as built {self.built:.2f} {unit}, "
        lines = [f"{head}with all {self.candidates} regions in {self.restored_to} {self.restored:.2f} {unit}", self.verdict]
        for each in self.suspects:
            module = f" ({each['torch']})" if each["torch"] else ""
            change = f"{self.built:.2f} -> {each['score']:.2f} {unit}"
            lines.append(f"  {each['region']}{module}: {each['format']}; restored alone {change}, {each['share']:.0%} of the loss")
        if len(self.suspects) > 1:
            lines.append(f"  together: {self.built:.2f} -> {self.together:.2f} {unit}, {self.explained:.0%} of the loss")
        if self.suspects:
            lines += ["", "to keep them so, build with --config and", "[regions]"]
            lines += [f'"{each["torch"] or each["region"]}" = "{self.restored_to}"' for each in self.suspects]
        return "\n".join([*lines, f"({self.runs} measurements)"])


def bisect(
    directory: Path, *, data: str | None = None, config: Path | None = None, runs: int | None = None, watch: Watcher | None = None
) -> Bisection:
    """Return the regions of a build that lose most of its accuracy.

    A quantized region is restored to the base format; in a build that quantizes nothing, a region of 16 bits is restored to FP32.

    Args:
        directory: a build directory whose model can still be found.
        data: as for ``build``; with labels the search goes by accuracy, else by SQNR. Default: the data of the build.
        config: says how directories of images are read.
        runs: the most measurements; default: about 3 log2 of the number of regions.
        watch: sees the progress.

    Raises:
        UsageError: when the directory is no build, an input is missing, or nothing in it could be restored.
    """
    watch = watch or Silent()
    recorded = request_of(directory)
    request = replace(BuildRequest(recorded.model), plan=directory / "plan.json", targets=recorded.targets, shapes=recorded.shapes,
                      data=recorded.data, merge=recorded.merge, config=config, out=recorded.out)  # fmt: skip
    job = resolve(request, watch)
    plan = job.plan or PrecisionPlan(FP32, ())
    candidates = _candidates(plan, directory)
    spec = data or recorded.eval or recorded.data
    samples = job.calibration if spec is None else open_data(
        spec, job.imported.model.graph.inputs, job.profiles, seed=0, preprocessing=read_preprocessing(config)
    )  # fmt: skip
    watch.stage("canonicalize")
    canonical, _ = reparameterize(job, canonicalize_for(job, plan), plan.rescales)
    trial = _Trial(job, canonical, plan, _stored_weights(directory, plan, canonical))
    judge, note = _judge(job, trial, samples.take(SAMPLES if samples.labels is None else LABELLED))
    watch.stage("bisect")
    limit = runs or most_runs(len(candidates))
    found = search([a.region.name for a in candidates], lambda names: judge.loss(trial.executor(names)), limit=limit, tick=watch.progress)
    return _told(directory, plan, candidates, found, judge, note)


def _candidates(plan: PrecisionPlan, directory: Path) -> list[Assignment]:
    """Return the regions that can be restored: those not in the base format, or all when none is."""
    found = [a for a in plan.assignments if a.format not in (plan.base, FP32)]
    if not found and plan.base == FP32:
        fix = "bisect a build in a lower precision"
        raise UsageError("every region of the build computes in FP32: there is nothing to restore", at=str(directory), fix=fix)
    return found or [a for a in plan.assignments if a.format != FP32]


@dataclass(frozen=True)
class _Trial:
    """Makes the model that the build would be with some regions restored."""

    job: Job
    canonical: Artefact
    plan: PrecisionPlan
    weights: dict[str, dict[str, np.ndarray]]

    def executor(self, names: Sequence[str]) -> Any:
        """Return an executor of the model with the regions ``names`` restored."""
        chosen = set(names)
        quantizes = any(a.format not in (self.plan.base, FP32) for a in self.plan.assignments)
        format = self.plan.base if quantizes else FP32
        assignments = tuple(replace(a, format=format) if a.region.name in chosen else a for a in self.plan.assignments)
        islands = dict(self.plan.islands)
        if not quantizes:
            islands |= {n: "bisection" for a in self.plan.assignments if a.region.name in chosen for n in a.region.nodes}
        weights = {n: w for region, by in self.weights.items() if region not in chosen for n, w in by.items()}
        lowered, _ = lower(self.job, self.canonical, replace(self.plan, assignments=assignments, islands=islands), weights)
        return self.job.reference.executor(lowered.model, simulate=True)


def _stored_weights(directory: Path, plan: PrecisionPlan, canonical: Artefact) -> dict[str, dict[str, np.ndarray]]:
    """Return the weights that the build rounded for its layers' outputs, by region and initializer, read from its codes."""
    if not plan.rounded_on:
        return {}
    built = {n.name: n for n in read_model(directory / "model.onnx").graph}
    before = {n.name: n for n in canonical.model.graph}
    found: dict[str, dict[str, np.ndarray]] = {}
    for assignment in plan.assignments:
        # Weights in blocks are not rounded for the outputs of their layers: insertion finds the same codes again.
        for name in assignment.region.anchors if assignment.region.weights and not assignment.format.block else ():
            pairs = pairs_before(built[name], 1) if name in built else []
            source = before[name].inputs[1] if name in before else None
            if pairs and source is not None and source.name:
                codes, scale = constant(pairs[-1].inputs[0]), constant(pairs[-1].inputs[1])
                if codes is not None and scale is not None:
                    axis = pairs[-1].attributes["axis"].as_int() if scale.ndim else None
                    found.setdefault(assignment.region.name, {})[source.name] = decode(codes, scale.astype("float32"), axis=axis)
    return found


@dataclass(frozen=True)
class _Judge:
    """Measures what an executor loses against the original: points of accuracy, or the noise-to-signal ratio of the worst output."""

    job: Job
    data: Dataset
    metric: str
    original: float | None

    def loss(self, executor: Any) -> float:
        """Return the loss; less is better."""
        batch = self.job.largest_batch
        if self.original is not None:
            _, points = accuracy.score({"built": executor}, self.data, batch=batch)
            return self.original - points["built"]
        compared = numerics.compare(self.job.original, executor, self.data, batch=batch)
        return 10 ** (-min((c.sqnr_db if c.finite else -numerics.PERFECT_DB for c in compared), default=0.0) / 10)

    def score(self, loss: float) -> float:
        """Return accuracy in percent, or SQNR in dB."""
        return self.original - loss if self.original is not None else -10 * math.log10(max(loss, 10 ** (-numerics.PERFECT_DB / 10)))


def _judge(job: Job, trial: _Trial, data: Dataset) -> tuple[_Judge, str]:
    """Go by accuracy where there are labels and enough samples change sides, else by SQNR."""
    if data.labels is None:
        return _Judge(job, data, "SQNR", None), ""
    metric, points = accuracy.score({"fp32": job.original, "built": trial.executor(())}, data, batch=job.largest_batch)
    if points["fp32"] - points["built"] > 100.0 * FEWEST / data.samples:
        return _Judge(job, data, metric, points["fp32"]), ""
    note = f"{metric} is {points['built']:.2f} % as built and {points['fp32']:.2f} % originally: too little to search by, so SQNR is used\n"
    return _Judge(job, replace(data.take(SAMPLES), labels=None), "SQNR", None), note


def _told(directory: Path, plan: PrecisionPlan, candidates: Sequence[Assignment], found: Search, judge: _Judge, note: str) -> Bisection:
    by_name = {a.region.name: a for a in candidates}
    target = plan.base if any(a.format not in (plan.base, FP32) for a in candidates) else FP32
    suspects = tuple(
        {
            "region": s.name, "torch": by_name[s.name].region.source, "nodes": list(by_name[s.name].region.nodes),
            "format": by_name[s.name].format.name, "share": round(s.share, 4), "score": round(judge.score(s.loss), 4),
        }
        for s in found.suspects
    )  # fmt: skip
    return Bisection(
        directory=str(directory), metric=judge.metric, data=judge.data.source, samples=judge.data.samples, original=judge.original,
        built=round(judge.score(found.built), 4), restored=round(judge.score(found.restored), 4), restored_to=target.name,
        candidates=len(candidates), runs=found.runs, explained=round(found.explained, 4), together=round(judge.score(found.together), 4),
        suspects=suspects if _is_explained(found) else (), verdict=note + _verdict(found, target.name),
    )  # fmt: skip


def _is_explained(found: Search) -> bool:
    return found.gap > NOTABLE * max(found.built, 0.0) and bool(found.suspects) and found.suspects[0].share >= NOTABLE


def _verdict(found: Search, target: str) -> str:
    if found.gap <= NOTABLE * max(found.built, 0.0):
        return f"no region explains the loss: it remains with every region in {target}, so it lies in what surrounds them"
    if not found.suspects or found.suspects[0].share < NOTABLE:
        return "no region explains the loss: it is spread, none accounts for a tenth of it; a budget with --precision mixed weighs them all"
    count = len(found.suspects)
    return f"{count} region{'' if count == 1 else 's'} account{'s' if count == 1 else ''} for {found.explained:.0%} of the loss:"
