"""Public peak figures of one machine per architecture, and the roofline over them.

``t = max(operations / peak, bytes / bandwidth) + launch``, with half of either peak assumed reachable. It ranks alternatives; it does
not predict milliseconds, and reports always call it an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

REACHABLE = 0.5


@dataclass(frozen=True, slots=True)
class Machine:
    """Dense peaks in TFLOP/s or TOP/s (0: none), memory bandwidth in GB/s, and the cost of one kernel in microseconds."""

    name: str
    fp32: float
    half: float
    int8: float
    fp8: float
    bandwidth: float
    fp4: float = 0.0
    launch: float = 2.0


MACHINES = {
    "sm_75": Machine("T4", 8.1, 65, 130, 65, 320),
    "sm_80": Machine("A100", 156, 312, 624, 312, 1555),
    "sm_86": Machine("A10", 62.5, 125, 250, 125, 600),
    "sm_87": Machine("Orin", 10.6, 85, 170, 85, 204),
    "sm_89": Machine("L4", 60, 121, 242, 242, 300),
    "sm_90": Machine("H100", 494, 989, 1979, 1979, 3350),
    "sm_100": Machine("B200", 1100, 2250, 4500, 4500, 8000, 9000),
    "sm_103": Machine("B300", 1100, 2500, 4500, 4500, 8000, 13500),
    "sm_110": Machine("Thor", 64, 258, 517, 517, 273, 1035),
    "sm_120": Machine("RTX 5090", 105, 210, 838, 419, 1792, 1676),
    "sm_121": Machine("GB10", 31, 62, 250, 125, 273, 500),
}
CPU = Machine("CPU with VNNI", 1, 1, 3, 1, 40, launch=5.0)


def roofline(machine: Machine, *, macs: float, peak: float, moved: float) -> float:
    """Return the estimated microseconds of one kernel that computes ``macs`` at ``peak`` TOP/s and moves ``moved`` bytes."""
    compute = 2.0 * macs / (peak * 1e12 * REACHABLE)
    return 1e6 * max(compute, moved / (machine.bandwidth * 1e9 * REACHABLE)) + machine.launch
