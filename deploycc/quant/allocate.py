"""Choose one format per region: an exact integer program, solved by HiGHS.

Without a bound on the error: least noise, subject to bits, size and estimated latency. With one: least latency, subject to the
noise bound as well. Noise of single regions is taken to add up, which verification checks afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import le
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from deploycc.core.budget import Budget
from deploycc.core.errors import BudgetError
from deploycc.core.plan import Assignment, Region

if TYPE_CHECKING:
    from deploycc.core.formats import Format

DEFAULT_BITS = 10.0
DEFAULT_LATENCY_SLACK = 1.15
_ROUNDING = 1e-9
_GAP = 1e-6
Costs = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to compute one region."""

    region: int
    format: Format
    noise: float
    latency: float
    bits: float
    bops: float


def uniform(regions: Sequence[Region], format: Format, base: Format, noise: Costs) -> tuple[Assignment, ...]:
    """Return ``format`` wherever the rules allow it and ``base`` elsewhere."""
    chosen = []
    for region in regions:
        if not format.is_quantized or format.name in region.formats:
            reason = f"--precision {format.name}" if format.is_quantized else f"the base format {base.name}"
            chosen.append(Assignment(region, format, reason, ("X3",), noise.get(region.name, {})))
        else:
            # What has no weight in blocks is excluded by R6, whatever other rules say of other formats.
            rules = region.rules if not format.block or region.kind == "linear" else ("R6",)
            why = f"{format.name} is excluded here by {', '.join(rules)}"
            chosen.append(Assignment(region, base, why, rules, noise.get(region.name, {})))
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
    forced: Mapping[str, Format] | None = None,
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
        forced: regions whose format is decided already.

    Raises:
        BudgetError: when no assignment meets the bounds, saying what the best possible value is.
    """
    if not regions:
        return ()
    choices = _choices(regions, formats, base, noise, latency, forced or {})
    bounds = _bounds(choices, regions, base, latency, budget, noise_bound)
    picked = _solve(choices, len(regions), bounds, minimise="latency" if noise_bound is not None else "noise")
    if picked is None:
        raise BudgetError(
            _infeasible(choices, bounds, base, budget),
            at=f"--budget {budget}",
            fix="relax that bound, or allow more formats by another --target",
        )
    return tuple(_explained(choices, choice, regions, noise, base, limited=noise_bound is not None) for choice in picked)


def pareto_front(
    regions: Sequence[Region], formats: Sequence[Format], base: Format, *, noise: Costs, latency: Costs, points: int = 12
) -> list[tuple[Assignment, ...]]:
    """Return assignments from the fastest to the least noisy, none of which another beats in both; at most ``points``.

    For each of ``points`` bounds on latency, evenly spaced from the fastest possible to the base format's, the least noise is taken.
    """
    if not regions:
        return []
    all_base = sum(latency[r.name][base.name] for r in regions)
    fastest = sum(min(latency[r.name][f.name] for f in (base, *formats) if f == base or f.name in r.formats) for r in regions)
    front: list[tuple[Assignment, ...]] = []
    least = np.inf
    for bound in np.linspace(fastest, max(all_base, fastest), points):
        budget = Budget(bits=float(max(f.bits for f in (base, *formats))), latency=float(bound) / all_base)
        found = allocate(regions, formats, base, noise=noise, latency=latency, budget=budget, noise_bound=None)
        total = sum(noise[a.region.name].get(a.format.name, 0.0) for a in found)
        if total < least:
            front.append(found)
            least = total
    return front


def _choices(
    regions: Sequence[Region], formats: Sequence[Format], base: Format, noise: Costs, latency: Costs, forced: Mapping[str, Format]
) -> list[Choice]:
    found = []
    for i, region in enumerate(regions):
        float_format = forced.get(region.name, base)
        if not float_format.is_quantized:
            found.append(_choice(i, region, float_format, base, 0.0, latency))
        for format in formats:
            if format.name in region.formats:
                found.append(_choice(i, region, format, base, noise[region.name][format.name], latency))
    return found


def _choice(index: int, region: Region, format: Format, base: Format, noise: float, latency: Costs) -> Choice:
    bits = region.parameters * format.weight_bits
    return Choice(index, format, noise, latency[region.name][format.name], bits, bit_operations(region, format, base))


def bit_operations(region: Region, format: Format, base: Format) -> float:
    """Return the multiplications of ``region`` times the bits of both operands; activations stay in ``base`` where only weights have codes.

    See: the BOPs of van Baalen et al., Bayesian Bits, NeurIPS 2020.
    """
    return float(region.macs * format.bits * (base if format.activations == "none" else format).bits)


def _bounds(
    choices: Sequence[Choice], regions: Sequence[Region], base: Format, latency: Costs, budget: Budget, noise_bound: float | None
) -> dict[str, float]:
    parameters = sum(r.parameters for r in regions)
    all_base = sum(latency[r.name][base.name] for r in regions)
    fastest = sum(min(c.latency for c in choices if c.region == i) for i in range(len(regions)))
    smallest = sum(min(c.bits for c in choices if c.region == i) for i in range(len(regions)))
    bounds = {}
    # Without any bound the default trades bits for noise; who names one bound means that one.
    is_free = budget.bounds_error or any(bound is not None for bound in (budget.size, budget.bops, budget.latency))
    bits = budget.bits if budget.bits is not None else (None if is_free else DEFAULT_BITS)
    if bits is not None:
        allowed = bits * parameters
        bounds["bits"] = allowed if budget.bits is not None else max(allowed, smallest)
    if budget.size is not None:
        bounds["bits"] = min(bounds.get("bits", np.inf), budget.size * parameters * base.bits)
    if budget.bops is not None:
        bounds["bops"] = budget.bops * sum(bit_operations(r, base, base) for r in regions)
    if budget.latency is not None:
        bounds["latency"] = budget.latency * all_base
    elif noise_bound is None:
        bounds["latency"] = DEFAULT_LATENCY_SLACK * fastest
    if noise_bound is not None:
        bounds["noise"] = noise_bound
    return bounds


def _solve(choices: Sequence[Choice], count: int, bounds: Mapping[str, float], *, minimise: str) -> list[Choice] | None:
    """Minimise one quantity (the other breaks ties) with one choice per region; None when the bounds cannot be met."""
    usable = _undominated(choices, bounds, minimise)
    if len({c.region for c in usable}) < count:
        return None
    columns = {name: np.array([getattr(c, name) for c in usable]) for name in ("noise", "latency", "bits", "bops")}
    relative = {name: column / max(float(column.sum()), 1e-300) for name, column in columns.items()}
    # HiGHS stops within 1e-6 of the optimum whatever the units: in these units that is one part in 1e12.
    objective = 1e6 * relative[minimise] + 1e-3 * relative["latency" if minimise == "noise" else "noise"]
    rows = coo_matrix((np.ones(len(usable)), ([c.region for c in usable], range(len(usable)))), shape=(count, len(usable)))
    limits = [LinearConstraint(columns[name][None] / bound, -np.inf, 1 + _ROUNDING) for name, bound in bounds.items() if bound > 0]
    constraints = [LinearConstraint(rows.tocsr(), 1, 1), *limits]
    result = milp(objective, constraints=constraints, integrality=np.ones(len(usable)), bounds=Bounds(0, 1), options={"mip_rel_gap": _GAP})
    return None if result.x is None else [c for c, x in zip(usable, result.x, strict=True) if x > 0.5]


def _undominated(choices: Sequence[Choice], bounds: Mapping[str, float], minimise: str) -> list[Choice]:
    """Return the choices that an optimum may hold: none breaks a bound by itself, none is worse than another in all that counts."""
    names = (minimise, *(name for name in bounds if name != minimise), "latency" if minimise == "noise" else "noise")
    within = [c for c in choices if all(getattr(c, name) <= bound * (1 + _ROUNDING) for name, bound in bounds.items())]
    kept: dict[int, list[tuple[tuple[float, ...], Choice]]] = {}
    for choice in within:
        figures = tuple(getattr(choice, name) for name in names)
        others = kept.setdefault(choice.region, [])
        if not any(all(map(le, other, figures)) for other, _ in others):
            others[:] = [(other, c) for other, c in others if not all(map(le, figures, other))] + [(figures, choice)]
    return [c for found in kept.values() for _, c in found]


def _infeasible(choices: Sequence[Choice], bounds: Mapping[str, float], base: Format, budget: Budget) -> str:
    """Return which bound no plan meets, in the units in which the budget is written."""
    whole = {name: sum(getattr(c, name) for c in choices if c.format == base) or 1.0 for name in ("bits", "bops", "latency")}
    by_size = budget.size is not None and (budget.bits is None or budget.size * base.bits < budget.bits)
    units = {
        "bits": (whole["bits"], f"x the size of {base.name}") if by_size else (whole["bits"] / base.bits, " bits per weight"),
        "bops": (whole["bops"], f"x the bit operations of {base.name}"),
        "latency": (whole["latency"], f"x the estimated latency of {base.name}"),
        "noise": (1.0, " of noise to signal"),
    }
    regions = {c.region for c in choices}
    for name, bound in bounds.items():
        best = sum(min(getattr(c, name) for c in choices if c.region == r) for r in regions)
        if best > bound * (1 + _ROUNDING):
            unit, text = units[name]
            return f"no plan reaches {bound / unit:.4g}{text}; the least possible is {best / unit:.4g}"
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
    base_choice = next(c for c in choices if c.region == choice.region and c.format == base)
    if choice.format == base:
        least = min(c.noise for c in alternatives)
        why = f"kept in {base.name}: quantizing would add {_db(least)} of noise, more than it saves is worth under the budget"
    else:
        gain = base_choice.latency - choice.latency
        size = int(base_choice.bits - choice.bits) // 8
        why = f"{choice.format.name}: saves an estimated {gain:.2f} us and {size} bytes for {_db(choice.noise)} of noise"
    return Assignment(region, choice.format, why + (" (least time within the error bound)" if limited else ""), ("X3",), figures)


def _db(noise: float) -> str:
    return f"{10 * np.log10(noise):.1f} dB" if noise > 0 else "no"
