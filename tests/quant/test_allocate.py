"""The integer program: as good as brute force, within its bounds, monotone, quick, and clear about what cannot be met."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploycc.core.budget import Budget
from deploycc.core.errors import BudgetError
from deploycc.core.formats import FP8, FP16, INT8, Format
from deploycc.core.plan import Assignment, Region
from deploycc.quant.allocate import DEFAULT_BITS, DEFAULT_LATENCY_SLACK, allocate, pareto_front, uniform
from deploycc.quant.cost import Boundary

law = settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
FORMATS = (INT8, FP8)
Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Problem:
    """Regions with their figures."""

    regions: tuple[Region, ...]
    noise: Table
    latency: Table
    formats: tuple[Format, ...] = FORMATS
    boundaries: tuple[Boundary, ...] = ()

    def solve(self, budget: Budget, noise_bound: float | None = None) -> tuple[Assignment, ...]:
        return allocate(
            self.regions,
            self.formats,
            FP16,
            noise=self.noise,
            latency=self.latency,
            budget=budget,
            noise_bound=noise_bound,
            boundaries=self.boundaries,
        )

    def conversions(self, formats: dict[str, Format]) -> float:
        """The documented meaning of a boundary, written out once more."""
        spent = 0.0
        for b in self.boundaries:
            writes, reads = formats[b.producer], [formats[r] for r in b.readers]
            codes = {f.name for f in reads if f != FP16}
            if b.is_apart and writes != FP16:
                continue
            if not b.is_apart and not b.shared and all(f == writes for f in reads):
                continue
            spent += b.microseconds * len(codes)
        return spent

    def figures(self, formats: tuple[Format, ...]) -> dict[str, float]:
        pairs = list(zip(self.regions, formats, strict=True))
        return {
            "noise": sum(self.noise[r.name].get(f.name, 0.0) for r, f in pairs),
            "latency": sum(self.latency[r.name][f.name] for r, f in pairs) + self.conversions({r.name: f for r, f in pairs}),
            "bits": sum(r.parameters * f.bits for r, f in pairs),
            "bops": sum(r.macs * f.bits**2 for r, f in pairs),
        }

    def every(self) -> list[dict[str, float]]:
        allowed = [(FP16, *(f for f in self.formats if f.name in r.formats)) for r in self.regions]
        return [self.figures(chosen) for chosen in itertools.product(*allowed)]

    def bounds(self, budget: Budget, noise_bound: float | None) -> dict[str, float]:
        """The documented meaning of a budget, written out once more."""
        parameters, found = sum(r.parameters for r in self.regions), self.every()
        bounds = {"noise": math.inf if noise_bound is None else noise_bound, "bits": math.inf, "latency": math.inf, "bops": math.inf}
        if budget.bits is not None:
            bounds["bits"] = budget.bits * parameters
        elif budget.size is None and budget.latency is None and budget.bops is None and not budget.bounds_error:
            bounds["bits"] = max(DEFAULT_BITS * parameters, min(f["bits"] for f in found))
        if budget.size is not None:
            bounds["bits"] = min(bounds["bits"], budget.size * parameters * 16)
        if budget.bops is not None:
            bounds["bops"] = budget.bops * sum(r.macs for r in self.regions) * 16**2
        if budget.latency is not None:
            bounds["latency"] = budget.latency * sum(self.latency[r.name]["fp16"] for r in self.regions)
        elif noise_bound is None:
            base = sum(self.latency[r.name]["fp16"] for r in self.regions)
            wanted = min(DEFAULT_LATENCY_SLACK * min(f["latency"] for f in found), base)
            # Where the other bounds leave only slower plans, the slack is that of the fastest of those.
            within = [f["latency"] for f in found if all(f[k] <= b * (1 + 1e-9) for k, b in bounds.items())]
            bounds["latency"] = wanted if min(within, default=0.0) <= wanted * (1 + 1e-9) else DEFAULT_LATENCY_SLACK * min(within)
        return bounds

    def optimum(self, budget: Budget, noise_bound: float | None) -> float | None:
        bounds = self.bounds(budget, noise_bound)
        quantity = "noise" if noise_bound is None else "latency"
        return min((f[quantity] for f in self.every() if all(f[k] <= b * (1 + 1e-9) for k, b in bounds.items())), default=None)


def region(name: str, parameters: int, formats: tuple[str, ...] = ("int8", "fp8")) -> Region:
    # Multiplications are no multiple of parameters, so that bounds on bits and on bit operations are two things.
    macs = parameters * 37 % 5001
    rules = () if formats else ("S2",)
    return Region(name, "conv", (name,), (name,), (), formats=formats, rules=rules, parameters=parameters, macs=macs)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    regions, noise, latency = [], {}, {}
    for i in range(draw(st.integers(1, 6))):
        formats = draw(st.sampled_from([("int8", "fp8"), ("int8",), ("fp8",), ()]))
        regions.append(region(f"r{i}", draw(st.integers(0, 5000)), formats))
        noise[f"r{i}"] = {f: draw(st.sampled_from([0.0, 1.0, 3.0])) * 10.0 ** draw(st.integers(-9, 0)) for f in formats}
        latency[f"r{i}"] = {f: draw(st.integers(1, 400)) / 10 for f in ("fp16", "int8", "fp8")}
    names = [r.name for r in regions]
    boundaries = []
    for i, producer in enumerate(names[:-1]):
        if readers := draw(st.lists(st.sampled_from(names[i + 1 :]), max_size=5, unique=True)):
            cost = draw(st.integers(1, 200)) / 10
            boundaries.append(Boundary(f"v{i}", producer, tuple(readers), draw(st.booleans()), cost, draw(st.booleans())))
    return Problem(tuple(regions), noise, latency, boundaries=tuple(boundaries))


BUDGETS = st.one_of(
    st.just((Budget(), None)),
    st.builds(lambda b: (Budget(bits=b), None), st.floats(7.5, 17)),
    st.builds(lambda s: (Budget(size=s), None), st.floats(0.4, 1.1)),
    st.builds(lambda t: (Budget(latency=t), None), st.floats(0.05, 1.2)),
    st.builds(lambda o: (Budget(bops=o), None), st.floats(0.2, 1.1)),
    st.builds(lambda e, o: (Budget(sqnr=-10 * e, bops=o), 10.0**e), st.floats(-9, 0), st.floats(0.2, 1.1)),
    st.builds(lambda b, t: (Budget(bits=b, latency=t), None), st.floats(7.5, 17), st.floats(0.05, 1.2)),
    st.builds(lambda e: (Budget(sqnr=-10 * e), 10.0**e), st.floats(-9, 0)),
    st.builds(lambda e, b: (Budget(sqnr=-10 * e, bits=b), 10.0**e), st.floats(-9, 0), st.floats(7.5, 17)),
    st.builds(lambda e, t: (Budget(accuracy_drop=1.0, latency=t), 10.0**e), st.floats(-9, 0), st.floats(0.05, 1.2)),
)


@law
@given(problems(), BUDGETS)
def test_equals_brute_force(problem: Problem, asked: tuple[Budget, float | None]) -> None:
    budget, noise_bound = asked
    best = problem.optimum(budget, noise_bound)
    if best is None:
        with pytest.raises(BudgetError):
            problem.solve(budget, noise_bound)
        return
    chosen = problem.solve(budget, noise_bound)
    assert [a.region for a in chosen] == list(problem.regions)
    assert all(a.format == FP16 or a.format.name in a.region.formats for a in chosen)
    figures = problem.figures(tuple(a.format for a in chosen))
    for name, bound in problem.bounds(budget, noise_bound).items():
        assert figures[name] <= bound * (1 + 1e-6)
    quantity = "noise" if noise_bound is None else "latency"
    worst = max(f[quantity] for f in problem.every())
    assert figures[quantity] <= best * (1 + 1e-5) + 1e-8 * worst


@settings(law, max_examples=40)
@given(problems())
def test_nothing_beats_a_point_of_the_front(problem: Problem) -> None:
    front = pareto_front(
        problem.regions, problem.formats, FP16, noise=problem.noise, latency=problem.latency, boundaries=problem.boundaries
    )
    points = [problem.figures(tuple(a.format for a in found)) for found in front]
    assert points
    everything = problem.every()
    scale = max(f["noise"] for f in everything)
    for point in points:
        rivals = (f for f in everything if f["latency"] <= point["latency"])
        assert point["noise"] <= min(f["noise"] for f in rivals) * (1 + 1e-5) + 1e-8 * scale
    assert [p["noise"] for p in points] == sorted((p["noise"] for p in points), reverse=True)
    assert points[0]["latency"] <= min(f["latency"] for f in everything) * (1 + 1e-6)


@pytest.mark.parametrize("large", [1.0, 1e6])
def test_a_hopeless_region_does_not_blur_the_others(large: float) -> None:
    """The solver's own tolerance is absolute, so one huge figure must not hide the small ones."""
    noise = {"bad": {"int8": large}, **{f"r{i}": {"int8": (i + 1) * 1e-6} for i in range(6)}}
    regions = (region("bad", 1000, ("int8",)), *(region(f"r{i}", 1000, ("int8",)) for i in range(6)))
    latency = {r.name: {"fp16": 2.0, "int8": 2.0} for r in regions}
    chosen = Problem(regions, noise, latency).solve(Budget(bits=16 - 8 * 3 / 7))
    assert {a.region.name for a in chosen if a.format == INT8} == {"r0", "r1", "r2"}


