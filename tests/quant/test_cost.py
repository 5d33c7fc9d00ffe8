"""The roofline estimate: its formula, and the machine that stands for a target."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploycc.core.formats import FORMATS, FP8, FP16, FP32, INT4, INT8
from deploycc.core.plan import Crossing, Region
from deploycc.core.target import ARCHS, Target, parse_target
from deploycc.quant.cost import CPU, MACHINES, Boundary, boundaries, estimate, estimate_all, machine_of, total

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


class TestConversions:
    def formats(self, **formats: object) -> dict[str, object]:
        return {"a": FP16, "b": FP16, "c": FP16, **formats}

    @pytest.mark.parametrize(
        ("formats", "converted"),
        [
            ({}, ()),
            ({"a": INT8}, ()),
            ({"b": INT8}, ("int8",)),
            ({"a": INT8, "b": INT8}, ("int8",)),
            ({"a": INT8, "b": INT8, "c": INT8}, ()),
            ({"a": FP8, "b": INT8, "c": INT8}, ("int8",)),
            ({"a": INT8, "b": INT8, "c": FP8}, ("int8", "fp8")),
            ({"b": INT4}, ()),
        ],
    )
    def test_codes_are_written_where_all_read_them(self, formats: dict[str, object], converted: tuple[str, ...]) -> None:
        boundary = Boundary("v", "a", ("b", "c"), shared=False, microseconds=2.5)
        assert boundary.conversions(self.formats(**formats)) == converted
        assert boundary.cost(self.formats(**formats)) == 2.5 * len(converted)

    def test_what_others_read_is_written_in_full(self) -> None:
        boundary = Boundary("v", "a", ("b",), shared=True, microseconds=1.0)
        assert boundary.conversions(self.formats(a=INT8, b=INT8)) == ("int8",)

    def test_a_kernel_apart_converts_as_well(self) -> None:
        boundary = Boundary("v", "a", ("b", "c"), shared=True, microseconds=1.0, is_apart=True)
        assert boundary.conversions(self.formats(a=INT8, b=INT8, c=FP8)) == ()
        assert boundary.conversions(self.formats(b=INT8)) == ("int8",)

    def test_two_readers_are_one_boundary(self) -> None:
        crossing = Crossing("v", "a", 1000)
        regions = [Region(n, "linear", (n,), (n,), (), crossings=c) for n, c in (("a", ()), ("b", (crossing,)), ("c", (crossing,)))]
        (boundary,) = boundaries(regions, parse_target("tensorrt:sm_89"), batch=4)
        assert boundary.regions == ("a", "b", "c")
        assert boundary.microseconds == pytest.approx(4 * 1000 * 3 / (300e9 * 0.5) * 1e6 + 2.0)
        costs = estimate_all(regions, parse_target("tensorrt:sm_89"), batch=4)
        assert total(costs, [boundary], self.formats(b=INT8)) == pytest.approx(3 * 2.0 + boundary.microseconds)


class TestApart:
    """TensorRT-RTX writes floating point behind a product of codes, and has one more kernel."""

    WIDE = Region("r", "conv", ("r",), ("r",), (), activation_elements=3 * 10**6, output_elements=2 * 10**6)

    def test_only_there(self) -> None:
        fused = estimate_all([self.WIDE], parse_target("tensorrt:sm_89"), batch=1)["r"]
        apart = estimate_all([self.WIDE], parse_target("tensorrt-rtx:sm_89"), batch=1)["r"]
        assert {f for f in FORMATS if apart[f] != fused[f]} == {"int8", "fp8", "nvfp4", "mxfp8"}
        moved = (1e6 * 1.5 + 2e6 * 4) + 2e6 * (4 + 1.5)
        assert apart["int8"] == pytest.approx(moved / (300e9 * 0.5) * 1e6 + 2 * 2.0)

    def test_a_matrix_product_writes_16_bits(self) -> None:
        linear = replace(self.WIDE, kind="linear")
        moved = (1e6 * 1.5 + 2e6 * 2) + 2e6 * (2 + 1.5)
        assert estimate_all([linear], parse_target("tensorrt-rtx:sm_89"), batch=1)["r"]["int8"] == pytest.approx(moved / 150e3 + 2 * 2.0)

    def test_attention_is_as_everywhere(self) -> None:
        core = replace(self.WIDE, kind="attention")
        found = [estimate_all([core], parse_target(f"{name}:sm_89"), batch=1) for name in ("tensorrt", "tensorrt-rtx")]
        assert found[0] == found[1]
