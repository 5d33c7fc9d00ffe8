"""A roofline estimate of latency per region and format. An estimate: reports always call it so.

``t = max(2 MACs / peak, bytes / bandwidth) + launch``, with public peak figures of one GPU per architecture and half of them
assumed reachable. It ranks formats; it does not predict milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.core.formats import FORMATS, Format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycc.core.plan import Region
    from deploycc.core.target import Target


@dataclass(frozen=True, slots=True)
class Machine:
    """Dense peaks in TFLOP/s or TOP/s, memory bandwidth in GB/s, and the cost of one kernel in microseconds."""

    name: str
    fp32: float
    half: float
    int8: float
    fp8: float
    bandwidth: float
    launch: float = 2.0


MACHINES = {
    "sm_75": Machine("T4", 8.1, 65, 130, 65, 320),
    "sm_80": Machine("A100", 156, 312, 624, 312, 1555),
    "sm_86": Machine("A10", 62.5, 125, 250, 125, 600),
    "sm_87": Machine("Orin", 10.6, 85, 170, 85, 204),
    "sm_89": Machine("L4", 60, 121, 242, 242, 300),
    "sm_90": Machine("H100", 494, 989, 1979, 1979, 3350),
    "sm_100": Machine("B200", 1100, 2250, 4500, 4500, 8000),
    "sm_103": Machine("B300", 1100, 2500, 4500, 4500, 8000),
    "sm_110": Machine("Thor", 64, 258, 517, 517, 273),
    "sm_120": Machine("RTX 5090", 105, 210, 838, 419, 1792),
    "sm_121": Machine("GB10", 31, 62, 250, 125, 273),
}
CPU = Machine("CPU with VNNI", 1, 1, 3, 1, 40, launch=5.0)
REACHABLE = 0.5
_ACTIVATION_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.5, "fp8": 1.5}


def machine_of(target: Target) -> Machine:
    """Return the machine of the target's first architecture (the oldest when there are several)."""
    return MACHINES[target.archs[0]] if target.archs else (CPU if target.backend == "onnxruntime" else MACHINES["sm_80"])


def estimate(region: Region, format: Format, machine: Machine, *, batch: int) -> float:
    """Return the estimated microseconds of ``region`` in ``format`` at ``batch``."""
    peak = {"fp32": machine.fp32, "fp16": machine.half, "bf16": machine.half, "int8": machine.int8, "fp8": machine.fp8}[format.name]
    compute = 2.0 * region.macs * batch / (peak * 1e12 * REACHABLE)
    moved = region.parameters * format.bits / 8 + region.activation_elements * batch * _ACTIVATION_BYTES[format.name]
    return 1e6 * max(compute, moved / (machine.bandwidth * 1e9 * REACHABLE)) + machine.launch


def estimate_all(regions: Sequence[Region], target: Target, *, batch: int) -> dict[str, dict[str, float]]:
    """Return microseconds per region and format name."""
    machine = machine_of(target)
    return {r.name: {f.name: estimate(r, f, machine, batch=batch) for f in FORMATS.values()} for r in regions}