def test_a_bound_of_zero_noise_keeps_what_is_exact() -> None:
    problem = Problem(
        (region("a", 10, ("int8",)), region("b", 10, ("int8",))),
        {"a": {"int8": 0.0}, "b": {"int8": 1e-9}},
        {n: {"fp16": 2.0, "int8": 1.0} for n in "ab"},
    )
    assert [a.format for a in problem.solve(Budget(sqnr=300), 0.0)] == [INT8, FP16]


def test_a_bound_on_latency_alone_may_be_spent_on_bits() -> None:
    regions = (region("a", 100), region("b", 100))
    noise = {r.name: {"int8": 1e-3, "fp8": 1e-3} for r in regions}
    latency = {r.name: {"fp16": 1.0, "int8": 0.5, "fp8": 0.5} for r in regions}
    assert [a.format for a in Problem(regions, noise, latency).solve(Budget(latency=1.0))] == [FP16, FP16]
    assert FP16 not in [a.format for a in Problem(regions, noise, latency).solve(Budget())]


def test_equal_noise_is_decided_by_time() -> None:
    problem = Problem((region("a", 10),), {"a": {"int8": 0.0, "fp8": 0.0}}, {"a": {"fp16": 3.0, "int8": 2.0, "fp8": 1.9}})
    assert [a.format for a in problem.solve(Budget(latency=1.0))] == [FP8]


