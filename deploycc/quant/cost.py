"""A roofline estimate of latency per region and format. An estimate: reports always call it so.

The roofline and its peak figures are those of ``deploycc.core.machine``. It ranks formats; it does not predict milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycc.core.formats import FORMATS, Format
from deploycc.core.machine import CPU, MACHINES, Machine, roofline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycc.core.plan import Region
    from deploycc.core.target import Target


_ACTIVATION_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.5, "fp8": 1.5, "int4": 2.0, "nvfp4": 1.5, "mxfp8": 1.5}
# Whose peak counts where it is not that of the format's own name: INT4 weights are multiplied in 16 bits.
_PEAK = {"fp16": "half", "bf16": "half", "int4": "half", "nvfp4": "fp4", "mxfp8": "fp8"}


def machine_of(target: Target) -> Machine:
    """Return the machine of the target's first architecture (the oldest when there are several)."""
    return MACHINES[target.archs[0]] if target.archs else (CPU if target.backend == "onnxruntime" else MACHINES["sm_80"])


def estimate(region: Region, format: Format, machine: Machine, *, batch: int) -> float:
    """Return the estimated microseconds of ``region`` in ``format`` at ``batch``."""
    peak = float(getattr(machine, _PEAK.get(format.name, format.name))) or machine.half
    moved = region.parameters * format.weight_bits / 8 + region.activation_elements * batch * _ACTIVATION_BYTES[format.name]
    return roofline(machine, macs=region.macs * batch, peak=peak, moved=moved)


def estimate_all(regions: Sequence[Region], target: Target, *, batch: int) -> dict[str, dict[str, float]]:
    """Return microseconds per region and format name."""
    machine = machine_of(target)
    return {r.name: {f.name: estimate(r, f, machine, batch=batch) for f in FORMATS.values()} for r in regions}
