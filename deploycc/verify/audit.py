"""Requested against realised precision: does the engine compute each region in the format of the plan?

The evidence is the engine's own text listing (``Engine.realised``): undocumented, gated by version, best effort. An empty
listing is reported as unknown, never as agreement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycc.core.formats import FORMATS, Format

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycc.core.backend import Engine
    from deploycc.core.identity import Identity
    from deploycc.core.plan import Assignment, PrecisionPlan

_WORDS = {
    "int8": {"int8"},
    "fp8": {"fp8", "fp8_e4m3", "e4m3", "float8"},
    "mxfp8": {"fp8", "fp8_e4m3", "e4m3", "float8"},
    "nvfp4": {"fp4", "fp4_e2m1", "e2m1"},
    "int4": {"int4"},
    "fp16": {"half", "fp16"},
    "bf16": {"bfloat16", "b16", "bf16"},
    "fp32": {"float", "fp32"},
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One region: what was asked and what the engine shows."""

    region: str
    requested: str
    realised: str
    verdict: str


def audit(plan: PrecisionPlan, engine: Engine) -> list[Finding]:
    """Return one finding per region; ``verdict`` is ``ok``, ``mismatch`` or ``unknown``."""
    return [_finding(a, engine) for a in plan.assignments]


def _finding(assignment: Assignment, engine: Engine) -> Finding:
    wanted = assignment.format.name
    found = [engine.realised.operands[name] for name in assignment.region.anchors if name in engine.realised.operands]
    if not found:
        return Finding(assignment.region.name, wanted, "", "unknown")
    shown = ", ".join(dict.fromkeys(" x ".join(types) for types in found))
    good = all(types and all(t.lower() in _WORDS[wanted] for t in _counting(types, assignment.format)) for types in found)
    return Finding(assignment.region.name, wanted, shown, "ok" if good else "mismatch")


def _counting(types: Sequence[str], format: Format) -> Sequence[str]:
    """Return the operand types that tell whether ``format`` was realised: of weights alone, the second one."""
    return types[1:] if format.activations == "none" else types


def warnings_of(findings: list[Finding], engine: Engine) -> list[str]:
    """Return one warning per region that the engine computes in another format than the plan says."""
    return [
        f"{engine.target}: the plan asks for {f.requested} in '{f.region}', the engine's listing shows {f.realised}"
        for f in findings
        if f.verdict == "mismatch" and FORMATS[f.requested].is_quantized
    ]


def region_rows(
    plan: PrecisionPlan, findings: Mapping[str, Sequence[Finding]], known: Mapping[str, Identity] | None = None
) -> list[dict[str, Any]]:
    """Return one row per region for the report: the decision, its reason, who it is, its figures, and what each engine realised."""
    realised = {target: {f.region: f for f in found} for target, found in findings.items()}
    return [
        {
            "name": a.region.name,
            "source": a.region.source,
            "kind": a.region.kind,
            "format": a.format.name,
            "reason": a.reason,
            "rules": list(a.rules),
            "noise": dict(a.noise),
            "parameters": a.region.parameters,
            "macs": a.region.macs,
            "nodes": list(a.region.nodes),
            **({"torch": list(known[a.region.name].torch), "qdq": list(known[a.region.name].qdq)} if known else {}),
            "realised": {t: {"types": by[a.region.name].realised, "verdict": by[a.region.name].verdict} for t, by in realised.items()},
        }
        for a in plan.assignments
    ]
