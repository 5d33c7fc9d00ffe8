"""Choose one format per region: an exact integer program, solved by HiGHS.

Without a bound on the error: least noise, subject to bits, size and estimated latency. With one: least latency, subject to the
noise bound as well. Noise of single regions is taken to add up, which verification checks afterwards. Latency counts the conversions
between regions (``deploycc.quant.cost``), so neighbours in one format are worth more than the sum of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import le
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.budget import Budget
from deploycc.core.errors import BudgetError
from deploycc.core.plan import Assignment, Region

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from deploycc.core.formats import Format
    from deploycc.quant.cost import Boundary

DEFAULT_BITS = 10.0
DEFAULT_LATENCY_SLACK = 1.15
_ROUNDING = 1e-9
_GAP = 1e-6
_PAIRWISE = 3  # readers of a value; what more of them agree on gets a column
_LIMITED = " (least time within the error bound)"
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


@dataclass(frozen=True, slots=True)
class _Problem:
    regions: Sequence[Region]
    choices: Sequence[Choice]
    base: Format
    boundaries: Sequence[Boundary] = ()

    def cost(self, picked: Sequence[Choice]) -> float:
        """Return the estimated microseconds of one choice per region, with all conversions."""
        formats = {self.regions[c.region].name: c.format for c in picked}
        return sum(c.latency for c in picked) + sum(b.cost(formats) for b in self.boundaries)


def pays(region: Region, format: Format) -> bool:
    """Return whether a precision by name quantizes ``region``: where the rules allow it, but a product of few rows to blocks only (S1)."""
    return format.name in region.formats and (format.block > 0 or "S1" not in region.rules)


def uniform(regions: Sequence[Region], format: Format, base: Format, noise: Costs) -> tuple[Assignment, ...]:
    """Return ``format`` wherever the rules allow it and it pays, and ``base`` elsewhere."""
    chosen = []
    for region in regions:
        if not format.is_quantized or pays(region, format):
            reason = f"--precision {format.name}" if format.is_quantized else f"the base format {base.name}"
            chosen.append(Assignment(region, format, reason, ("X3",), noise.get(region.name, {})))
        else:
            # What has no weight in blocks is excluded by R6, whatever other rules say of other formats.
            rules = region.rules if not format.block or region.kind == "linear" else ("R6",)
            why = f"{format.name} is excluded here by {', '.join(rules)}"
            if format.name in region.formats:
                why, rules = f"too few rows for {format.name} to pay (S1)", ("S1",)
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
    boundaries: Sequence[Boundary] = (),
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
        boundaries: where a conversion is needed if the formats on both sides differ.

    Raises:
        BudgetError: when no assignment meets the bounds, saying what the best possible value is.
    """
    if not regions:
        return ()
    problem = _Problem(regions, _choices(regions, formats, base, noise, latency, forced or {}), base, boundaries)
    bounds = _bounds(problem, latency, budget, noise_bound)
    picked = _solve(problem, bounds, minimise="latency" if noise_bound is not None else "noise")
    if picked is None and budget.latency is None and noise_bound is None:
        # The other bounds leave only slower plans: then the slack is that of the fastest of those.
        asked = {name: bound for name, bound in bounds.items() if name != "latency"}
        if quickest := _solve(problem, asked, minimise="latency"):
            picked = _solve(problem, {**asked, "latency": DEFAULT_LATENCY_SLACK * problem.cost(quickest)}, minimise="noise")
    if picked is None:
        raise BudgetError(
            _infeasible(problem, bounds, budget),
            at=f"--budget {budget}",
            fix="relax that bound, or allow more formats by another --target",
        )
    return _explained(problem, picked, noise, limited=noise_bound is not None)


