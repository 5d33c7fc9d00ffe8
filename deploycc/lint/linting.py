"""Inspect a file: load it, run every check, and say what was found, to people or to programs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from deploycc import registry
from deploycc.core.identity import scope_of
from deploycc.core.rules import RULES
from deploycc.core.target import parse_target
from deploycc.interop import save_model
from deploycc.interop.inspecting import read_model
from deploycc.lint.findings import CHECKS, SEVERITIES, Check, Finding, Place
from deploycc.lint.proof import proof
from deploycc.lint.repair import repair
from deploycc.lint.subject import Subject

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from deploycc.core.formats import Format

SCHEMA = "deploycc.lint/1"
FAMILIES = ("representation", "storage", "placement", "fusion", "sizes", "attention", "mixing")
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Inspection:
    """The findings on one file, the worst first; ``repaired`` says what ``--fix`` changed."""

    model: str
    target: str
    nodes: int
    pairs: int
    findings: tuple[Finding, ...]
    repaired: tuple[str, ...] = ()

    def count(self) -> dict[str, int]:
        """Return the number of findings per severity."""
        found = Counter(f.severity for f in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    @property
    def exit_code(self) -> int:
        """Return 1 when there are errors, else 0."""
        return 1 if self.count()["error"] else 0

    def to_json(self) -> str:
        """Return the findings as indented JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self), "count": self.count()}, indent=1) + "\n"

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.rule, finding.why), []).append(finding)
        blocks = [_paragraph(found) for found in groups.values()]
        found = ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for name, n in self.count().items())
        seen = f"{self.model}: {self.nodes} nodes, {self.pairs} DequantizeLinear"
        return "\n\n".join([*blocks, *(f"fixed: {text}" for text in self.repaired), f"{seen}: {found}"])


def checks() -> dict[str, Check]:
    """Return every check by rule id, in the order of the rules."""
    for family in FAMILIES:
        import_module(f"deploycc.lint.{family}")
    return {name: CHECKS[name] for name in RULES if name in CHECKS}


def lint(path: Path, *, target: str = "") -> Inspection:
    """Return the findings on the file at ``path``.

    Args:
        path: an ONNX file, quantized by anybody.
        target: e.g. ``tensorrt-rtx:sm_89``: formats that it lacks are findings too.

    Raises:
        UsageError: when the file cannot be read, or the target is unknown.
    """
    offered = formats_of(target)
    return inspect(read_model(path), name=path.name, target=target, formats=offered)


def fix(path: Path, out: Path, *, target: str = "") -> Inspection:
    """Write the file at ``path`` with every safe repair to ``out``; return what is left to find in it, and what was repaired.

    Original and result are executed on random inputs where ONNX Runtime can execute them.

    Args:
        path: an ONNX file, quantized by anybody.
        out: where to write; it may be ``path``.
        target: as for ``lint``.

    Raises:
        UsageError: when the file cannot be read or written, or the target is unknown.
        ContractError: when the repaired model computes other numbers; then nothing is written.
    """
    offered, model = formats_of(target), read_model(path)
    original = model.clone()
    done = repair(model)
    done += proof(original, model) if done else []
    inspection = replace(inspect(model, name=path.name, target=target, formats=offered), repaired=tuple(done))
    save_model(model, out)
    return inspection


def formats_of(target: str) -> frozenset[Format] | None:
    """Return the formats that ``target`` computes natively, None when no target is named.

    Raises:
        UsageError: when the target is unknown.
    """
    if not target:
        return None
    parsed = parse_target(target)
    backend = registry.backend(parsed.backend)
    return frozenset(backend.formats(backend.resolve(parsed)))


def inspect(model: ir.Model, *, name: str, target: str = "", formats: frozenset[Format] | None = None) -> Inspection:
    """Return the findings on a model in memory."""
    subject = Subject(model, target=target, formats=formats)
    found = [_finding(check, place, subject) for check in checks().values() for place in check.find(subject)]
    rank = list(SEVERITIES)
    ordered = sorted(found, key=lambda f: rank.index(f.severity))
    return Inspection(name, target, len(subject.nodes), len(subject.pairs), tuple(ordered))


def _finding(check: Check, place: Place, subject: Subject) -> Finding:
    node = place.node
    origin = next((n for n in (node, *subject.around(node)) if scope_of(n)), node)
    return Finding(
        check.rule,
        place.severity or check.severity,
        node.name or "",
        node.op_type,
        scope_of(origin),
        place.what,
        check.why,
        check.fix,
        bool(check.repair),
    )


def _paragraph(found: list[Finding]) -> str:
    first = found[0]
    lines = [f"{first.severity} {first.rule}: {len(found)} place{'' if len(found) == 1 else 's'}"]
    lines += [f"  {f.node} ({f.operator}{', ' + f.torch if f.torch else ''}): {f.what}" for f in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"  and {len(found) - SHOWN} more; --json lists them")
    return "\n".join([*lines, f"  why it matters: {first.why}", f"  fix: {first.fix}"])
