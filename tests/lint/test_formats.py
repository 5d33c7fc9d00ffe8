"""Families S, F, X, T and D of the lint: each rule on a graph that breaks it and on one that keeps it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from lint_graphs import CONV, FP8, codes, conv, findings, pair, places, quantized, stored
from small_graphs import weight

from deploycc.core.formats import FP8 as FP8_FORMAT
from deploycc.core.formats import FP16, FP32, INT8

W = codes(32, 16, 3, 3)
EIGHT = {"s": np.float32(1 / 448), "z": FP8(0)}


def convolution(out: int, per_group: int, kernel: int = 3, group: int = 1, dtype: type = np.int8) -> ir.Model:
    """Return a quantized convolution of a size."""
    side, pads = 8, [kernel // 2] * 4
    text = f"(float[N,{per_group * group},{side},{side}] x) => (float[N,{out},{side},{side}] y) {{ " + pair("x") + stored()
    text += f"y = Conv<pads={pads}, group={group}>(x_d, w) }}"
    return quantized(text, **codes(out, per_group, kernel, kernel, dtype=dtype), s=np.float32(0.01), z=dtype(0))


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("S2", convolution(6, 6), convolution(16, 16)),
        ("S3", convolution(16, 16, dtype=FP8), convolution(32, 32, dtype=FP8)),
        ("S3", convolution(32, 32, kernel=7, dtype=FP8), convolution(32, 32, kernel=5, dtype=FP8)),
        ("S5", convolution(12, 3, group=4), convolution(16, 4, group=4)),
        ("S8", convolution(40, 32), convolution(64, 32)),
    ],
    ids=["S2", "S3-channels", "S3-taps", "S5", "S8"],
)
def test_sizes_of_convolutions(rule: str, bad: ir.Model, good: ir.Model) -> None:
    assert places(bad, rule) == ["n_y"]
    assert places(good, rule) == []


@pytest.mark.parametrize(("width", "found"), [(10, ["n_y"]), (16, [])])
def test_s1_narrow_products(width: int, found: list[str]) -> None:
    text = f"(float[N,32] x) => (float[N,{width}] y) {{ " + pair("x") + stored(axis=1) + "y = MatMul(x_d, w) }"
    assert places(quantized(text, **codes(32, width, axis=1)), "S1") == found


def test_s4_computed_weights() -> None:
    text = "(float[N,16,8,8] x, float[32,16,3,3] k) => (float[N,32,8,8] y) { " + pair("x") + "%s y = Conv<pads=[1,1,1,1]>(x_d, %s) }"
    assert places(quantized(text % (pair("k"), "k_d")), "S4") == ["n_y"]
    assert places(quantized(text % ("", "k")), "S4") == []


def test_t1_transposed_convolutions() -> None:
    text = "(float[N,16,8,8] x) => (float[N,32,10,10] y) { " + pair("x") + stored(axis=1) + "y = ConvTranspose(x_d, w) }"
    assert places(quantized(text, **codes(16, 32, 3, 3, axis=1)), "T1") == ["n_y"]
    assert places(conv(), "T1") == []


def attention(head: int = 32, length: int = 16, dtype: type = np.int8, **changes: str) -> ir.Model:
    """Return an attention core with pairs on all four operands; ``changes`` replace its lines."""
    lines = {
        "q": pair("q"), "k": pair("k"), "first": "s0 = MatMul(q_d, k_d)", "scores": "", "softmax": "p = Softmax<axis=-1>(s0)",
        "p": pair("p", "sp"), "v": pair("v"), "second": "o = MatMul(p_d, v_d)", **changes,
    }  # fmt: skip
    shape = f"float[N,2,{length},{head}]"
    text = f"({shape} q, float[N,2,{head},{length}] k, {shape} v) => ({shape} o) {{ {' '.join(lines.values())} }}"
    return quantized(text, s=np.float32(0.01), z=dtype(0), sp=np.float32(1 / 448), c=np.float32(0.2))


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("S6", attention(length=1024), attention()),
        ("S6", attention(head=24), attention(head=64)),
        ("S7", attention(head=8, dtype=FP8), attention(head=16, dtype=FP8)),
        ("F1", attention(p="", second="o = MatMul(p, v_d)"), attention()),
        ("F2", attention(dtype=FP8, scores="s1 = Mul(s0, c)", softmax="p = Softmax<axis=-1>(s1)"), attention(dtype=FP8)),
        ("F5", attention(scores=pair("s0"), softmax="p = Softmax<axis=-1>(s0_d)"), attention()),
    ],
    ids=["S6-length", "S6-head", "S7", "F1", "F2", "F5"],
)
def test_attention(rule: str, bad: ir.Model, good: ir.Model) -> None:
    assert len(places(bad, rule)) == 1
    assert places(good, rule) == []


def test_f2_concerns_fp8_only() -> None:
    assert places(attention(scores="s1 = Mul(s0, c)", softmax="p = Softmax<axis=-1>(s1)"), "F2") == []


def test_f3_transposed_keys() -> None:
    turned = attention(k=pair("v", out="k1") + "k_d = Transpose<perm=[0,1,3,2]>(k1)")
    first = attention(k="k0 = Transpose<perm=[0,1,3,2]>(v) " + pair("k0", out="k_d"))
    assert [f.severity for f in findings(turned, "F3")] == ["warning"]
    assert places(first, "F3") == []


def test_f3_transposed_weights_are_a_note() -> None:
    text = "(float[N,32] x) => (float[N,64] y) { " + pair("x") + stored() + "t = Transpose<perm=[1,0]>(w) y = MatMul(x_d, t) }"
    assert [f.severity for f in findings(quantized(text, **codes(64, 32)), "F3")] == ["note"]


@pytest.mark.parametrize(("scale", "found"), [(1 / 448, []), (0.01, ["n_p_d"])])
def test_f4_softmax_scale(scale: float, found: list[str]) -> None:
    text = "(float[N,32] x) => (float[N,32] y) { p = Softmax(x) " + pair("p") + "y = Neg(p_d) }"
    assert places(quantized(text, s=np.float32(scale), z=FP8(0)), "F4") == found
    assert places(quantized(text, s=np.float32(scale)), "F4") == []


def test_f9_attention_as_one_node() -> None:
    text = "(float[N,2,16,32] q) => (float[N,2,16,32] o) { %s o = Attention(%s, q, q) }"
    assert places(quantized(text % (pair("q"), "q_d"), opset=23), "F9") == ["n_o"]
    assert places(quantized(text % ("", "q"), opset=23), "F9") == []


TWO = "(float[N,32] x) => (float[N,32] y) { " + pair("x") + stored("u", axis=1) + "h = MatMul(x_d, u) "
TWO += pair("h", "t", "f") + stored("v", axis=1) + "y = MatMul(h_d, v) }"


def two(kind: type) -> ir.Model:
    """Return two products, one in INT8 and one in ``kind``."""
    constants = {**codes(32, 32, axis=1, name="u"), **codes(32, 32, axis=1, name="v", dtype=kind)}
    return quantized(TWO, **constants, t=np.float32(0.01), f=kind(0))


def test_x1_two_formats() -> None:
    assert places(two(FP8), "X1") == ["n_h_d"]
    assert places(two(np.int8), "X1") == []


def test_x2_regions_alone() -> None:
    assert findings(two(FP8), "X2")[0].what == "2 of 2 quantized regions have no neighbour in their format"
    assert places(two(np.int8), "X2") == []


def test_x3_operands_of_two_formats() -> None:
    assert findings(conv(**EIGHT), "X3")[0].what == "its operands are quantized to fp8 and int8"
    assert places(conv(), "X3") == []
    assert places(conv(z=np.uint8(0)), "X3") == []


def test_x3_products_of_one_value() -> None:
    text = (
        "(float[N,32] x) => (float[N,64] y, float[N,64] y2) { " + pair("x") + stored("u", axis=1) + "y = MatMul(x_d, u) y2 = MatMul(%s) }"
    )
    constants = {**codes(32, 64, axis=1, name="u"), "k": weight(32, 64)}
    assert [f.severity for f in findings(quantized(text % "x, k", **constants), "X3")] == ["warning"]
    assert places(quantized((text % "x_d, u"), **constants), "X3") == []


@pytest.mark.parametrize(("formats", "found"), [({FP32, FP16, INT8}, ["n_h_d"]), ({FP32, FP16, INT8, FP8_FORMAT}, [])])
def test_x4_formats_of_the_target(formats: set[object], found: list[str]) -> None:
    assert places(two(FP8), "X4", target="t", formats=frozenset(formats)) == found
    assert places(two(FP8), "X4") == []


def test_x5_casts() -> None:
    text = "(float16[N,32] x) => (float16[N,32] y) { a = Cast<to=1>(x) %s b = Cast<to=10>(%s) y = Neg(b) }"
    assert places(quantized(text % ("", "a")), "X5") == ["n_b"]
    assert places(quantized(text % ("t = Sqrt(a)", "t")), "X5") == []


def test_t2_scalar_scales() -> None:
    assert places(conv(s=np.array([0.05], np.float32), z=np.array([0], np.int8)), "T2") == ["n_x_dq"]
    assert places(conv(), "T2") == []


def test_t3_joint_projections() -> None:
    head = "(float[N,16,32] x) => (float[N,16,32] y) { " + pair("x") + stored(axis=1) + "j = MatMul(x_d, w) "
    split = head + "a, b, c = Split<axis=-1, num_outputs=3>(j) d = Mul(a, b) y = Mul(c, d) }"
    assert places(quantized(split, **codes(32, 96, axis=1)), "T3") == ["n_j"]
    assert places(quantized(head + "y = Neg(j) }", **codes(32, 32, axis=1)), "T3") == []
    rolled = head + "a = Slice(j, i3, i16, i1) b = Slice(j, i0, i3, i1) y = Concat<axis=1>(a, b) }"
    indices = {f"i{n}": np.array([n]) for n in (0, 1, 3, 16)}
    assert places(quantized(rolled, **codes(32, 32, axis=1), **indices), "T3") == []


def test_t5_casts_to_narrow_types() -> None:
    text = "(float[N,32] x) => (float[N,32] y) { a = Cast<to=%d>(x) y = Cast<to=1>(a) }"
    assert places(quantized(text % 17), "T5") == ["n_a", "n_y"]
    assert places(quantized(text % 10), "T5") == []


def test_d1_decisions() -> None:
    text = "(float[N,32] x) => (int64[N,1] y) { " + pair("x") + "y = ArgMax<axis=1>(%s) }"
    assert places(quantized(text % "x_d"), "D1") == ["n_x_d"]
    assert places(quantized(text % "x"), "D1") == []


def test_what_a_target_lacks_is_an_error_and_a_convolution_as_it_should_be_is_clean() -> None:
    assert {f.severity for f in findings(two(FP8), "X4", target="t", formats=frozenset({INT8}))} == {"error"}
    assert [f.rule for f in findings(quantized(CONV, **W), "X4", target="t", formats=frozenset({INT8}))] == []


def test_d2_sampling_positions() -> None:
    text = "(float[N,4,8,8] x, float[N,8,8,2] g) => (float[N,4,8,8] y) { %s y = GridSample(x, %s) }"
    assert places(quantized(text % (pair("g"), "g_d")), "D2") == ["n_y"]
    assert places(quantized(text % ("", "g")), "D2") == []
