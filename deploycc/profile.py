"""Where the time goes: measured per layer on a GPU, or estimated per region without one, and called that."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploycc.backends.layers import Layer, Measurement, measure
from deploycc.core.compatibility import VERSION
from deploycc.core.errors import UsageError
from deploycc.core.plan import PrecisionPlan
from deploycc.core.shapes import parse_shape
from deploycc.core.target import Target, parse_target
from deploycc.output import digest_file, is_build
from deploycc.quant.cost import boundaries, estimate_all, machine_of
from deploycc.recorded import read_json

OTHER, CONVERSION = "(no region)", "conversion"


@dataclass(frozen=True, slots=True)
class Row:
    """The time of one region, of one conversion between two, or of everything that belongs to none.

    ``noise`` is the noise-to-signal ratio that the region's format adds at the outputs, where it was scored; ``evidence`` the mean
    sensitivity of the region, such as its relevance, where the method has one; ``layers`` the engine's layers that compute it
    (none when the time is an estimate).
    """

    region: str
    source: str
    kind: str
    format: str
    noise: float | None
    microseconds: float
    layers: tuple[str, ...] = ()
    evidence: float | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """Rows in falling order of time, and how they came about."""

    is_measured: bool
    basis: str
    rows: tuple[Row, ...]

    @property
    def microseconds(self) -> float:
        """Return the sum of all rows."""
        return sum(r.microseconds for r in self.rows)

    def to_json(self) -> str:
        """Return the profile as JSON (``deploycc.profile/1``)."""
        body = {"schema": "deploycc.profile/1", "measured": self.is_measured, "basis": self.basis, "rows": [asdict(r) for r in self.rows]}
        return json.dumps(body, indent=1) + "\n"


def measured(path: Path, *, target: str = "", runs: int = 100) -> Profile:
    """Time the engine of a build directory per region, or any engine file per layer.

    Raises:
        UsageError: when there is no such engine.
        BackendError: when it cannot be run here.
    """
    if path.is_file():
        found = measure(path, (), runs=runs)
        return _profile(found, [Row(x.name, "", "layer", x.types, None, x.microseconds, (x.name,)) for x in found.layers])
    report = _report(path)
    chosen = _engine(report, path, target)
    nodes = {node: r for r in report["regions"] for node in (*r["nodes"], *r.get("qdq", ()))}
    # What a version-compatible engine brings is run only if it is the one that was built.
    hosts_code = VERSION in report["request"].get("compatibility", "") and digest_file(path / chosen["path"]) == chosen["sha256"]
    found = measure(path / chosen["path"], nodes, runs=runs, hosts_code=hosts_code)
    return _profile(found, _with_evidence(path, by_region(found.layers, nodes)))


def estimated(directory: Path, *, target: str = "") -> Profile:
    """Return the cost model's estimate per region: a roofline over public peak figures, no measurement.

    Raises:
        UsageError: when ``directory`` is no build, since an engine alone does not say what it computes.
    """
    if directory.is_file():
        raise UsageError("an engine alone cannot be estimated", at=str(directory), fix="name a build directory, or run on a GPU")
    report = _report(directory)
    plan = PrecisionPlan.from_json((directory / "plan.json").read_text())
    where = _target(report, target)
    machine = machine_of(where)
    batch = parse_shape(report["model"]["profiles"][0])[1]
    usual = (batch * 3)[:3][1][0] if report["model"]["profiles"] else 1
    regions = [a.region for a in plan.assignments]
    costs = estimate_all(regions, where, batch=usual)
    rows, computed_in = [], {a.region.name: plan.base if a.format.is_simulated else a.format for a in plan.assignments}
    for a in plan.assignments:
        time = costs[a.region.name][computed_in[a.region.name].name]
        rows.append(Row(a.region.name, a.region.source, a.region.kind, a.format.name, a.noise.get(a.format.name), time))
    for boundary in boundaries(regions, where, batch=usual):
        for format in boundary.conversions(computed_in):
            rows.append(Row(boundary.value, "", CONVERSION, format, None, boundary.microseconds))
    basis = f"ESTIMATE, not a measurement: roofline of one {machine.name}, batch {usual}"
    return Profile(False, basis, _sorted(_with_evidence(directory, rows)))


def by_region(layers: Iterable[Layer], regions: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Add up layers per region; a layer that computes several regions is shared out evenly among them."""
    times: dict[str, float] = {}
    members: dict[str, list[str]] = {}
    facts = {r["name"]: r for r in regions.values()}
    for layer in layers:
        names = list(dict.fromkeys(regions[n]["name"] for n in layer.nodes)) or [OTHER]
        for name in names:
            times[name] = times.get(name, 0.0) + layer.microseconds / len(names)
            members.setdefault(name, []).append(layer.name)
    return [_row(name, facts.get(name, {}), time, members[name]) for name, time in times.items()]


