"""The roofline estimate: its formula, and the machine that stands for a target."""

from __future__ import annotations

import pytest

from deploycc.core.formats import FORMATS, FP8, FP16, FP32, INT8
from deploycc.core.plan import Region
from deploycc.core.target import ARCHS, Target, parse_target
from deploycc.quant.cost import CPU, MACHINES, estimate, estimate_all, machine_of

L4 = MACHINES["sm_89"]


def region(**work: int) -> Region:
    return Region("r", "conv", ("r",), ("r",), (), **work)


def test_much_arithmetic_is_bound_by_the_peak() -> None:
    heavy = region(macs=10**10)
    assert estimate(heavy, FP16, L4, batch=2) == pytest.approx(2 * 2e10 / (121e12 * 0.5) * 1e6 + 2.0)
    assert estimate(heavy, INT8, L4, batch=2) < estimate(heavy, FP16, L4, batch=2) < estimate(heavy, FP32, L4, batch=2)


def test_much_data_is_bound_by_the_bandwidth() -> None:
    wide = region(parameters=10**6, activation_elements=10**6)
    assert estimate(wide, FP16, L4, batch=3) == pytest.approx((2e6 + 3 * 2e6) / (300e9 * 0.5) * 1e6 + 2.0)
    assert estimate(wide, FP8, L4, batch=3) == pytest.approx((1e6 + 3 * 1.5e6) / (300e9 * 0.5) * 1e6 + 2.0)


def test_nothing_to_do_costs_a_launch() -> None:
    assert estimate(region(), FP16, L4, batch=1) == L4.launch


def test_every_architecture_has_a_machine() -> None:
    assert {arch for archs in ARCHS.values() for arch in archs} == set(MACHINES)


def test_the_oldest_architecture_counts() -> None:
    assert machine_of(parse_target("tensorrt-rtx:sm_120+sm_86")).name == "A10"
    assert machine_of(Target("onnxruntime")) == CPU
    assert machine_of(Target("tensorrt")) == MACHINES["sm_80"]


def test_all_regions_in_all_formats() -> None:
    assert set(estimate_all([region(macs=5)], Target("onnxruntime"), batch=1)["r"]) == set(FORMATS)
