"""Family R of the lint: each rule on a graph that breaks it and on one that keeps it."""

from __future__ import annotations

import numpy as np
import pytest
from lint_graphs import CONV, FP8, codes, conv, findings, pair, places, quantized, stored
from small_graphs import graph, weight

ROUND = "(float[N,16] x) => (float[N,16] y) { xq = QuantizeLinear(x, s, z) y = DequantizeLinear(xq, s, z) }"


def test_a_convolution_as_it_should_be_has_no_finding_of_this_family() -> None:
    model = conv()
    assert [r for r in (f"R{i}" for i in range(1, 15)) if places(model, r)] == []


def test_r1_zero_points() -> None:
    assert places(quantized(ROUND, z=np.int8(3)), "R1") == ["n_xq"]
    assert "the zero point is 3, not 0" in findings(quantized(ROUND, z=np.int8(3)), "R1")[0].what
    assert places(quantized(ROUND), "R1") == []


def test_r1_reads_a_zero_point_behind_a_cast_and_refuses_a_computed_one() -> None:
    cast = "(float[N,16] x) => (float[N,16] y) { z8 = Cast<to=3>(z) xq = QuantizeLinear(x, s, z8) y = DequantizeLinear(xq, s, z8) }"
    assert places(quantized(cast, z=np.float32(0)), "R1") == []
    fed = "(float[N,16] x, int8 z0) => (float[N,16] y) { xq = QuantizeLinear(x, s, z0) y = DequantizeLinear(xq, s, z0) }"
    assert findings(quantized(fed), "R1")[0].what == "the zero point is computed, not constant"


@pytest.mark.parametrize(("scale", "what"), [(0.0, "zero or negative"), (np.inf, "infinite"), (-1.0, "zero or negative")])
def test_r2_scales(scale: float, what: str) -> None:
    found = findings(quantized(ROUND, s=np.float32(scale)), "R2")
    assert [f.severity for f in found] == ["error"]
    assert what in found[0].what
    assert places(quantized(ROUND), "R2") == []


def test_r2_warns_of_scales_that_their_type_can_hardly_hold() -> None:
    text = ROUND.replace("float[", "float16[")
    assert [f.severity for f in findings(quantized(text, s=np.float16(1e-7)), "R2")] == ["warning"]
    assert places(quantized(text, s=np.float16(1e-3)), "R2") == []


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_r3_types(dtype: type) -> None:
    assert places(quantized(ROUND, z=dtype(0)), "R3") == ["n_xq"]


@pytest.mark.parametrize("dtype", [np.int8, FP8])
def test_r3_knows_the_types_of_tensorrt(dtype: type) -> None:
    assert places(quantized(ROUND, z=dtype(0)), "R3") == []


def test_r3_a_type_that_nothing_says() -> None:
    text = "(float[N,16] x) => (float[N,16] y) { xq = QuantizeLinear(x, s) y = DequantizeLinear(xq, s) }"
    assert next(f.what for f in findings(quantized(text), "R3")).startswith("no zero point says the type")
    said = text.replace("QuantizeLinear(x, s)", "QuantizeLinear<output_dtype=3>(x, s)")
    assert places(quantized(said), "R3") == []


def test_r4_activations_have_one_scale() -> None:
    model = conv(s=np.full(16, 0.05, np.float32), z=np.zeros(16, np.int8))
    assert findings(model, "R4")[0].what == "the activation 'x' has 16 scales"
    assert places(conv(), "R4") == []


def test_r5_axis_of_weights() -> None:
    wrong = quantized(CONV.replace("axis=0", "axis=1"), **codes(32, 16, 3, 3, axis=1))
    assert findings(wrong, "R5")[0].what == "the weight of 'n_y' has its scales along axis 1, not 0"
    assert places(conv(), "R5") == []


@pytest.mark.parametrize(("axis", "found"), [(0, ["n_w"]), (1, [])])
def test_r5_axis_of_products(axis: int, found: list[str]) -> None:
    text = "(float[N,32] x) => (float[N,64] y) { " + pair("x") + stored(axis=axis) + "y = MatMul(x_d, w) }"
    assert places(quantized(text, **codes(32, 64, axis=axis)), "R5") == found


@pytest.mark.parametrize(("axis", "found"), [(1, ["n_w"]), (0, [])])
def test_r5_axis_behind_a_transposition(axis: int, found: list[str]) -> None:
    text = "(float[N,32] x) => (float[N,64] y) { " + pair("x") + stored(axis=axis) + "t = Transpose<perm=[1,0]>(w) y = MatMul(x_d, t) }"
    assert places(quantized(text, **codes(64, 32, axis=axis)), "R5") == found


