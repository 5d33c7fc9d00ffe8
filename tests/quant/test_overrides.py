"""Formats by pattern of region names: what matches, what wins, what is refused, and what becomes of it in a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_graphs import residual, transformer

from deploycc.core.budget import parse_budget
from deploycc.core.errors import UsageError
from deploycc.core.formats import BF16, FP16, FP32, INT8
from deploycc.core.target import parse_target
from deploycc.quant.cost import estimate_all
from deploycc.quant.decide import Analysis, decide
from deploycc.quant.overrides import Override, islands_of_overrides, parse_overrides, settle
from deploycc.quant.regions import partition

REGIONS = tuple(replace(r, source=f"stages.{i}.conv") for i, r in enumerate(partition(residual())))


def formats(*overrides: tuple[str, str], base: object = FP16) -> dict[str, str]:
    """Return the format that the overrides give each region's module."""
    _, chosen = settle(REGIONS, parse_overrides(dict(overrides), at="test"), base=base)  # type: ignore[arg-type]
    return {r.source: chosen[r.name].format.name for r in REGIONS if r.name in chosen}


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("stages.*", len(REGIONS)), ("stages.0.conv", 1), ("stages.0", 1), (REGIONS[1].name, 1), (REGIONS[0].nodes[-1], 1)],
)
def test_a_pattern_matches_modules_their_parents_regions_and_nodes(pattern: str, count: int) -> None:
    assert len(formats((pattern, "int8"))) == count


def test_the_last_pattern_that_matches_counts() -> None:
    assert formats(("stages.*", "int8"), ("stages.1.*", "fp16"))["stages.1.conv"] == "fp16"
    assert formats(("stages.1.*", "fp16"), ("stages.*", "int8"))["stages.1.conv"] == "int8"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks.*": "int8"}, r"no region matches 'blocks\.\*'. Where: \[regions\]. Fix: the first regions are stages.0.conv"),
        ({"stages.*": "int7"}, "unknown format 'int7' for the regions"),
        ({"stages.*": "bf16"}, "the floating-point format of this build is fp16, not bf16"),
    ],
)
def test_what_cannot_be_is_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settle(REGIONS, parse_overrides(overrides, at="test"), base=FP16)


def test_what_tensorrt_computes_otherwise_is_refused() -> None:
    odd = replace(REGIONS[0], formats=(), rules=("T1",))
    with pytest.raises(UsageError, match=r"cannot compute in int8 \(T1\)"):
        settle([odd], [Override("*", INT8)], base=FP16)
    assert settle([odd], [Override("*", FP32)], base=FP16)[1][odd.name].format == FP32


def test_a_rule_of_thumb_gives_way() -> None:
    narrow = replace(REGIONS[0], formats=("fp8",), rules=("S2",))
    assert settle([narrow], [Override("*", INT8)], base=FP16)[0][0].formats == ("int8",)


def test_fp32_in_a_build_of_16_bits_is_an_island() -> None:
    regions, chosen = settle(REGIONS, [Override("stages.0", FP32)], base=FP16)
    islands = islands_of_overrides(regions, chosen, base=FP16)
    assert set(islands) == set(REGIONS[0].nodes)
    assert set(islands.values()) == {'the configuration says so: [regions] "stages.0" = "fp32"'}
    assert islands_of_overrides(regions, chosen, base=FP32) == {}


@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_the_plan_does_as_told_and_says_so(precision: str) -> None:
    target = parse_target("tensorrt-rtx:sm_80")
    regions, chosen = settle(REGIONS, [Override("stages.*", INT8), Override("stages.1.*", FP16)], base=FP16)
    analysis = Analysis(regions, FP16, (INT8,), target, 1, "", costs=estimate_all(regions, target, batch=1), forced=chosen)
    analysis.scores = type("Scores", (), {"noise": {r.name: {"int8": 1.0} for r in regions}})()
    plan = decide(analysis, precision=precision, budget=parse_budget("latency<=10x"), noise_bound=None)
    # At a noise of 0 dB each, an optimum would quantize nothing.
    assert [a.format.name for a in plan.assignments] == ["int8", "fp16", *["int8"] * (len(regions) - 2)]
    assert plan.assignments[1].reason == 'the configuration says so: [regions] "stages.1.*" = "fp16"'


def test_regions_that_are_tied_share_the_pattern_of_each_of_their_nodes() -> None:
    qkv = next(r for r in partition(transformer()) if len(r.anchors) == 3)
    assert all(Override(name, BF16).matches(qkv) for name in qkv.anchors)
