"""A roofline estimate of latency per region and format, and of the conversions between them. An estimate: reports always call it so.

The roofline and its peak figures are those of ``deploycc.core.machine``. It ranks formats; it does not predict milliseconds.

A region writes its output once. It writes codes where it computes in their format and nothing but regions in that format reads them;
else it writes floating point, and a kernel of its own converts it for each format that is read. What other nodes compute costs nothing
to quantize, since TensorRT fuses QuantizeLinear into them.

TensorRT-RTX fuses nothing behind a convolution or a matrix product of codes, as the listings of its engines show: the one writes FP32,
the other 16 bits, and a kernel of its own adds the bias, applies the activation and writes whatever is read, codes or floating point.

See: docs/adr/0008-conversions-cost-kernels.md, measured by benchmarks/kernels.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.core.formats import FORMATS, INT8, Format
from deploycc.core.machine import CPU, MACHINES, Machine, roofline

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from deploycc.core.plan import Crossing, Region
    from deploycc.core.target import Target


_ACTIVATION_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.5, "fp8": 1.5, "int4": 2.0, "nvfp4": 1.5, "mxfp8": 1.5}
# Whose peak counts where it is not that of the format's own name: INT4 weights are multiplied in 16 bits.
_PEAK = {"fp16": "half", "bf16": "half", "int4": "half", "nvfp4": "fp4", "mxfp8": "fp8"}
# Read in 16 bits, written in 8.
_CONVERTED_BYTES = 3.0
# What TensorRT-RTX writes behind products of codes, per element.
_UNFUSED_BYTES = {"conv": 4.0, "conv_transpose": 4.0, "linear": 2.0}


@dataclass(frozen=True, slots=True)
class Boundary:
    """A value that ``producer`` writes and the regions ``readers`` may quantize; ``shared`` where something else reads it as well.

    ``microseconds`` is the estimate for one conversion of it. ``is_apart`` says that a producer in 8 bits has a kernel of its own behind
    it, which converts as well.
    """

    value: str
    producer: str
    readers: tuple[str, ...]
    shared: bool
    microseconds: float
    is_apart: bool = False

    @property
    def regions(self) -> tuple[str, ...]:
        """Return the names of all regions at this boundary."""
        return (self.producer, *self.readers)

    def conversions(self, formats: Mapping[str, Format]) -> tuple[str, ...]:
        """Return the formats into which a kernel of its own converts the value, with each region in its format of ``formats``."""
        read, own = dict.fromkeys(_codes(formats[r]) for r in self.readers), _codes(formats[self.producer])
        is_written = own if self.is_apart else not self.shared and len(read) == 1 and own in read
        return () if is_written else tuple(f for f in read if f)

    def cost(self, formats: Mapping[str, Format]) -> float:
        """Return the estimated microseconds of all conversions of the value."""
        return self.microseconds * len(self.conversions(formats))


def _codes(format: Format) -> str:
    """Return the format of the codes that a region in ``format`` reads, '' where it reads floating point."""
    return format.name if format.codes_activations else ""


def machine_of(target: Target) -> Machine:
    """Return the machine of the target's first architecture (the oldest when there are several)."""
    return MACHINES[target.archs[0]] if target.archs else (CPU if target.backend == "onnxruntime" else MACHINES["sm_80"])


def estimate(region: Region, format: Format, machine: Machine, *, batch: int, apart: bool = False) -> float:
    """Return the estimated microseconds of ``region`` in ``format`` at ``batch``; ``apart`` if nothing is fused behind it."""
    peak = float(getattr(machine, _PEAK.get(format.name, format.name))) or machine.half
    moved = region.parameters * format.weight_bits / 8 + region.activation_elements * batch * _ACTIVATION_BYTES[format.name]
    if not apart:
        return roofline(machine, macs=region.macs * batch, peak=peak, moved=moved)
    written = (region.output_elements or region.activation_elements // 2) * batch  # Older plans do not say.
    between, after = _UNFUSED_BYTES[region.kind], _ACTIVATION_BYTES[format.name]
    behind = roofline(machine, macs=0.0, peak=machine.half, moved=written * (between + after))
    moved += written * (between - after)
    return roofline(machine, macs=region.macs * batch, peak=peak, moved=moved) + behind


def estimate_all(regions: Sequence[Region], target: Target, *, batch: int) -> dict[str, dict[str, float]]:
    """Return microseconds per region and format name."""
    machine = machine_of(target)
    return {r.name: {f.name: estimate(r, f, machine, batch=batch, apart=is_apart(r, f, target)) for f in FORMATS.values()} for r in regions}


def is_apart(region: Region, format: Format, target: Target) -> bool:
    """Return whether bias, activation and conversion behind ``region`` in ``format`` are a kernel of their own."""
    return target.backend == "tensorrt-rtx" and region.kind in _UNFUSED_BYTES and bool(_codes(format))


def boundaries(regions: Sequence[Region], target: Target, *, batch: int) -> tuple[Boundary, ...]:
    """Return where regions read what other regions write."""
    machine = machine_of(target)
    apart = {region.name: is_apart(region, INT8, target) for region in regions}
    readers: dict[Crossing, list[str]] = {}
    for region in regions:
        for crossing in region.crossings:
            readers.setdefault(crossing, []).append(region.name)
    return tuple(
        Boundary(c.value, c.producer, tuple(names), c.shared, _conversion(c, machine, batch), apart[c.producer])
        for c, names in readers.items()
    )


def _conversion(crossing: Crossing, machine: Machine, batch: int) -> float:
    return roofline(machine, macs=0.0, peak=machine.half, moved=crossing.elements * batch * _CONVERTED_BYTES)


def total(costs: Mapping[str, Mapping[str, float]], borders: Iterable[Boundary], formats: Mapping[str, Format]) -> float:
    """Return the estimated microseconds of all regions, each in its format of ``formats``, and of the conversions between them."""
    return sum(costs[name][f.name] for name, f in formats.items()) + sum(b.cost(formats) for b in borders)