def _row(name: str, region: Mapping[str, Any], time: float, layers: Sequence[str]) -> Row:
    format = region.get("format", "")
    noise = region.get("noise", {}).get(format)
    return Row(name, region.get("source", ""), region.get("kind", ""), format, noise, time, tuple(layers))


def _with_evidence(directory: Path, rows: Iterable[Row]) -> list[Row]:
    """Return ``rows`` with what ``scores.json`` knows of each region before it meets a format."""
    known = read_json(directory, "scores.json").get("evidence", {})
    return [row if row.kind == CONVERSION else replace(row, evidence=known.get(row.region, {}).get("mean")) for row in rows]


def _profile(found: Measurement, rows: Sequence[Row]) -> Profile:
    shapes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in found.shapes.items())
    return Profile(True, f"measured on {found.device}: median of {found.runs} runs of {shapes}, layer by layer", _sorted(rows))


def _sorted(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda r: (-r.microseconds, r.region)))


def _report(directory: Path) -> dict[str, Any]:
    if not is_build(directory):
        fix = "name a directory that deploycc build wrote, or an engine file"
        raise UsageError(f"{directory} is neither a build directory nor an engine", at="DIR", fix=fix)
    return dict(read_json(directory, "report.json"))


def _engine(report: Mapping[str, Any], directory: Path, target: str) -> dict[str, Any]:
    wanted = [e for e in report["engines"] if not e["path"].endswith(".onnx") and target in ("", e["target"])]
    if not wanted:
        known = ", ".join(e["target"] for e in report["engines"]) or "none"
        raise UsageError(f"the build has no engine for '{target or 'a GPU'}'", at=str(directory), fix=f"name one of its targets ({known})")
    return dict(wanted[0])


def _target(report: Mapping[str, Any], target: str) -> Target:
    return parse_target(target or report["request"]["targets"][0])


def table(profile: Profile, *, most: int = 40) -> str:
    """Return the profile as text, the ``most`` slowest rows first."""
    total = profile.microseconds or 1.0
    lines = [profile.basis, f"{'us':>10} {'%':>6}  {'format':8} {'dB':>6} {'evidence':>9}  region"]
    for row in profile.rows[:most]:
        noise = f"{_decibels(row.noise):6.1f}" if row.noise else " " * 6
        evidence = f"{row.evidence:9.3g}" if row.evidence is not None else " " * 9
        name = f"{row.source} ({row.region})" if row.source else _label(row)
        lines.append(f"{row.microseconds:10.2f} {100 * row.microseconds / total:6.1f}  {row.format:8} {noise} {evidence}  {name}")
    rest = profile.rows[most:]
    if rest:
        lines.append(f"{sum(r.microseconds for r in rest):10.2f} {100 * sum(r.microseconds for r in rest) / total:6.1f}  {len(rest)} more")
    return "\n".join([*lines, f"{profile.microseconds:10.2f}  100.0  {'measured' if profile.is_measured else 'ESTIMATED'} in all"])


def _label(row: Row) -> str:
    return f"conversion of {row.region}" if row.kind == CONVERSION else row.source or row.region


def chart(profile: Profile, path: Path, *, most: int = 40) -> None:
    """Draw the slowest rows as bars, coloured by format, into an SVG or PNG file; its title says whether it is an estimate."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "deploycc"
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    rows = profile.rows[:most]
    colours = dict(zip(sorted({r.format for r in rows}), ("#4c72b0", "#c44e52", "#55a868", "#8172b2", "#ccb974", "#64b5cd"), strict=False))
    figure, axes = plt.subplots(figsize=(10, max(2.5, 0.22 * len(rows) + 1.2)))
    axes.barh(range(len(rows)), [r.microseconds for r in rows], color=[colours.get(r.format, "#555") for r in rows])
    axes.set_yticks(range(len(rows)), [_label(r) for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds" if profile.is_measured else "microseconds, ESTIMATED")
    axes.set_title(profile.basis, fontsize=8)
    axes.legend(handles=[Patch(color=c, label=name) for name, c in colours.items()], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _decibels(noise: float) -> float:
    from math import log10

    return -10 * log10(noise)