@pytest.mark.parametrize(
    ("budget", "noise_bound", "message"),
    [
        (Budget(bits=7), None, "no plan reaches 7 bits per weight; the least possible is 8. Where: --budget bits<=7."),
        (Budget(size=0.4), None, "no plan reaches 0.4x the size of fp16; the least possible is 0.5"),
        (Budget(latency=0.1), None, "no plan reaches 0.1x the estimated latency of fp16; the least possible is 0.5"),
        (Budget(sqnr=30, latency=0.5), 1e-3, "no plan meets all bounds at once, though each can be met alone"),
    ],
)
def test_what_cannot_be_met_is_named_with_the_best_possible(budget: Budget, noise_bound: float | None, message: str) -> None:
    names = ("a", "b")
    problem = Problem(
        tuple(region(n, 1000) for n in names),
        {n: {"int8": 0.1, "fp8": 0.2} for n in names},
        {n: {"fp16": 10.0, "int8": 5.0, "fp8": 6.0} for n in names},
    )
    with pytest.raises(BudgetError) as caught:
        problem.solve(budget, noise_bound)
    assert message in str(caught.value)
    assert "Fix: relax that bound, or allow more formats by another --target." in str(caught.value)
    assert caught.value.exit_code == 5


@law
@given(problems(), st.floats(8, 16), st.floats(0, 4))
def test_a_looser_budget_is_never_worse(problem: Problem, bits: float, more: float) -> None:
    def noise(bound: float) -> float:
        try:
            chosen = problem.solve(Budget(bits=bound, latency=2.0))
        except BudgetError:
            return math.inf
        return problem.figures(tuple(a.format for a in chosen))["noise"]

    tight = noise(bits)
    assert noise(bits + more) <= (tight * (1 + 1e-5) + 1e-12)


@pytest.mark.parametrize(("budget", "noise_bound"), [(Budget(), None), (Budget(bits=7), None), (Budget(sqnr=30), 1e-3)])
def test_500_regions_of_six_formats_take_about_a_second(budget: Budget, noise_bound: float | None) -> None:
    rng = np.random.default_rng(0)
    widths = {"int8": 8, "fp8": 8, "f6": 6, "f5": 5, "f4": 4}
    formats = tuple({"int8": INT8, "fp8": FP8}.get(n) or Format(n, b, "INT4", 7.0) for n, b in widths.items())
    regions = tuple(region(f"r{i}", int(rng.integers(1000, 1_000_000)), tuple(widths)) for i in range(500))
    base = {r.name: rng.uniform(5, 50) for r in regions}
    latency = {
        r.name: {"fp16": base[r.name], **{n: base[r.name] * b / 16 * rng.uniform(0.9, 1.1) for n, b in widths.items()}} for r in regions
    }
    noise = {r.name: {n: 10 ** rng.uniform(-7, -4) * 4.0 ** (8 - b) for n, b in widths.items()} for r in regions}
    problem = Problem(regions, noise, latency, formats)
    start = time.process_time()
    chosen = problem.solve(budget, noise_bound)
    spent = time.process_time() - start
    assert len(chosen) == 500
    assert spent < 2.0


