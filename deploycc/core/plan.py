"""The PrecisionPlan: which region computes in which format and why. A file that people read, compare and edit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS, Format

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = "deploycc.plan/1"


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes that TensorRT fuses into one kernel, and that therefore share one decision.

    ``anchors`` are the weighted nodes (Conv, Gemm, MatMul) whose operands are quantized; ``nodes`` are all members, anchors
    included. ``activations`` are the values quantized when the region is; ``weights`` the constant operands.
    ``residuals`` are skip values that rule P4 quantizes along with the region. ``formats`` are the quantized formats that
    the placement rules allow here, and ``rules`` the ids of those that decided it. ``macs`` and ``activation_elements`` are
    per sample.
    """

    name: str
    kind: str
    anchors: tuple[str, ...]
    nodes: tuple[str, ...]
    activations: tuple[str, ...]
    weights: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    parameters: int = 0
    macs: int = 0
    activation_elements: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The decision for one region, with its reason and the figures behind it."""

    region: Region
    format: Format
    reason: str
    rules: tuple[str, ...] = ()
    noise: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """Every decision about precision for one model.

    ``base`` is the floating-point format of everything that no region covers; ``islands`` maps nodes kept in FP32 to the
    reason. ``scales`` maps an activation to its scale per quantized format (per tensor, symmetric).
    """

    base: Format
    assignments: tuple[Assignment, ...]
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    islands: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    def format_of(self, node: str) -> Format:
        """Return the format in which a node computes."""
        if node in self.islands:
            return FORMATS["fp32"]
        for assignment in self.assignments:
            if node in assignment.region.nodes:
                return assignment.format
        return self.base

    def count(self) -> dict[str, int]:
        """Return the number of regions per format."""
        return dict(sorted(Counter(a.format.name for a in self.assignments).items()))

    def average_bits(self) -> float:
        """Return the mean number of bits per weight over all regions, weighted by parameters."""
        parameters = sum(a.region.parameters for a in self.assignments)
        bits = sum(a.region.parameters * a.format.bits for a in self.assignments)
        return bits / parameters if parameters else float(self.base.bits)

    def to_json(self) -> str:
        """Return the plan as indented JSON with a final newline: same plan, same bytes."""
        body = {
            "schema": SCHEMA,
            "model": self.model,
            "base": self.base.name,
            "average_bits": round(self.average_bits(), 4),
            "regions": [_assignment_json(a) for a in self.assignments],
            "scales": {name: dict(sorted(by.items())) for name, by in sorted(self.scales.items())},
            "islands": dict(sorted(self.islands.items())),
        }
        return json.dumps(body, indent=1, sort_keys=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, at: str = "plan.json") -> PrecisionPlan:
        """Read a plan.

        Raises:
            UsageError: when the text is not a plan of this schema, naming the field.
        """
        try:
            body = json.loads(text)
            if body.get("schema") != SCHEMA:
                raise UsageError(f"this is not a plan of schema {SCHEMA}", at=at, fix="use the plan.json of a build directory")
            return cls(
                base=_format(body["base"], at),
                assignments=tuple(_assignment(entry, at) for entry in body["regions"]),
                scales=body["scales"],
                islands=body["islands"],
                model=body.get("model", ""),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"the plan cannot be read: {type(error).__name__}: {error}", at=at, fix="start from the plan.json of a build directory"
            ) from error


def _assignment_json(assignment: Assignment) -> dict[str, Any]:
    region = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(assignment.region).items()}
    name = region.pop("name")
    return {
        "name": name,
        "format": assignment.format.name,
        "reason": assignment.reason,
        "decided_by": list(assignment.rules),
        "noise": {k: float(f"{v:.6g}") for k, v in sorted(assignment.noise.items())},
        **region,
    }


def _assignment(entry: dict[str, Any], at: str) -> Assignment:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k in Region.__dataclass_fields__}
    region = Region(**values)
    return Assignment(region, _format(entry["format"], at), entry["reason"], tuple(entry["decided_by"]), entry["noise"])


def _format(name: str, at: str) -> Format:
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'", at=at, fix=f"formats: {', '.join(FORMATS)}")
    return FORMATS[name]
