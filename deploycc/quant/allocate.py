"""Choose one format per region: an exact integer program, solved by HiGHS.

Without a bound on the error: least noise, subject to bits, size and estimated latency. With one: least latency, subject to the
noise bound as well. Noise of single regions is taken to add up, which verification checks afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from deploycc.core.errors import BudgetError
from deploycc.core.formats import FORMATS, Format
from deploycc.core.plan import Assignment, Region

if TYPE_CHECKING:
    from deploycc.core.budget import Budget

DEFAULT_BITS = 10.0
DEFAULT_LATENCY_SLACK = 1.15
Costs = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to compute one region."""

    region: int
    format: Format
    noise: float
    latency: float
    bits: float


def uniform(regions: Sequence[Region], format: Format, base: Format, noise: Costs) -> tuple[Assignment, ...]:
    """Return ``format`` wherever the rules allow it and ``base`` elsewhere."""
    chosen = []
    for region in regions:
        if not format.is_quantized or format.name in region.formats:
            reason = f"--precision {format.name}" if format.is_quantized else f"the base format {base.name}"
            chosen.append(Assignment(region, format, reason, ("X3",), noise.get(region.name, {})))
        else:
            chosen.append(
                Assignment(
                    region, base, f"{format.name} is excluded here by {', '.join(region.rules)}", region.rules, noise.get(region.name, {})
                )
            )
    return tuple(chosen)


def allocate(
    regions: Sequence[Region],
    formats: Sequence[Format],
    base: Format,
    *,
    noise: Costs,
    latency: Costs,
    budget: Budget,
    noise_bound: float | None,
) -> tuple[Assignment, ...]:
    """Return the optimal assignment.

    Args:
        regions: the decision units.
        formats: quantized formats that every target computes natively.
        base: the floating-point format that is always possible.
        noise: noise-to-signal ratio at the outputs per region and format (the base counts as 0).
        latency: estimated microseconds per region and format.
        budget: bounds on bits, size and latency.
        noise_bound: the largest sum of noise; None to minimise noise instead.

    Raises:
        BudgetError: when no assignment meets the bounds, saying what the best possible value is.
    """
    if not regions:
        return ()
    choices = _choices(regions, formats, base, noise, latency)
    bounds = _bounds(choices, regions, base, latency, budget, noise_bound)
    picked = _solve(choices, len(regions), bounds, minimise="latency" if noise_bound is not None else "noise")
    if picked is None:
        raise BudgetError(
            _infeasible(choices, bounds), at=f"--budget {budget}", fix="relax that bound, or allow more formats by another --target"
        )
    return tuple(_explained(choices, choice, regions, noise, base, limited=noise_bound is not None) for choice in picked)


def _choices(regions: Sequence[Region], formats: Sequence[Format], base: Format, noise: Costs, latency: Costs) -> list[Choice]:
    found = []
    for i, region in enumerate(regions):
        found.append(Choice(i, base, 0.0, latency[region.name][base.name], region.parameters * base.bits))
        for format in formats:
            if format.name in region.formats:
                found.append(
                    Choice(i, format, noise[region.name][format.name], latency[region.name][format.name], region.parameters * format.bits)
                )
    return found


def _bounds(
    choices: Sequence[Choice], regions: Sequence[Region], base: Format, latency: Costs, budget: Budget, noise_bound: float | None
) -> dict[str, float]:
    parameters = sum(r.parameters for r in regions)
    all_base = sum(latency[r.name][base.name] for r in regions)
    fastest = sum(min(c.latency for c in choices if c.region == i) for i in range(len(regions)))
    smallest = sum(min(c.bits for c in choices if c.region == i) for i in range(len(regions)))
    bounds = {}
    bits = budget.bits if budget.bits is not None else (DEFAULT_BITS if not budget.bounds_error and budget.size is None else None)
    if bits is not None:
        allowed = bits * parameters
        bounds["bits"] = allowed if budget.bits is not None else max(allowed, smallest)
    if budget.size is not None:
        bounds["bits"] = min(bounds.get("bits", np.inf), budget.size * parameters * base.bits)
    if budget.latency is not None:
        bounds["latency"] = budget.latency * all_base
    elif noise_bound is None:
        bounds["latency"] = DEFAULT_LATENCY_SLACK * fastest
    if noise_bound is not None:
        bounds["noise"] = noise_bound
    return bounds


def _solve(choices: Sequence[Choice], count: int, bounds: Mapping[str, float], *, minimise: str) -> list[Choice] | None:
    """Minimise one quantity (the other breaks ties) with one choice per region."""
    columns = {name: np.array([getattr(c, name) for c in choices]) for name in ("noise", "latency", "bits")}
    scale = {name: max(float(np.abs(column).sum()), 1e-30) for name, column in columns.items()}
    other = "latency" if minimise == "noise" else "noise"
    objective = columns[minimise] / scale[minimise] + 1e-6 * columns[other] / scale[other]
    rows = coo_matrix((np.ones(len(choices)), ([c.region for c in choices], range(len(choices)))), shape=(count, len(choices)))
    constraints = [LinearConstraint(rows.tocsr(), 1, 1)]
    for name, bound in bounds.items():
        limit = max(abs(bound), 1e-30)
        constraints.append(LinearConstraint(columns[name][None] / limit, -np.inf, bound / limit * (1 + 1e-9)))
    result = milp(objective, constraints=constraints, integrality=np.ones(len(choices)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0})
    if result.x is None:
        return None
    return [c for c, x in zip(choices, result.x, strict=True) if x > 0.5]


def _infeasible(choices: Sequence[Choice], bounds: Mapping[str, float]) -> str:
    units = {"bits": "bits of weights", "latency": "microseconds (estimated)", "noise": "noise-to-signal"}
    regions = {c.region for c in choices}
    for name, bound in bounds.items():
        best = sum(min(getattr(c, name) for c in choices if c.region == r) for r in regions)
        if best > bound * (1 + 1e-9):
            return f"no plan reaches {bound:.4g} {units[name]}; the least possible is {best:.4g}"
    return "no plan meets all bounds at once, though each can be met alone"


def _explained(
    choices: Sequence[Choice], choice: Choice, regions: Sequence[Region], noise: Costs, base: Format, *, limited: bool
) -> Assignment:
    region = regions[choice.region]
    figures = noise.get(region.name, {})
    alternatives = [c for c in choices if c.region == choice.region and c is not choice]
    if not alternatives:
        why = f"only {base.name} is allowed here by {', '.join(region.rules) or 'the target'}"
        return Assignment(region, choice.format, why, region.rules, figures)
    saved = FORMATS[base.name]
    base_choice = next(c for c in choices if c.region == choice.region and c.format == saved)
    if choice.format == base:
        worst = min(c.noise for c in alternatives)
        why = f"kept in {base.name}: quantizing would add {_db(worst)} of noise, more than it saves is worth under the budget"
    else:
        gain = base_choice.latency - choice.latency
        size = int(base_choice.bits - choice.bits) // 8
        why = f"{choice.format.name}: saves an estimated {gain:.2f} us and {size} bytes for {_db(choice.noise)} of noise"
    return Assignment(region, choice.format, why + (" (least time within the error bound)" if limited else ""), ("X3",), figures)


def _db(noise: float) -> str:
    return f"{10 * np.log10(noise):.1f} dB" if noise > 0 else "no"
