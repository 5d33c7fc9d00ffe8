"""Two models or build directories side by side: outputs, layers, formats, size and estimated time."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploycc import registry
from deploycc.capability import resolve_targets
from deploycc.configuration import read_preprocessing
from deploycc.core.contract import SOUND
from deploycc.core.data import open_data
from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS
from deploycc.core.passes import run
from deploycc.core.shapes import profiles_for
from deploycc.interop.inspecting import read_model
from deploycc.lint.subject import Subject, value_type
from deploycc.output import is_build
from deploycc.quant.cost import boundaries, estimate_all, machine_of, total
from deploycc.recorded import read_json
from deploycc.request import Silent, Watcher
from deploycc.verify import accuracy, numerics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycc.core.data import Dataset
    from deploycc.core.plan import Region
    from deploycc.core.target import Target
    from deploycc.verify.numerics import Comparison

SCHEMA = "deploycc.comparison/1"
SAMPLES, SHOWN = 64, 40
_BASES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


@dataclass(frozen=True)
class Side:
    """One of the two: its graph, the format in which the file computes each region, its sizes in bytes, and its estimated time."""

    path: Path
    model: ir.Model = field(repr=False)
    regions: tuple[Region, ...]
    formats: dict[str, str]
    model_bytes: int
    engine_bytes: dict[str, int]
    latency_us: float

    def row(self) -> dict[str, Any]:
        """Return the figures of this side."""
        counts = dict(sorted(Counter(self.formats.values()).items()))
        sizes = {"model_bytes": self.model_bytes, "engine_bytes": self.engine_bytes}
        return {"path": str(self.path), "regions": counts, **sizes, "estimated_latency_us": round(self.latency_us, 2)}


@dataclass(frozen=True)
class Compared:
    """What differs between A and B. ``layers`` holds B against A at the end of each region that both have."""

    a: Side
    b: Side
    data: str
    machine: str
    batch: int
    outputs: list[Comparison]
    layers: list[dict[str, Any]]
    changed: list[dict[str, str]]
    unmatched: int
    accuracy: dict[str, Any]

    def to_json(self) -> str:
        """Return everything as indented JSON."""
        body = {
            "schema": SCHEMA, "a": self.a.row(), "b": self.b.row(), "data": self.data, "outputs": [asdict(o) for o in self.outputs],
            "accuracy": self.accuracy, "changed": self.changed, "layers": self.layers, "unmatched_regions": self.unmatched,
            "estimated_on": f"{self.machine}, batch {self.batch}",
        }  # fmt: skip
        return json.dumps(body, indent=1) + "\n"

    def __str__(self) -> str:
        blocks = [_sides(self), _outputs(self), _changes(self), _layers(self)]
        return "\n\n".join(block for block in blocks if block)


def compare(
    a: Path, b: Path, *, data: str | None = None, target: str = "", config: Path | None = None, seed: int = 0, watch: Watcher | None = None
) -> Compared:
    """Compare B with A.

    Where one of them is a build and the other a floating-point file, the exact passes run on the file first, so that layers correspond.

    Args:
        a: a model or a build directory, the reference.
        b: another one.
        data: as for ``build``; labels give the accuracy of both. Default: the calibration data beside the model or of the build, else 64
            synthetic samples.
        target: whose times are estimated; default: TensorRT-RTX.
        config: says how directories of images are read.
        seed: of synthetic data.
        watch: sees the progress.

    Raises:
        UsageError: when one of them cannot be read, or their inputs or outputs differ.
    """
    watch = watch or Silent()
    watch.stage("read")
    where = resolve_targets((target or "tensorrt-rtx",))[0]
    models = [_model(p) for p in (a, b)]
    _check_alike(*models)
    if is_build(a) != is_build(b):
        models = [m if is_build(p) or _has_pairs(m) else _canonical(m) for m, p in zip(models, (a, b), strict=True)]
    profiles, _ = profiles_for(models[0].graph.inputs, ())
    spec = data or _data_of(a) or _data_of(b) or f"synthetic:{SAMPLES}"
    samples = open_data(spec, models[0].graph.inputs, profiles, seed=seed, preprocessing=read_preprocessing(config))
    batch = profiles[0].optimum[0] if profiles and profiles[0].optimum else 1
    one, other = (_side(p, m, where, batch) for p, m in zip((a, b), models, strict=True))
    pairs = _matched(one, other)
    outputs, layers = _measured(one, other, pairs, samples, batch, watch)
    changed = [
        {"region": r.name, "torch": r.source, "a": one.formats[p.name], "b": other.formats[r.name]}
        for p, r in pairs
        if one.formats[p.name] != other.formats[r.name]
    ]
    scores = _scores(one, other, samples, batch, watch)
    missing = len(one.regions) + len(other.regions) - 2 * len(pairs)
    return Compared(one, other, samples.source, machine_of(where).name, batch, outputs, layers, changed, missing, scores)


def _data_of(path: Path) -> str | None:
    """Return the calibration data of a build, or the file that lies beside a model."""
    if path.is_dir():
        manifest = read_json(path, "manifest.json")
        spec, path = manifest["paths"]["data"], Path(manifest["paths"]["model"])
        if spec is not None:
            return str(spec)
    beside = path.with_suffix(".calib.npz")
    return str(beside) if beside.exists() else None


def _model(path: Path) -> ir.Model:
    if path.is_dir() and not is_build(path):
        raise UsageError(f"{path} is not a build directory", at="A or B", fix="name a model, or a directory that deploycc build wrote")
    return read_model(path / "model.onnx" if path.is_dir() else path)


def _check_alike(a: ir.Model, b: ir.Model) -> None:
    for kind, one, other in (("inputs", a.graph.inputs, b.graph.inputs), ("outputs", a.graph.outputs, b.graph.outputs)):
        names = [{v.name for v in values} for values in (one, other)]
        if names[0] != names[1]:
            shown = " and ".join(", ".join(sorted(filter(None, each))) for each in names)
            raise UsageError(f"the {kind} differ: {shown}", at="A and B", fix="compare two forms of one model")


def _has_pairs(model: ir.Model) -> bool:
    return any(n.op_type == "DequantizeLinear" for n in model.graph)


def _canonical(model: ir.Model) -> ir.Model:
    passes = [cls() for phase in ("canonicalize", "prepare") for _, cls in registry.passes(phase)]
    return run(model, passes, contract=SOUND)[0]


def _side(path: Path, model: ir.Model, target: Target, batch: int) -> Side:
    subject = Subject(model)
    formats = {r.name: subject.format_of(r) or _base(subject, r) for r in subject.regions}
    known = {name: FORMATS.get(format, FORMATS["fp32"]) for name, format in formats.items()}
    latency = total(estimate_all(subject.regions, target, batch=batch), boundaries(subject.regions, target, batch=batch), known)
    engines = {p.name: p.stat().st_size for p in sorted((path / "engines").glob("*.*"))} if path.is_dir() else {}
    file = path / "model.onnx" if path.is_dir() else path
    size = sum(p.stat().st_size for p in (file, file.with_name(f"{file.name}.data")) if p.exists())
    return Side(path, model, subject.regions, formats, size, engines, latency)


def _base(subject: Subject, region: Region) -> str:
    """Return the floating-point format of the region's first anchor."""
    anchors = subject.anchors(region)
    return _BASES.get(value_type(anchors[0].outputs[0]) if anchors else "", "fp32")


