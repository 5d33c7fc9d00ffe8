"""Why a region has its format, told from a build directory alone."""

from __future__ import annotations

import json
from math import log10
from typing import TYPE_CHECKING, Any

from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS
from deploycc.core.plan import PrecisionPlan
from deploycc.core.rules import RULES
from deploycc.core.target import parse_target
from deploycc.output import is_build
from deploycc.quant.allocate import pareto_front
from deploycc.quant.cost import boundaries, estimate_all, total

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def explain(directory: Path, node: str | None) -> str:
    """Return the explanation of one node, region or PyTorch module, or of every region.

    Raises:
        UsageError: when ``directory`` is not a build, or nothing has that name.
    """
    report = _report(directory)
    if node is None:
        return "\n".join(_line(region) for region in report["regions"])
    found = [r for r in report["regions"] if _is_named(r, node)]
    notes = _pass_notes(report, node)
    if not found and not notes:
        names = ", ".join(r["source"] or r["name"] for r in report["regions"][:8])
        raise UsageError(
            f"no region or pass record mentions '{node}'",
            at=str(directory),
            fix=f"run `deploycc explain {directory}` for all regions; the first are {names}",
        )
    conversions = report["plan"].get("conversions", [])
    return "\n\n".join([*(_paragraph(r, conversions) for r in found), *notes])


def _is_named(region: dict[str, Any], name: str) -> bool:
    """Return whether ``name`` is the region, one of its nodes or Q/DQ nodes, a PyTorch module of it, or a parent of one."""
    modules = [region["source"], *region.get("torch", ())]
    return name in (region["name"], *region["nodes"], *region.get("qdq", ())) or any(f"{m}.".startswith(f"{name}.") for m in modules)


def explain_passes(directory: Path) -> str:
    """Return a table of the passes of a build, and every place that one of them declined or was rolled back.

    Raises:
        UsageError: when ``directory`` is not a build.
    """
    rows = _report(directory)["passes"]
    width = max((len(r["spec"]) for r in rows), default=4)
    lines = [f"{'pass':{width}}  {'seconds':>7}  {'nodes':>11}  {'rewrites':>8}  {'declines':>8}"]
    for r in rows:
        nodes, changes, declined = f"{r['nodes_before']} -> {r['nodes_after']}", len(r["rewrites"]), len(r["declines"])
        lines.append(f"{r['spec']:{width}}  {r['seconds']:7.2f}  {nodes:>11}  {changes:8}  {declined:8}")
    notes = [f"{r['spec']} was rolled back: {r['rolled_back']}" for r in rows if r.get("rolled_back")]
    notes += [f"{r['spec']} declined {d['code']} at {d['anchor']}: {d['reason']}" for r in rows for d in r["declines"]]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def explain_front(directory: Path) -> str:
    """Return a table of the best plans between the fastest and the least noisy, from the scores and estimates of a finished build.

    Raises:
        UsageError: when ``directory`` is not a build, or was built without scores.
    """
    report = _report(directory)
    plan = PrecisionPlan.from_json((directory / "plan.json").read_text(), at=str(directory / "plan.json"))
    regions = [a.region for a in plan.assignments]
    scored = {name for a in plan.assignments for name in a.noise}
    if not scored:
        raise UsageError("this build has no scores to choose by", at=str(directory), fix="build with --precision mixed")
    target = parse_target(report["request"]["targets"][0])
    costs, noise = estimate_all(regions, target, batch=report["plan"]["batch"]), {a.region.name: a.noise for a in plan.assignments}
    formats = [f for f in FORMATS.values() if f.name in scored]
    borders = boundaries(regions, target, batch=report["plan"]["batch"])
    front = pareto_front(regions, formats, plan.base, noise=noise, latency=costs, boundaries=borders)
    whole = sum(costs[r.name][plan.base.name] for r in regions)
    lines = [f"{'latency':>8}  {'bits':>5}  {'expected SQNR':>13}  regions"]
    for found in (*front, plan.assignments):
        time = total(costs, borders, {a.region.name: a.format for a in found}) / whole
        spent = sum(a.noise.get(a.format.name, 0.0) for a in found)
        counts = ", ".join(f"{n} {name}" for name, n in PrecisionPlan(plan.base, found).count().items())
        shown = f"{-10 * log10(spent):.1f} dB" if spent > 0 else f"{plan.base.name} only"
        mark = "  (this build)" if found is plan.assignments else ""
        lines.append(f"{time:7.3f}x  {PrecisionPlan(plan.base, found).average_bits():5.2f}  {shown:>13}  {counts}{mark}")
    note = (
        f"latency is a roofline estimate as a share of {plan.base.name} on {target}; the noise of single regions is taken to add up; "
        "size is no bound here"
    )
    return "\n".join([*lines, "", note])


def _report(directory: Path) -> dict[str, Any]:
    if not is_build(directory):
        raise UsageError(f"{directory} is not a build directory", at="DIR", fix="name a directory that deploycc build wrote")
    report: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return report


def _line(region: dict[str, Any]) -> str:
    return f"{region['format']:5} {region['kind']:14} {region['source'] or region['name']}: {region['reason']}"


def _paragraph(region: dict[str, Any], conversions: Sequence[Mapping[str, Any]]) -> str:
    modules = ", ".join(region.get("torch") or ([region["source"]] if region["source"] else ["not recorded"]))
    lines = [f"{region['name']} ({region['kind']}) computes in {region['format']}", f"  PyTorch: {modules}"]
    lines.append(f"  nodes: {', '.join(region['nodes'])}")
    lines.extend([f"  Q/DQ: {', '.join(region['qdq'])}"] if region.get("qdq") else [])
    lines.append(f"  why: {region['reason']}")
    lines.extend(f"  rule {rule}: {RULES[rule]}" for rule in region["rules"] if rule in RULES)
    for name, noise in region["noise"].items():
        shown = f"{-10 * log10(noise):.1f} dB" if noise > 0 else "exact"
        lines.append(f"  {name} alone: SQNR {shown} at the outputs")
    for c in conversions:
        if region["name"] == c["producer"]:
            lines.append(
                f"  its output {c['value']} is converted to {c['format']} by a kernel of its own, {c['estimated_us']} us estimated"
            )
    for target, seen in region["realised"].items():
        lines.append(f"  {target}: {seen['types'] or 'not visible in the listing'} ({seen['verdict']})")
    return "\n".join(lines)


def _pass_notes(report: dict[str, Any], node: str) -> list[str]:
    notes: list[str] = []
    for record in report["passes"]:
        notes.extend(f"{record['spec']}: {r['what']} ({r['proof']})" for r in record["rewrites"] if r["anchor"] == node)
        notes.extend(f"{record['spec']} declined {d['code']}: {d['reason']}" for d in record["declines"] if d["anchor"] == node)
    return notes
