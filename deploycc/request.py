"""A build request, and everything about it that can be checked before any long work."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir

from deploycc import registry
from deploycc.backends.probed import lacking
from deploycc.capability import check_compatibility, formats_of_plan, formats_of_precision, formats_on_request, resolve_targets
from deploycc.configuration import read_calibration, read_preprocessing, read_regions
from deploycc.core.artefact import Artefact
from deploycc.core.budget import Budget, parse_budget
from deploycc.core.contract import SOUND
from deploycc.core.data import Dataset, open_data
from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS, SIMULATIONS, Format, parse_precision
from deploycc.core.passes import run
from deploycc.core.plan import PrecisionPlan
from deploycc.core.report import BuildReport
from deploycc.core.shapes import Profile, profiles_for
from deploycc.interop import load_model
from deploycc.quant.clipping import Clipping, parse_clipping
from deploycc.quant.methods import AUTO, check_fallback, method_named
from deploycc.quant.overrides import SECTION, Override, parse_overrides
from deploycc.quant.paper_reparameterize import parse_reparameterization

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deploycc.core.backend import Executor
    from deploycc.core.passes import PassRecord
    from deploycc.core.target import Target
    from deploycc.instruments import Dump

SYNTHETIC_SAMPLES = 32
CALIBRATION_SAMPLES = 512
LONGEST = 30 * 86400.0
MERGES = ("exact", "off", "all")
RESCALES = ("auto", "off")
ROUNDINGS = ("auto", "nearest")
# Operators that the canonical passes take apart before a builder sees them.
DECOMPOSED = frozenset({"Attention"})
WITHOUT_CALIBRATION = frozenset(f.name for f in FORMATS.values() if f.reach is None)


class Watcher(Protocol):
    """Sees a build as it goes; ``render`` shows it to people."""

    def stage(self, name: str) -> None:
        """Begin a stage."""

    def progress(self, done: int, total: int) -> None:
        """Report progress within the stage."""

    def begin(self, name: str) -> None:
        """Begin a stage that runs beside others; may come from any thread."""

    def end(self, name: str) -> None:
        """End a stage that ran beside others."""

    def warn(self, text: str) -> None:
        """Show a warning."""


class Silent:
    """A watcher that shows nothing."""

    def stage(self, name: str) -> None:
        """Ignore it."""

    def progress(self, done: int, total: int) -> None:
        """Ignore it."""

    def begin(self, name: str) -> None:
        """Ignore it."""

    def end(self, name: str) -> None:
        """Ignore it."""

    def warn(self, text: str) -> None:
        """Ignore it."""


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Everything that determines a build, as the user wrote it."""

    model: Path
    precision: str = "fp16"
    data: str | None = None
    eval: str | None = None
    targets: tuple[str, ...] = ()
    budget: str = ""
    shapes: tuple[str, ...] = ()
    out: Path | None = None
    config: Path | None = None
    seed: int = 0
    strict: bool = False
    timeout: float | None = None
    workspace: int | None = None
    merge: str = "exact"
    rescale: str = "auto"
    rounding: str = "auto"
    reparam: str | None = None
    sensitivity: str = AUTO
    relevance_fallback: str | None = None
    verify_each: bool = False
    dump: Path | None = None
    plan: Path | None = None
    calibration: str | None = None
    dcn: str = "body"
    compatibility: str = ""
    regions: tuple[tuple[str, str], ...] = ()

    @property
    def mode(self) -> str:
        """Return what decides the precision: ``plan``, or the name of a precision."""
        return "plan" if self.plan is not None else self.precision

    @property
    def plugin_library(self) -> Path | None:
        """Return the plugin library of ``--dcn``, or None."""
        return Path(self.dcn) if self.dcn not in ("body", "aot") else None

    @property
    def directory(self) -> Path:
        """Return the build directory: ``--out``, or the model's name with ``.deploycc``."""
        return self.out or Path(f"{self.model.stem}.deploycc")