def _matched(a: Side, b: Side) -> list[tuple[Region, Region]]:
    """Return regions of A and B that are the same: by name, else by a PyTorch module that is one region in both."""
    by_name = {r.name: r for r in a.regions}
    once = [Counter(r.source for r in side.regions if r.source) for side in (a, b)]
    by_module = {r.source: r for r in a.regions if once[0][r.source] == once[1][r.source] == 1}
    found = ((by_name.get(r.name) or by_module.get(r.source), r) for r in b.regions)
    return [(p, r) for p, r in found if p is not None]


def _measured(
    a: Side, b: Side, pairs: Sequence[tuple[Region, Region]], data: Dataset, batch: int, watch: Watcher
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Run both on the data and compare the outputs, and the ends of those regions whose last value has one name in both."""
    values = [{v.name: v for n in side.model.graph for v in n.outputs if n.op_type not in {"QuantizeLinear", "Cast"}} for side in (a, b)]
    ends = {name: r for p, r in pairs if (name := _end(p, r, a, b)) and name in values[0] and name in values[1]}
    outputs = {v.name for v in b.model.graph.outputs}
    reference = registry.backend("onnxruntime")
    executors = [reference.executor(_exposing(side.model, [n for n in ends if n not in outputs]), simulate=True) for side in (a, b)]
    watch.stage("compare")
    found = numerics.compare(executors[0], executors[1], data.take(SAMPLES), batch=batch, progress=watch.progress)
    layers = [_layer(c, ends[c.output], pairs, a, b) for c in found if c.output in ends]
    order = {r.name: i for i, r in enumerate(b.regions)}
    return [c for c in found if c.output in outputs], sorted(layers, key=lambda row: order[row["region"]])


def _layer(c: Comparison, region: Region, pairs: Sequence[tuple[Region, Region]], a: Side, b: Side) -> dict[str, Any]:
    figures = {"sqnr_db": round(c.sqnr_db, 2), "cosine": c.cosine, "max_abs": c.max_abs}
    before = next(p.name for p, r in pairs if r is region)
    return {
        "region": region.name,
        "torch": region.source,
        "value": c.output,
        **figures,
        "a": a.formats[before],
        "b": b.formats[region.name],
    }


def _end(p: Region, r: Region, a: Side, b: Side) -> str:
    """Return the name of the value in which both regions end: the output of the last node that both have under one output name."""
    outputs = [{n.name: n.outputs[0].name for n in side.model.graph} for side in (a, b)]
    shared = [n for n in r.nodes if n in p.nodes and outputs[0].get(n) == outputs[1].get(n)]
    return outputs[1][shared[-1]] or "" if shared else ""


def _exposing(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a clone that also gives out the named values."""
    clone = model.clone()
    values = {v.name: v for n in clone.graph for v in n.outputs}
    clone.graph.outputs.extend(values[name] for name in names)
    return clone


def _scores(a: Side, b: Side, data: Dataset, batch: int, watch: Watcher) -> dict[str, Any]:
    if data.labels is None:
        return {}
    watch.stage("accuracy")
    reference = registry.backend("onnxruntime")
    executors = {name: reference.executor(side.model, simulate=True) for name, side in (("a", a), ("b", b))}
    metric, points = accuracy.score(executors, data, batch=batch, progress=watch.progress)
    return {"metric": metric, **points, "samples": data.samples}


def _sides(compared: Compared) -> str:
    lines = []
    for name, side in (("A", compared.a), ("B", compared.b)):
        row = side.row()
        counts = ", ".join(f"{n} {f}" for f, n in row["regions"].items()) or "no region"
        engines = "".join(f", {file} {size / 1e6:.2f} MB" for file, size in side.engine_bytes.items())
        lines.append(f"{name}  {side.path}: {counts}; model {side.model_bytes / 1e6:.2f} MB{engines}; {side.latency_us:.1f} us estimated")
    ratio = compared.b.latency_us / compared.a.latency_us if compared.a.latency_us else 1.0
    size = compared.b.model_bytes / compared.a.model_bytes
    where = f"{compared.machine}, batch {compared.batch}: a roofline estimate, not a measurement"
    return "\n".join([*lines, f"B is {size:.2f}x the size of A and takes {ratio:.2f}x its estimated time ({where})"])


def _outputs(compared: Compared) -> str:
    lines = [f"B against A on {compared.data}:"]
    for c in compared.outputs:
        agreement = "" if c.agreement is None else f", agreement {c.agreement:.2%}"
        lines.append(f"  output {c.output}: SQNR {c.sqnr_db:.1f} dB, cosine {c.cosine:.6f}, largest difference {c.max_abs:.4g}{agreement}")
    if compared.accuracy:
        s = compared.accuracy
        lines.append(f"  {s['metric']}: A {s['a']:.2f} %, B {s['b']:.2f} % on {s['samples']} samples")
    return "\n".join(lines)


def _changes(compared: Compared) -> str:
    lines = [f"  {c['region']}{' (' + c['torch'] + ')' if c['torch'] else ''}: {c['a']} -> {c['b']}" for c in compared.changed]
    missing = [f"  {compared.unmatched} regions have no counterpart"] if compared.unmatched else []
    return "\n".join([f"{len(lines)} regions in another format:" if lines else "every region has the same format", *lines, *missing])


def _layers(compared: Compared) -> str:
    """Return the SQNR at the end of each region; of many regions the worst ones, in the order of the graph."""
    rows = compared.layers
    worst = sorted(rows, key=lambda row: row["sqnr_db"])[:SHOWN]
    shown = [row for row in rows if row in worst]
    head = "SQNR of B against A at the end of each region" + (
        "" if len(shown) == len(rows) else f" (the worst {len(shown)} of {len(rows)})"
    )
    return "\n".join([f"{head}:", *(f"  {r['sqnr_db']:6.1f} dB  {r['b']:5} {r['torch'] or r['region']}" for r in shown)]) if rows else ""