@pytest.mark.parametrize(("size", "scales", "what"), [(12, (3, 64), "do not divide"), (16, (2,), "1 axes")])
def test_r6_blocks(size: int, scales: tuple[int, ...], what: str) -> None:
    text = f"(float[N,32] x) => (float[N,64] y) {{ w = DequantizeLinear<axis=0, block_size={size}>(wq, ws) y = MatMul(x, w) }}"
    constants = {"wq": codes(32, 64)["wq"], "ws": np.full(scales, 0.05, np.float32)}
    proto_free = quantized(text, **constants)
    assert what in findings(proto_free, "R6")[0].what
    whole = quantized(text.replace(f"block_size={size}", "block_size=16"), **{**constants, "ws": np.full((2, 64), 0.05, np.float32)})
    assert places(whole, "R6") == []


def test_r7_scale_of_another_type() -> None:
    text = "(float16[N,16] x) => (float[N,16] y) { xq = QuantizeLinear(x, s, z) y = DequantizeLinear(xq, s, z) }"
    assert findings(quantized(text), "R7")[0].what == "the scale is FLOAT, the value FLOAT16"
    assert places(quantized(text.replace("(float[", "(float16["), s=np.float16(0.05)), "R7") == []


def test_r7_casts_beside_a_pair() -> None:
    text = "(float16[N,16] x) => (float16[N,16] y) { r = Relu(x) c = Cast<to=1>(r) " + pair("c") + "d = Cast<to=10>(c_d) y = Neg(d) }"
    assert places(quantized(text), "R7") == ["n_c_dq", "n_c_d"]
    free = "(float16[N,16] x) => (float16[N,16] y) { r = Relu(x) " + pair("r") + "y = Neg(r_d) }"
    assert places(quantized(free, s=np.float16(0.05)), "R7") == []


def test_r8_scalars() -> None:
    text = "(float[N,16] x) => (float[N,16] y) { " + pair("c") + "y = Mul(x, c_d) }"
    assert places(quantized(text, c=np.float32(2)), "R8") == ["n_c_dq"]
    assert places(quantized(text, c=np.ones(16, np.float32)), "R8") == []


@pytest.mark.parametrize(("opset", "found"), [(13, ["n_xq", "n_y"]), (19, [])])
def test_r9_opset_of_fp8(opset: int, found: list[str]) -> None:
    assert places(quantized(ROUND, opset=opset, z=FP8(0)), "R9") == found


def test_r10_operators_that_are_not_parsed() -> None:
    text = "(uint8[N,16] x) => (int32[N,8] y) { y = MatMulInteger(x, w) }"
    assert places(graph(text, w=np.ones((16, 8), np.int8)), "R10") == ["n_y"]
    assert places(conv(), "R10") == []


BIASED = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { " + pair("x") + stored() + "%s y = Conv<pads=[1,1,1,1]>(x_d, w, b) }"


def test_r12_bias_of_32_bits() -> None:
    bias = {"bq": np.arange(32, dtype=np.int32), "bs": np.full(32, 1e-3, np.float32), "bz": np.zeros(32, np.int32)}
    found = findings(quantized(BIASED % stored("b"), **codes(32, 16, 3, 3), **bias), "R12")
    assert [(f.node, f.severity) for f in found] == [("n_b", "error")]
    assert places(quantized(BIASED % "", b=weight(32), **codes(32, 16, 3, 3)), "R12") == []


def test_r12_bias_of_8_bits_is_a_warning() -> None:
    found = findings(quantized(BIASED % stored("b"), **codes(32, 16, 3, 3), **codes(32, name="b")), "R12")
    assert [(f.node, f.severity) for f in found] == [("n_b", "warning")]


def test_r13_weights_that_the_builder_quantizes() -> None:
    text = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { " + pair("x") + pair("w") + "y = Conv<pads=[1,1,1,1]>(x_d, w_d) }"
    found = findings(quantized(text, w=weight(32, 16, 3, 3)), "R13")
    assert [f.what for f in found] == [f"1 constants are stored in floating point; codes would save {32 * 16 * 9 * 3} bytes"]
    assert places(conv(), "R13") == []


def test_r14_equal_scales_of_a_concat() -> None:
    text = "(float[N,16] a, float[N,16] b) => (float[N,32] y) { " + pair("a") + pair("b", "t") + "y = Concat<axis=1>(a_d, b_d) }"
    assert places(quantized(text, t=np.float32(0.05)), "R14") == ["n_y"]
    assert places(quantized(text.replace("(b, t", "(b, s").replace("b_dq, t", "b_dq, s")), "R14") == []
