"""What a user decides about regions: ``[regions]`` of a configuration file, patterns of names with a format each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS, FP32, Format

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycc.core.plan import Region

SECTION = "[regions]"
# What no format on request changes: TensorRT computes it otherwise, or it would compute something else.
_FIRM = ("T1", "D2")


@dataclass(frozen=True, slots=True)
class Override:
    """A pattern (``*`` and ``?`` as in file names) and the format of every region that it matches."""

    pattern: str
    format: Format

    @property
    def reason(self) -> str:
        """Return the reason that the plan and ``explain`` show."""
        return f'the configuration says so: {SECTION} "{self.pattern}" = "{self.format}"'

    def matches(self, region: Region) -> bool:
        """Return whether the pattern fits the region's name, its PyTorch module, a parent of that module, or one of its nodes."""
        parts = region.source.split(".")
        modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatchcase(name, self.pattern) for name in (region.name, *modules, *region.nodes))


def parse_overrides(entries: Mapping[str, Any], *, at: str) -> tuple[Override, ...]:
    """Return the overrides of a section ``[regions]``, in its order.

    Raises:
        UsageError: for a format that does not exist.
    """
    for pattern, name in entries.items():
        if name not in FORMATS:
            fix = f'write a pattern and one of {", ".join(FORMATS)}, e.g. "blocks.0.*" = "fp16"'
            raise UsageError(f"unknown format '{name}' for the regions '{pattern}'", at=f"{at} {SECTION}", fix=fix)
    return tuple(Override(pattern, FORMATS[name]) for pattern, name in entries.items())


def settle(regions: Sequence[Region], overrides: Sequence[Override], *, base: Format) -> tuple[tuple[Region, ...], dict[str, Override]]:
    """Return the regions, those with an override restricted to its format, and the override of each; the last one that matches counts.

    Args:
        regions: the partition.
        overrides: what the user decided.
        base: the floating-point format of the build; besides it, FP32 is possible.

    Raises:
        UsageError: when a pattern matches nothing, or a region cannot compute in the format asked for.
    """
    for override in overrides:
        if not any(override.matches(r) for r in regions):
            known = ", ".join(r.source or r.name for r in regions[:8])
            raise UsageError(f"no region matches '{override.pattern}'", at=SECTION, fix=f"the first regions are {known}")
        if not override.format.is_quantized and override.format not in (base, FP32):
            fix = f"use {base}, fp32 or a quantized format, or another --precision"
            raise UsageError(f"the floating-point format of this build is {base}, not {override.format}", at=SECTION, fix=fix)
    chosen = {r.name: found[-1] for r in regions if (found := [o for o in overrides if o.matches(r)])}
    return tuple(_restricted(r, chosen.get(r.name)) for r in regions), chosen


def _restricted(region: Region, override: Override | None) -> Region:
    if override is None:
        return region
    firm = [rule for rule in region.rules if rule in _FIRM]
    if override.format.is_quantized and firm:
        fix = f"leave it out of the pattern '{override.pattern}'"
        raise UsageError(f"'{region.source or region.name}' cannot compute in {override.format} ({firm[0]})", at=SECTION, fix=fix)
    return replace(region, formats=(override.format.name,) if override.format.is_quantized else ())


def islands_of_overrides(regions: Sequence[Region], chosen: Mapping[str, Override], *, base: Format) -> dict[str, str]:
    """Return the nodes that a build in 16 bits keeps in FP32 because the user said so, with the reason."""
    asked = {r: chosen[r.name] for r in regions if r.name in chosen and chosen[r.name].format == FP32 != base}
    return {node: override.reason for region, override in asked.items() for node in region.nodes}