def pareto_front(
    regions: Sequence[Region],
    formats: Sequence[Format],
    base: Format,
    *,
    noise: Costs,
    latency: Costs,
    boundaries: Sequence[Boundary] = (),
    points: int = 12,
) -> list[tuple[Assignment, ...]]:
    """Return assignments from the fastest to the least noisy, none of which another beats in both; at most ``points``.

    For each of ``points`` bounds on latency, evenly spaced from the fastest possible to the base format's, the least noise is taken.
    """
    if not regions:
        return []
    all_base = sum(latency[r.name][base.name] for r in regions)
    fastest = _least(_Problem(regions, _choices(regions, formats, base, noise, latency, {}), base, boundaries), "latency")
    front: list[tuple[Assignment, ...]] = []
    least = np.inf
    for bound in np.linspace(fastest, max(all_base, fastest), points):
        budget = Budget(bits=float(max(f.bits for f in (base, *formats))), latency=float(bound) / all_base)
        found = allocate(regions, formats, base, noise=noise, latency=latency, budget=budget, noise_bound=None, boundaries=boundaries)
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


def _bounds(problem: _Problem, latency: Costs, budget: Budget, noise_bound: float | None) -> dict[str, float]:
    regions, base = problem.regions, problem.base
    parameters = sum(r.parameters for r in regions)
    all_base = sum(latency[r.name][base.name] for r in regions)
    bounds = {}
    # Without any bound the default trades bits for noise; who names one bound means that one.
    is_free = budget.bounds_error or any(bound is not None for bound in (budget.size, budget.bops, budget.latency))
    bits = budget.bits if budget.bits is not None else (None if is_free else DEFAULT_BITS)
    if bits is not None:
        allowed = bits * parameters
        bounds["bits"] = allowed if budget.bits is not None else max(allowed, _least(problem, "bits"))
    if budget.size is not None:
        bounds["bits"] = min(bounds.get("bits", np.inf), budget.size * parameters * base.bits)
    if budget.bops is not None:
        bounds["bops"] = budget.bops * sum(bit_operations(r, base, base) for r in regions)
    if budget.latency is not None:
        bounds["latency"] = budget.latency * all_base
    elif noise_bound is None:
        floats = {c.region: c.latency for c in problem.choices if not c.format.is_quantized}
        plain = sum(floats.get(i, latency[r.name][base.name]) for i, r in enumerate(regions))
        bounds["latency"] = min(DEFAULT_LATENCY_SLACK * _least(problem, "latency"), plain)
    if noise_bound is not None:
        bounds["noise"] = noise_bound
    return bounds


def _least(problem: _Problem, name: str) -> float:
    """Return the least possible sum of one quantity."""
    if name == "latency" and problem.boundaries:
        return problem.cost(_solve(problem, {}, minimise=name) or ())
    least: dict[int, float] = {}
    for choice in problem.choices:
        least[choice.region] = min(getattr(choice, name), least.get(choice.region, np.inf))
    return sum(least.values())


