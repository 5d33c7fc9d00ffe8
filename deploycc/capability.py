"""Which formats a build may use: what the precision, a plan or the configuration asks for, against what every target computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycc import registry
from deploycc.core.compatibility import MODES, parse_compatibility
from deploycc.core.errors import UsageError
from deploycc.core.formats import BF16, FORMATS, FP16, FP32, SIMULATIONS, Format
from deploycc.core.target import Target, parse_target
from deploycc.quant.overrides import SECTION, Override

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycc.core.plan import PrecisionPlan


def resolve_targets(texts: Sequence[str]) -> tuple[Target, ...]:
    """Return the targets that ``texts`` name, each with its architectures; without a name, the best that is here.

    Raises:
        UsageError: for an unknown target, or one that cannot build on this machine.
    """
    chosen = [parse_target(text) for text in dict.fromkeys(texts)] or [_default_target()]
    for target in chosen:
        facts = registry.backend(target.backend).doctor()
        if not facts.get("available"):
            raise UsageError(
                f"{target.backend} cannot build here: {facts.get('reason', 'it is not installed')}",
                at=f"--target {target}",
                fix="install it, run on a machine that has it, or use --target tensorrt-rtx, which needs no GPU",
            )
    return tuple(dict.fromkeys(registry.backend(t.backend).resolve(t) for t in chosen))


def _default_target() -> Target:
    """Return ``tensorrt`` where it imports and a GPU is there, else ``tensorrt-rtx``."""
    facts = registry.backend("tensorrt").doctor()
    return Target("tensorrt") if facts.get("available") else Target("tensorrt-rtx")


def formats_of_precision(precision: str, targets: Sequence[Target]) -> tuple[Format, tuple[Format, ...]]:
    """Return the base format and the quantized formats to choose from; refuse what a target lacks (rule X4)."""
    backends = [(registry.backend(t.backend), t) for t in targets]
    on_cpu = all(t.backend == "onnxruntime" for t in targets)
    if precision in SIMULATIONS:
        if not on_cpu:
            raise UsageError(
                "no engine computes in n bits: this precision is a simulation",
                at=f"--precision {precision} --target {', '.join(str(t) for t in targets)}",
                fix="use --target onnxruntime, or --precision mixed for an engine",
            )
        return FP32, ()
    base = {"fp32": FP32, "fp16": FP16, "bf16": BF16}.get(precision, FP32 if on_cpu else FP16)
    wanted = [base] if precision == "mixed" else [base, FORMATS[precision]]
    fix = "choose another precision or target; `deploycc doctor` lists what each target computes"
    _check_native(wanted, targets, at=f"--precision {precision}", fix=fix)
    common = frozenset.intersection(*(b.formats(t) for b, t in backends))
    # Formats in blocks are for those who ask: by the precision, or region by region.
    quantized = tuple(f for f in FORMATS.values() if f.is_quantized and f in common and (not f.block or precision == f.name))
    return base, quantized if precision == "mixed" else tuple(f for f in quantized if f.name == precision)


def formats_of_plan(plan: PrecisionPlan, targets: Sequence[Target], *, at: str) -> tuple[Format, tuple[Format, ...]]:
    """Return the base format and the quantized formats of a plan; refuse what a target lacks (rule X4)."""
    used = [plan.base, *dict.fromkeys(a.format for a in plan.assignments if not a.format.is_simulated)]
    _check_native(used, targets, at=at, fix="build for a target that has it, or edit the plan")
    return plan.base, tuple(f for f in FORMATS.values() if f.is_quantized and f in used)


def formats_on_request(overrides: Sequence[Override], offered: Sequence[Format], targets: Sequence[Target]) -> tuple[Format, ...]:
    """Return the quantized formats that [regions] asks for besides those of the precision; refuse what a target lacks (rule X4)."""
    wanted = [o.format for o in overrides]
    _check_native(wanted, targets, at=f"--config {SECTION}", fix="write another format, or build for a target that has it")
    return tuple(f for f in FORMATS.values() if f.is_quantized and f in wanted and f not in offered)


def check_compatibility(text: str, targets: Sequence[Target]) -> tuple[str, ...]:
    """Return the modes that ``text`` names, as sentences with their costs; refuse a mode that a target does not have.

    Raises:
        UsageError: for an unknown mode, or one that does not exist for a target.
    """
    modes = parse_compatibility(text)
    for target in targets:
        for mode in modes:
            if reason := registry.backend(target.backend).unsupported_mode(target, mode):
                what, _, fix = reason.partition("; ")
                raise UsageError(what, at=f"--compatibility {text} --target {target}", fix=fix)
    return tuple(f"--compatibility {mode}: the engine runs on {MODES[mode].gains}; {MODES[mode].costs}" for mode in modes)


def _check_native(formats: Sequence[Format], targets: Sequence[Target], *, at: str, fix: str) -> None:
    for target in targets:
        backend = registry.backend(target.backend)
        lacking = next((f for f in formats if f not in backend.formats(target)), None)
        if lacking is not None:
            raise UsageError(backend.unsupported_reason(target, lacking), at=f"{at} --target {target}", fix=fix)