@pytest.mark.parametrize(("budget", "noise_bound"), [(Budget(), None), (Budget(sqnr=30), 1e-3), (Budget(latency=0.7), None)])
def test_200_regions_with_conversions_take_about_a_second(budget: Budget, noise_bound: float | None) -> None:
    """As many as the largest networks have, in a chain with skips."""
    rng = np.random.default_rng(1)
    names = [f"r{i}" for i in range(200)]
    regions = tuple(region(name, int(rng.integers(1000, 1_000_000))) for name in names)
    base = rng.uniform(5, 50, len(names))
    latency = {
        n: {"fp16": t, "int8": t * rng.uniform(0.5, 0.7), "fp8": t * rng.uniform(0.5, 0.7)} for n, t in zip(names, base, strict=True)
    }
    noise = {n: {f: 10 ** rng.uniform(-7, -4) for f in ("int8", "fp8")} for n in names}
    skips = {i: names[i + 3 : i + 4] for i in range(0, 197, 3)}
    boundaries = tuple(
        Boundary(f"v{i}", names[i], (names[i + 1], *skips.get(i, ())), i % 7 == 0, float(rng.uniform(2, 6))) for i in range(199)
    )
    start = time.process_time()
    chosen = Problem(regions, noise, latency, boundaries=boundaries).solve(budget, noise_bound)
    spent = time.process_time() - start
    assert len({a.format for a in chosen}) > 1
    assert spent < 4.0


class TestReasons:
    def problem(self) -> Problem:
        regions = (region("a", 8000), region("b", 1000), region("c", 10, ()))
        noise = {"a": {"int8": 1e-6, "fp8": 1e-5}, "b": {"int8": 0.1, "fp8": 0.2}, "c": {}}
        return Problem(regions, noise, {r.name: {"fp16": 4.0, "int8": 2.0, "fp8": 2.5} for r in regions})

    def test_say_what_was_weighed(self) -> None:
        chosen = self.problem().solve(Budget(bits=10, latency=1.0))
        assert [a.reason for a in chosen] == [
            "int8: saves an estimated 2.00 us and 8000 bytes for -60.0 dB of noise",
            "kept in fp16: quantizing would add -10.0 dB of noise, more than it saves is worth under the budget",
            "only fp16 is allowed here by S2",
        ]
        assert [a.rules for a in chosen] == [("X3",), ("X3",), ("S2",)]
        assert chosen[0].noise == {"int8": 1e-6, "fp8": 1e-5}

    def test_say_what_a_slower_format_costs(self) -> None:
        """The conversion takes more than the region saves, and half the bytes are wanted."""
        problem = replace(self.problem(), boundaries=(Boundary("v", "b", ("a",), False, 2.5),))
        assert problem.solve(Budget(bits=9, latency=2.0))[0].reason == (
            "int8: saves 8000 bytes and takes an estimated 0.50 us more for -60.0 dB of noise"
        )

    def test_say_where_nothing_would_be_gained(self) -> None:
        problem = replace(self.problem(), latency={n: {"fp16": 2.0, "int8": 3.0, "fp8": 2.0} for n in "abc"})
        assert problem.solve(Budget(latency=2.0))[0].reason == (
            "kept in fp16: quantizing would save no time by estimate, and add -60.0 dB of noise"
        )

    def test_say_so_where_the_error_is_bounded(self) -> None:
        chosen = self.problem().solve(Budget(sqnr=20), 1e-2)
        assert chosen[0].reason.endswith("of noise (least time within the error bound)")

    def test_of_a_uniform_plan(self) -> None:
        problem = self.problem()
        assert [(a.format.name, a.reason) for a in uniform(problem.regions, INT8, FP16, problem.noise)] == [
            ("int8", "--precision int8"),
            ("int8", "--precision int8"),
            ("fp16", "int8 is excluded here by S2"),
        ]
        assert {a.reason for a in uniform(problem.regions, FP16, FP16, {})} == {"the base format fp16"}


def test_no_regions_no_decisions() -> None:
    assert allocate((), FORMATS, FP16, noise={}, latency={}, budget=Budget(bits=1), noise_bound=None) == ()