def _solve(problem: _Problem, bounds: Mapping[str, float], *, minimise: str) -> list[Choice] | None:
    """Minimise one quantity (the other breaks ties) with one choice per region; None when the bounds cannot be met."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, which no other precision should wait for
    from scipy.sparse import csr_matrix

    usable, count = _undominated(problem, bounds, minimise), len(problem.regions)
    if len({c.region for c in usable}) < count:
        return None
    costs, conditions = _conversions(problem, usable)
    nothing = [0.0] * len(costs)
    columns = {
        name: np.array([*(getattr(c, name) for c in usable), *(costs if name == "latency" else nothing)])
        for name in ("noise", "latency", "bits", "bops")
    }
    relative = {name: column / max(float(column.sum()), 1e-300) for name, column in columns.items()}
    # HiGHS stops within 1e-6 of the optimum whatever the units: in these units that is one part in 1e12.
    objective = 1e6 * relative[minimise] + 1e-3 * relative["latency" if minimise == "noise" else "noise"]
    once = csr_matrix((np.ones(len(usable)), ([c.region for c in usable], range(len(usable)))), shape=(count, len(objective)))
    limits = [LinearConstraint(columns[name][None] / bound, -np.inf, 1 + _ROUNDING) for name, bound in bounds.items() if bound > 0]
    constraints = [LinearConstraint(once, 1, 1), *limits, *([LinearConstraint(conditions, -np.inf, 0)] if costs else [])]
    whole = np.ones(len(objective))
    result = milp(objective, constraints=constraints, integrality=whole, bounds=Bounds(0, 1), options={"mip_rel_gap": _GAP})
    return None if result.x is None else [c for c, x in zip(usable, result.x[: len(usable)], strict=True) if x > 0.5]


def _conversions(problem: _Problem, choices: Sequence[Choice]) -> tuple[list[float], csr_matrix]:
    """Return the microseconds of every conversion that may be needed, and rows at most 0 that tell when it is.

    Their columns are those of ``choices``, then those of the conversions. A boundary needs a conversion into a format where
    ``needed >= reads(r) - agreed`` for a reader r, with ``agreed <= reads(r)`` for all of them and ``agreed <= writes(producer)``; where
    something reads floating point in any case, nothing is agreed. A producer with a kernel of its own behind it needs none, whatever its
    format. Formats that only one reader reads, and the producer does not write, share a column: that is the tighter program.
    """
    from scipy.sparse import csr_matrix

    coded: dict[str, dict[str, int]] = {region.name: {} for region in problem.regions}
    for i, choice in enumerate(choices):
        if choice.format.codes_activations:
            coded[problem.regions[choice.region].name][choice.format.name] = i
    costs: list[float] = []
    rows: list[dict[int, float]] = []

    def column(cost: float) -> int:
        costs.append(cost)
        return len(choices) + len(costs) - 1

    for boundary in problem.boundaries:
        writes, reads = coded[boundary.producer], [coded[name] for name in boundary.readers]
        converting = dict.fromkeys(writes.values(), -1.0) if boundary.is_apart else {}
        agreeable = {f for f in writes if all(f in each for each in reads)} if not (boundary.is_apart or boundary.shared) else set()
        alone = dict.fromkeys((i for f, i in reads[0].items() if f not in agreeable), 1.0) if len(reads) == 1 else {}
        if alone:
            rows.append({**alone, **converting, column(boundary.microseconds): -1.0})
        needed = []
        for format in dict.fromkeys(f for each in reads for f, i in each.items() if i not in alone):
            reading = [each[format] for each in reads if format in each]
            needed.append(column(boundary.microseconds))
            if format in agreeable and len(reading) <= _PAIRWISE:
                others = (writes[format], *reading)
                rows.extend({r: 1.0, other: -1.0, needed[-1]: -1.0} for r in reading for other in others if other != r)
            elif format in agreeable:
                agreed = column(0.0)
                rows.extend({r: 1.0, agreed: -1.0, needed[-1]: -1.0} for r in reading)
                rows.extend({agreed: 1.0, r: -1.0} for r in (writes[format], *reading))
            else:
                rows.extend({r: 1.0, **converting, needed[-1]: -1.0} for r in reading)
        if converting and needed:  # Whatever a reader reads is one of them.
            rows.extend({**dict.fromkeys(each.values(), 1.0), **converting, **dict.fromkeys(needed, -1.0)} for each in reads if each)
    entries = [(value, i, j) for i, row in enumerate(rows) for j, value in row.items()]
    values, where = [value for value, *_ in entries], np.array([place for _, *place in entries], dtype=int).reshape(-1, 2)
    return costs, csr_matrix((values, (where[:, 0], where[:, 1])), shape=(len(rows), len(choices) + len(costs)))


def _undominated(problem: _Problem, bounds: Mapping[str, float], minimise: str) -> list[Choice]:
    """Return the choices that an optimum may hold: none breaks a bound by itself, none is worse than another in all that counts."""
    names = (minimise, *(name for name in bounds if name != minimise), "latency" if minimise == "noise" else "noise")
    within = [c for c in problem.choices if all(getattr(c, name) <= bound * (1 + _ROUNDING) for name, bound in bounds.items())]
    # Another format for one region changes what is converted at its boundaries, by this much at most.
    at_stake: dict[str, float] = {}
    kinds = len({c.format for c in problem.choices if c.format.codes_activations})
    for boundary in problem.boundaries:
        for name in boundary.regions:
            at_stake[name] = at_stake.get(name, 0.0) + min(kinds, len(boundary.readers)) * boundary.microseconds
    kept: dict[int, list[tuple[tuple[float, ...], tuple[float, ...], Choice]]] = {}
    for choice in within:
        stake = at_stake.get(problem.regions[choice.region].name, 0.0)
        figures = tuple(getattr(choice, name) for name in names)
        at_worst = tuple(figure + (stake if name == "latency" else 0.0) for name, figure in zip(names, figures, strict=True))
        others = kept.setdefault(choice.region, [])
        if not any(all(map(le, worst, figures)) for _, worst, _ in others):
            others[:] = [o for o in others if not all(map(le, at_worst, o[0]))] + [(figures, at_worst, choice)]
    return [c for found in kept.values() for *_, c in found]


def _infeasible(problem: _Problem, bounds: Mapping[str, float], budget: Budget) -> str:
    """Return which bound no plan meets, in the units in which the budget is written."""
    base = problem.base
    whole = {name: sum(getattr(c, name) for c in problem.choices if c.format == base) or 1.0 for name in ("bits", "bops", "latency")}
    by_size = budget.size is not None and (budget.bits is None or budget.size * base.bits < budget.bits)
    units = {
        "bits": (whole["bits"], f"x the size of {base.name}") if by_size else (whole["bits"] / base.bits, " bits per weight"),
        "bops": (whole["bops"], f"x the bit operations of {base.name}"),
        "latency": (whole["latency"], f"x the estimated latency of {base.name}"),
        "noise": (1.0, " of noise to signal"),
    }
    for name, bound in bounds.items():
        best = _least(problem, name)
        if best > bound * (1 + _ROUNDING):
            unit, text = units[name]
            return f"no plan reaches {bound / unit:.4g}{text}; the least possible is {best / unit:.4g}"
    return "no plan meets all bounds at once, though each can be met alone"


def _explained(problem: _Problem, picked: Sequence[Choice], noise: Costs, *, limited: bool) -> tuple[Assignment, ...]:
    choices: dict[int, list[Choice]] = {}
    for choice in problem.choices:
        choices.setdefault(choice.region, []).append(choice)
    nearby: dict[str, list[Boundary]] = {}
    for boundary in problem.boundaries:
        for name in dict.fromkeys(boundary.regions):
            nearby.setdefault(name, []).append(boundary)
    formats = {region.name: choice.format for region, choice in zip(problem.regions, picked, strict=True)}
    found = []
    for region, choice in zip(problem.regions, picked, strict=True):
        others = [c for c in choices[choice.region] if c is not choice]
        # What the region and the conversions around it take, the other regions being as picked.
        times = {
            c: c.latency + sum(b.cost({**formats, region.name: c.format}) for b in nearby.get(region.name, ())) for c in (choice, *others)
        }
        why = _reason(region, choice, times, problem.base)
        rules = ("X3",) if others else region.rules
        found.append(Assignment(region, choice.format, why + _LIMITED * (limited and bool(others)), rules, noise.get(region.name, {})))
    return tuple(found)


def _reason(region: Region, choice: Choice, times: Mapping[Choice, float], base: Format) -> str:
    """Return why ``choice`` was picked among those of ``times``, which are estimated microseconds."""
    others = [c for c in times if c is not choice]
    if not others:
        return f"only {base.name} is allowed here by {', '.join(region.rules) or 'the target'}"
    if choice.format == base:
        least = min(c.noise for c in others)
        if min(times[c] for c in others) >= times[choice]:
            return f"kept in {base.name}: quantizing would save no time by estimate, and add {_db(least)} of noise"
        return f"kept in {base.name}: quantizing would add {_db(least)} of noise, more than it saves is worth under the budget"
    in_base = next((c for c in others if c.format == base), choice)
    gain, size = times[in_base] - times[choice], int(in_base.bits - choice.bits) // 8
    if gain < 0:
        saved = f"saves {size} bytes and takes an estimated {-gain:.2f} us more"
    else:
        saved = f"saves an estimated {gain:.2f} us and {size} bytes"
    return f"{choice.format.name}: {saved} for {_db(choice.noise)} of noise"


def _db(noise: float) -> str:
    return f"{10 * np.log10(noise):.1f} dB" if noise > 0 else "no"
