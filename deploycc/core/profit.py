"""The profit gate of merging: what a candidate costs before and after, and when it is refused.

Cost is counted per position of the final output. A candidate that more than doubles multiplications or parameters is refused
outright; below that, a roofline of one machine decides, and an alternative within three percent keeps the original, unless it has
fewer bytes to move and no more of anything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.core.convolution import Geometry, Refusal
from deploycc.core.machine import MACHINES, roofline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycc.core.machine import Machine

HARD_LIMIT, TIE = 2.0, 0.97
NOMINAL_POSITIONS = 784
_WIDTH = 2  # bytes of an element in FP16


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiplications per output position, parameters, bytes moved by the whole batch, and estimated microseconds."""

    macs: float = 0.0
    parameters: int = 0
    moved: float = 0.0
    microseconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.parameters + other.parameters,
            self.moved + other.moved,
            self.microseconds + other.microseconds,
        )


@dataclass(frozen=True, slots=True)
class Gate:
    """A machine, a batch and the number of positions of the output that is judged."""

    machine: Machine
    batch: int
    positions: int

    def kernel(self, geometry: Geometry, *, times: int = 1, extra: float = 0.0) -> Cost:
        """Return the cost of one kernel that computes ``times`` positions per position of the output, and moves ``extra`` elements."""
        positions = self.batch * self.positions * times
        elements = positions * (geometry.outputs + geometry.inputs * math.prod(geometry.strides)) + geometry.parameters + extra
        time = roofline(self.machine, macs=geometry.macs * positions, peak=self.machine.half, moved=_WIDTH * elements)
        return Cost(geometry.macs * times, geometry.parameters, _WIDTH * elements, time)

    def pointwise(self, geometry: Geometry, *, times: int = 1, parameters: int = 0) -> Cost:
        """Return the cost of reading one more operand in a kernel that is there anyway."""
        moved = float(_WIDTH * (self.batch * self.positions * times * geometry.outputs))
        time = roofline(self.machine, macs=0, peak=self.machine.half, moved=moved) - self.machine.launch
        return Cost(0.0, parameters, moved, time)


def gate(arch: str, batch: int, positions: int | None) -> Gate:
    """Return the gate for an architecture; unknown positions count as 28 x 28."""
    return Gate(MACHINES[arch], batch, positions or NOMINAL_POSITIONS)


def steps_behind(geometries: Sequence[Geometry]) -> list[int]:
    """Return, for each member of a chain, how many of its positions there are per position of the last one."""
    times, found = 1, []
    for geometry in reversed(geometries):
        found.append(times)
        times *= math.prod(geometry.strides)
    return found[::-1]


def refusal(before: Cost, after: Cost) -> Refusal | None:
    """Return the refusal of a candidate that more than doubles multiplications or parameters."""
    for what, old, new in (("multiplications", before.macs, after.macs), ("parameters", before.parameters, after.parameters)):
        if new > HARD_LIMIT * old:
            return Refusal("COST", f"{what} would grow from {old:,.0f} to {new:,.0f} (limit x{HARD_LIMIT:g})")
    return None


def tie(before: Cost, after: Cost) -> Refusal | None:
    """Return the refusal of a candidate that is not estimated to be at least three percent faster, unless it saves and costs nothing."""
    grows = after.macs > before.macs or after.parameters > before.parameters or after.moved >= before.moved
    if after.microseconds < TIE * before.microseconds or not grows:
        return None
    return Refusal("COST", f"no gain: {described(before, after)}")


def described(before: Cost, after: Cost) -> str:
    """Return both costs as the text of a report."""
    ratio = f" (x{after.macs / before.macs:.2f})" if before.macs else ""
    return (
        f"MACs per position {before.macs:,.0f} to {after.macs:,.0f}{ratio}, parameters {before.parameters:,} to {after.parameters:,}, "
        f"bytes {before.moved:,.0f} to {after.moved:,.0f}, estimate {before.microseconds:.1f} to {after.microseconds:.1f} us"
    )
