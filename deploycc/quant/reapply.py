"""Does a plan from a file fit a model? If not, say what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycc.core.errors import UsageError
from deploycc.core.formats import FP32
from deploycc.quant.regions import partition

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.plan import Assignment, PrecisionPlan, Region

SHOWN = 3


def check_fit(
    plan: PrecisionPlan, model: ir.Model, *, digest: str, at: str, samples_codes: bool = False, batch: int = 0
) -> tuple[Region, ...]:
    """Return the regions of the CANONICAL graph ``model``; raise UsageError, saying what differs, when ``plan`` cannot be applied to it.

    A plan whose ``model`` is empty is applied to any graph with the same regions.

    Args:
        plan: as read from its file.
        model: the CANONICAL graph.
        digest: of that graph.
        at: the file, for the message.
        samples_codes: as for `partition`.
        batch: as for `partition`.
    """
    found = {r.name: r for r in partition(model, samples_codes=samples_codes, batch=batch)}
    planned = {a.region.name: a for a in plan.assignments}
    missing, extra = [n for n in planned if n not in found], [n for n in found if n not in planned]
    if missing or extra:
        sides = ((missing, "of the plan are missing in the model"), (extra, "of the model are missing in the plan"))
        parts = [f"{len(names)} regions {what} ({_some(names)})" for names, what in sides if names]
        raise UsageError(f"the plan is for another model: {' and '.join(parts)}", at=at, fix="use the plan of a build of this model")
    changed = [f"'{name}' has other {what}" for name, a in planned.items() if (what := _difference(a.region, found[name]))]
    if changed:
        raise UsageError(f"the plan is for another model: {'; '.join(changed[:SHOWN])}", at=at, fix="use the plan of a build of this model")
    if plan.model and plan.model != digest:
        raise UsageError(
            "the plan is for a model with the same regions and other weights or constants",
            at=at,
            fix='calibrate again with --precision, or write "model": "" in the plan to use its scales nonetheless',
        )
    for assignment in plan.assignments:
        _check_format(assignment, plan, at)
    return tuple(found.values())


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _difference(planned: Region, found: Region) -> str:
    """Return which of the names that insertion goes by differ, '' where none does; names of weights change as they are rescaled."""
    fields = ("anchors", "nodes", "activations", "residuals")
    return next((name for name in fields if tuple(getattr(planned, name)) != tuple(getattr(found, name))), "")


def _check_format(assignment: Assignment, plan: PrecisionPlan, at: str) -> None:
    """Refuse a format that the rules exclude in this region, or for which the plan has no scales."""
    region, format = assignment.region, assignment.format
    if format.is_simulated or format == plan.base:
        return
    if not format.is_quantized:
        if format != FP32 or not set(region.nodes) <= set(plan.islands):
            fix = f'use {plan.base}, or name its nodes under "islands" for fp32'
            raise UsageError(f"'{region.name}' is planned in {format}, the plan's base is {plan.base}", at=at, fix=fix)
        return
    if format.name not in region.formats:
        allowed = ", ".join((*region.formats, plan.base.name))
        excluded = f" by {', '.join(region.rules)}" if region.rules else ""
        raise UsageError(f"{format} is not allowed in '{region.name}'{excluded}", at=at, fix=f"use one of {allowed}")
    for value in (*region.activations, *region.residuals) if format.reach is not None else ():
        if format.name not in plan.scales.get(value, {}):
            raise UsageError(
                f"the plan has no {format} scale for '{value}', which '{region.name}' reads",
                at=at,
                fix=f'write it under "scales", or calibrate again with {format} for this region under [regions] in --config',
            )