@dataclass
class Job:
    """A request resolved against the model, the data and the backends."""

    request: BuildRequest
    targets: tuple[Target, ...]
    base: Format
    formats: tuple[Format, ...]
    budget: Budget
    imported: Artefact
    profiles: list[Profile]
    calibration: Dataset
    evaluation: Dataset | None
    watch: Watcher
    report: BuildReport = field(default_factory=BuildReport)
    dump: Dump | None = None
    overrides: tuple[Override, ...] = ()
    plan: PrecisionPlan | None = None
    clipping: Clipping | None = None
    reference: Any = field(default_factory=lambda: registry.backend("onnxruntime"))

    @property
    def batch(self) -> int:
        """Return the batch size for running data through graphs."""
        return self.profiles[0].optimum[0] if self.profiles and self.profiles[0].optimum else 1

    @property
    def samples_codes(self) -> bool:
        """Return whether DCNv3 is computed by a kernel that reads INT8 (``regions.partition``)."""
        return self.request.dcn != "body"

    @cached_property
    def original(self) -> Executor:
        """Return the executor of the imported model, which every round of verification is measured against."""
        executor: Executor = self.reference.executor(self.imported.model)
        return executor

    @property
    def largest_batch(self) -> int:
        """Return the largest batch of the profiles: fewer and longer runs for measurements."""
        return self.profiles[0].maximum[0] if self.profiles and self.profiles[0].maximum else 1

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show a stage and add its time to the report."""
        self.watch.stage(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[name] = self.report.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def stage_beside(self, name: str) -> Iterator[None]:
        """Show a stage that runs at the same time as others, and add its time to the report."""
        self.watch.begin(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[name] = time.perf_counter() - start
            self.watch.end(name)

    def warn(self, text: str) -> None:
        """Put a warning on the screen and in the report, once."""
        if text not in self.report.warnings:
            self.report.warnings.append(text)
            self.watch.warn(text)


def resolve(request: BuildRequest, watch: Watcher) -> Job:
    """Check everything that can be checked before any long work.

    Raises:
        UsageError: for each kind of bad input; ``docs/errors.md`` lists them.
    """
    start = time.perf_counter()
    _check_numbers(request)
    precision = parse_precision(request.precision)
    budget = parse_budget(request.budget)
    plan, overrides = _read_plan(request), _overrides(request)
    simulated = precision in SIMULATIONS or (plan is not None and bool(plan.quantizers))
    targets = resolve_targets(request.targets or ("onnxruntime",) * simulated)
    base, formats = formats_of_plan(plan, targets, at=f"--plan {request.plan}") if plan else formats_of_precision(precision, targets)
    formats = (*formats, *formats_on_request(overrides, formats, targets))
    _check_passes(request)
    _check_dcn(request, targets)
    prices = check_compatibility(request.compatibility, targets)
    _check_simulation(request, budget)
    clipping = _clipping(request)
    watch.stage("load")
    imported, records = _imported(request.model)
    inputs = imported.model.graph.inputs
    profiles, notes = profiles_for(inputs, request.shapes)
    calibration = _calibration_data(request, inputs, profiles)
    evaluation = _evaluation_data(request, budget, inputs, profiles)
    job = Job(
        request, targets, base, formats, budget, imported, profiles, calibration, evaluation, watch,
        overrides=overrides, plan=plan, clipping=clipping,
    )  # fmt: skip
    job.report.passes = [asdict(record) for record in records if record.rewrites]
    job.report.seconds["load"] = time.perf_counter() - start
    for note in (*prices, *notes, *calibration.notes, *_lacking(imported, targets)):
        job.warn(note)
    if calibration.synthetic and plan is None and (formats or precision in SIMULATIONS):
        job.warn(
            f"no calibration data: ranges come from {calibration.samples} synthetic samples, so the accuracy of the quantized model is "
            f"unknown; give --data, or put {request.model.stem}.calib.npz beside the model"
        )
    return job


def _lacking(imported: Artefact, targets: Sequence[Target]) -> Iterator[str]:
    """Yield what a target was found to lack, before hours of work end at its builder."""
    operators = {n.op_type for n in ir.traversal.RecursiveGraphIterator(imported.model.graph)} - DECOMPOSED
    for target in targets:
        for operator, reason in lacking(operators, target).items():
            yield f"{target} refused {operator} when it was probed ({reason}); see deploycc targets"


def _imported(path: Path) -> tuple[Artefact, list[PassRecord]]:
    """Return the model of a file with the operators of others turned into ours, so that it can be executed, and what that took."""
    artefact = load_model(path)
    model, records = run(artefact.model, [cls() for _, cls in registry.passes("import")], contract=SOUND)
    return (Artefact(model, artefact.stage) if any(r.rewrites for r in records) else artefact), records


def _check_dcn(request: BuildRequest, targets: Sequence[Target]) -> None:
    at = f"--dcn {request.dcn}"
    if (library := request.plugin_library) and not library.is_file():
        raise UsageError(f"there is no plugin library '{request.dcn}'", at=at, fix="write body, aot, or the path of the built library")
    if request.dcn != "body" and all(target.backend != "tensorrt" for target in targets):
        raise UsageError("only TensorRT takes plugins", at=at, fix="add --target tensorrt, or leave --dcn out")


def _check_passes(request: BuildRequest) -> None:
    """Refuse an unknown way of merging, and a place for graphs that holds other things or is about to be replaced."""
    if request.merge not in MERGES:
        raise UsageError(f"unknown way of merging '{request.merge}'", at="--merge", fix=f"use one of {', '.join(MERGES)}")
    if request.rounding not in ROUNDINGS:
        raise UsageError(f"unknown way of rounding '{request.rounding}'", at="--rounding", fix=f"use one of {', '.join(ROUNDINGS)}")
    if request.rescale not in RESCALES:
        raise UsageError(f"unknown way of rescaling '{request.rescale}'", at="--rescale", fix=f"use one of {', '.join(RESCALES)}")
    if request.sensitivity != AUTO:
        method_named(request.sensitivity)
    check_fallback(request.relevance_fallback)
    if request.dump is None:
        return
    if request.dump.exists() and (not request.dump.is_dir() or any(request.dump.iterdir())):
        raise UsageError(f"{request.dump} is not an empty directory", at="--dump", fix="name a directory that does not exist yet")
    if request.dump.resolve().is_relative_to(request.directory.resolve()):
        raise UsageError(f"{request.dump} is inside the build directory", at="--dump", fix="name a directory beside it")


def _check_simulation(request: BuildRequest, budget: Budget) -> None:
    """Refuse what paper mode does not do, and its option elsewhere."""
    if request.reparam is not None:
        parse_reparameterization(request.reparam)
    if request.precision not in SIMULATIONS:
        if request.reparam is not None:
            known = ", ".join(SIMULATIONS)
            raise UsageError("only simulations are reparameterized so", at="--reparam", fix=f"use --precision {known}, or see --rescale")
    elif any(bound is not None for bound in (budget.bits, budget.size, budget.latency)):
        raise UsageError(
            f"--precision {request.precision} fixes the bits of every layer",
            at=f"--budget {budget}",
            fix="bound sqnr or accuracy-drop only",
        )


def _check_numbers(request: BuildRequest) -> None:
    for name, value, sound in (
        ("seed", request.seed, request.seed >= 0),
        ("timeout", request.timeout, request.timeout is None or 0 < request.timeout <= LONGEST),
        ("workspace", request.workspace, request.workspace is None or request.workspace > 0),
    ):
        if not sound:
            low = "of 0 or more" if name == "seed" else "above 0"
            raise UsageError(f"{value} is no sound {name}", at=f"--{name}", fix=f"give a number {low}, or leave it out")
    inside = request.directory.resolve()
    for option, path in (("MODEL", request.model), ("--data", request.data), ("--eval", request.eval)):
        if path is not None and inside in Path(path).resolve().parents:
            raise UsageError(
                f"{path} lies in the build directory, which this build would replace", at=option, fix="give another --out, or move the file"
            )


def _calibration_data(request: BuildRequest, inputs: Sequence[ir.Value], profiles: Sequence[Profile]) -> Dataset:
    beside = request.model.with_suffix(".calib.npz")
    spec = request.data or (str(beside) if beside.exists() else None)
    data = open_data(
        spec or f"synthetic:{SYNTHETIC_SAMPLES}", inputs, profiles, seed=request.seed, preprocessing=read_preprocessing(request.config)
    ).take(CALIBRATION_SAMPLES)
    if data.synthetic and request.strict and request.plan is None and request.precision not in WITHOUT_CALIBRATION:
        raise UsageError("there is no calibration data", at="--strict", fix=f"give --data, or put {beside.name} beside the model")
    return data


def _evaluation_data(request: BuildRequest, budget: Budget, inputs: Sequence[ir.Value], profiles: Sequence[Profile]) -> Dataset | None:
    if request.eval is None:
        if budget.accuracy_drop is not None:
            raise UsageError("a bound on accuracy needs labelled data", at="--budget accuracy-drop", fix="give --eval FILE.npz with labels")
        return None
    evaluation = open_data(request.eval, inputs, profiles, seed=request.seed, preprocessing=read_preprocessing(request.config))
    if evaluation.labels is None:
        raise UsageError(f"{request.eval} holds no labels", at="--eval", fix="add an array named 'labels'")
    return evaluation


def _read_plan(request: BuildRequest) -> PrecisionPlan | None:
    """Return the plan of ``--plan``; refuse it beside options that decide what it has decided."""
    if request.plan is None:
        return None
    at = f"--plan {request.plan}"
    if request.precision != BuildRequest(request.model).precision or request.regions or read_regions(request.config):
        raise UsageError("the plan says every precision already", at=at, fix="leave --precision and [regions] away, or edit the plan")
    try:
        return PrecisionPlan.from_json(request.plan.read_text(), at=str(request.plan))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the plan cannot be read: {error}", at=at, fix="give the plan.json of a build directory") from error


def _clipping(request: BuildRequest) -> Clipping | None:
    """Return how far INT8 ranges reach, None where that is to be measured; refuse to be told where nothing would obey."""
    asked = request.calibration or read_calibration(request.config)
    at = f"--calibration {asked}" if request.calibration else f"--config {request.config}"
    if asked is None:
        return None
    if request.plan is not None or request.precision in SIMULATIONS:
        what = "the plan holds every scale already" if request.plan is not None else "a simulation fits every quantizer itself"
        raise UsageError(what, at=at, fix="leave the way of calibration away")
    return parse_clipping(asked, at=at)


def _overrides(request: BuildRequest) -> tuple[Override, ...]:
    entries = dict(request.regions) or read_regions(request.config)
    if entries and request.precision in SIMULATIONS:
        raise UsageError("a simulation decides every layer itself", at=f"--config {SECTION}", fix=f"leave {SECTION} away")
    return parse_overrides(entries, at=f"--config {request.config}" if request.config else "--config")
