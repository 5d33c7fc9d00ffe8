"""The PrecisionPlan: which region computes in which format and why. A file that people read, compare and edit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS, SIMULATED, Format
from deploycc.core.rescaling import Rescale
from deploycc.core.simulation import Quantizer, quantizer_from_json

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = "deploycc.plan/1"


@dataclass(frozen=True, slots=True)
class Crossing:
    """What a region quantizes and the region ``producer`` computes, with at most moves of elements between the two.

    ``value`` is as the producer writes it, ``elements`` are counted per sample, and ``shared`` says that something else reads it which
    takes no codes.
    """

    value: str
    producer: str
    elements: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes that TensorRT fuses into one kernel, and that therefore share one decision.

    ``anchors`` are the weighted nodes (Conv, Gemm, MatMul) whose operands are quantized; ``nodes`` are all members, anchors
    included. ``activations`` are the values quantized when the region is; ``weights`` the constant operands.
    ``residuals`` are skip values that rule P4 quantizes along with the region. ``formats`` are the quantized formats that
    the placement rules allow here, and ``rules`` the ids of those that decided it. ``macs``, ``activation_elements`` (read and
    written) and ``output_elements`` are per sample. ``crossings`` are those of its quantized values that come straight from other regions.
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
    output_elements: int = 0
    source: str = ""
    crossings: tuple[Crossing, ...] = ()


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
    reason. ``scales`` maps an activation to its scale per quantized format (per tensor, symmetric). ``rescales`` maps a normalization
    to the scale and shift per channel that move into its readers before anything is quantized. ``quantizers`` maps an activation
    to its quantizer per simulated format (paper mode).
    ``calibration`` names the way in which INT8 scales were chosen, empty where nothing was calibrated.
    ``rounded_on`` is the digest of the data on which weights are rounded for the outputs of their layers, empty where they go to their
    nearest codes. ``scored_by`` names the way in which regions were scored (``--sensitivity``), empty where they were not.
    """

    base: Format
    assignments: tuple[Assignment, ...]
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    islands: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    rescales: Mapping[str, Rescale] = field(default_factory=dict)
    quantizers: Mapping[str, Mapping[str, Quantizer]] = field(default_factory=dict)
    rounded_on: str = ""
    calibration: str = ""
    scored_by: str = ""

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
        bits = sum(a.region.parameters * a.format.weight_bits for a in self.assignments)
        return bits / parameters if parameters else self.base.weight_bits

    def to_json(self) -> str:
        """Return the plan as indented JSON with a final newline: same plan, same bytes."""
        body = {
            "schema": SCHEMA,
            "model": self.model,
            "base": self.base.name,
            "calibration": self.calibration,
            "rounded_on": self.rounded_on,
            "scored_by": self.scored_by,
            "average_bits": round(self.average_bits(), 4),
            "regions": [_assignment_json(a) for a in self.assignments],
            "scales": {name: dict(sorted(by.items())) for name, by in sorted(self.scales.items())},
            "islands": dict(sorted(self.islands.items())),
            "rescales": {name: _rescale_json(rescale) for name, rescale in sorted(self.rescales.items())},
        }
        if self.quantizers:
            body["quantizers"] = {v: {f: q.to_json() for f, q in sorted(by.items())} for v, by in sorted(self.quantizers.items())}
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
            assignments = tuple(_assignment(entry, at) for entry in body["regions"])
            names = {a.region.name for a in assignments}
            if lost := [c.producer for a in assignments for c in a.region.crossings if c.producer not in names]:
                raise ValueError(f"no region is named '{lost[0]}'")
            return cls(
                base=_format(body["base"], at),
                assignments=assignments,
                scales=body["scales"],
                islands=body["islands"],
                model=body.get("model", ""),
                rounded_on=body.get("rounded_on", ""),
                calibration=body.get("calibration", ""),
                scored_by=body.get("scored_by", ""),
                rescales={name: _rescale(entry) for name, entry in body.get("rescales", {}).items()},
                quantizers={v: {f: quantizer_from_json(q) for f, q in by.items()} for v, by in body.get("quantizers", {}).items()},
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
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
    values["crossings"] = tuple(_crossing(**crossing) for crossing in values.get("crossings", ()))
    region = Region(**values)
    return Assignment(region, _format(entry["format"], at), entry["reason"], tuple(entry["decided_by"]), entry["noise"])


def _crossing(value: str, producer: str, elements: int, shared: bool = False) -> Crossing:
    kinds = ((value, str), (producer, str), (elements, int), (shared, bool))
    if not all(type(found) is kind for found, kind in kinds) or elements < 0:
        raise ValueError(f"a crossing has a value, a producer, elements and whether it is shared, not {[found for found, _ in kinds]}")
    return Crossing(value, producer, elements, shared)


def _rescale_json(rescale: Rescale) -> dict[str, Any]:
    """Return the numbers of all channels in one line each, with as many digits as they need to be read back."""
    numbers = {
        name: " ".join(repr(v).removesuffix(".0") for v in values) for name, values in (("scale", rescale.scale), ("shift", rescale.shift))
    }
    return {"k": rescale.k, "gain_db": rescale.gain_db, **numbers}


def _rescale(entry: dict[str, Any]) -> Rescale:
    scale, shift = (tuple(float(v) for v in entry[name].split()) for name in ("scale", "shift"))
    return Rescale(scale, shift, entry.get("k", 0.0), entry.get("gain_db", 0.0))


def _format(name: str, at: str) -> Format:
    if name not in (known := {**FORMATS, **SIMULATED}):
        raise UsageError(f"unknown format '{name}'", at=at, fix=f"formats: {', '.join(known)}")
    return known[name]
