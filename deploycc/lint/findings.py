"""What a rule found, and the decorator that makes a function a rule of the lint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from deploycc.core.rules import RULES

if TYPE_CHECKING:
    from deploycc.lint.subject import Subject

Severity = Literal["error", "warning", "note"]
SEVERITIES: dict[Severity, str] = {
    "error": "TensorRT refuses the file, computes other numbers, or computes in floating point what the file asks for in 8 bits",
    "warning": "it works and costs time: a lost fusion, an extra kernel, a conversion",
    "note": "worth knowing; often a matter of choice",
}


@dataclass(frozen=True, slots=True)
class Place:
    """What a check yields: a node and what is the matter there; ``severity`` where it differs from that of the rule."""

    node: ir.Node
    what: str
    severity: Severity | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: the rule, how bad it is, where, what it is, why it costs, how to fix it, and whether ``--fix`` does so."""

    rule: str
    severity: Severity
    node: str
    operator: str
    torch: str
    what: str
    why: str
    fix: str
    fixable: bool


@dataclass(frozen=True, slots=True)
class Check:
    """A rule that can be seen in a graph: ``find`` yields its violations."""

    rule: str
    severity: Severity
    why: str
    fix: str
    repair: str
    find: Callable[[Subject], Iterator[Place]]


CHECKS: dict[str, Check] = {}


def rule(
    name: str, severity: Severity, *, why: str, fix: str, repair: str = ""
) -> Callable[[Callable[[Subject], Iterator[Place]]], Callable[[Subject], Iterator[Place]]]:
    """Register the decorated function as the check of the rule ``name``.

    Args:
        name: an id of ``deploycc.core.rules``.
        severity: of its findings, unless a place says otherwise.
        why: what a violation costs.
        fix: what to do about it.
        repair: the entry of ``deploycc.lint.repair`` that ``--fix`` applies, or an empty string.

    Raises:
        KeyError: for an unknown id, or one that has a check already.
    """
    if name not in RULES or name in CHECKS:
        raise KeyError(f"the rule {name} is unknown or has a check already")

    def register(find: Callable[[Subject], Iterator[Place]]) -> Callable[[Subject], Iterator[Place]]:
        CHECKS[name] = Check(name, severity, why, fix, repair, find)
        return find

    return register
