"""Family P of the lint: each rule on a graph that breaks it and on one that keeps it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from lint_graphs import CONV, FP8, codes, conv, findings, pair, places, quantized, stored
from small_graphs import weight

W = codes(32, 16, 3, 3)
IMAGE = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { "
TWO = {**codes(32, 16, 3, 3, name="u"), **codes(32, 32, 3, 3, name="v")}
SAME = "Conv<pads=[1,1,1,1]>"


def residual(branch: str = "b", skip: str = "a_d", behind: str = pair("r", out="rd")) -> ir.Model:
    """Return a block whose sum reads the named values: two convolutions on the branch, one on the skip, which makes it the skip (P4)."""
    text = IMAGE + pair("x") + stored("u") + stored("v") + stored("w") + f"a = {SAME}(x_d, u) " + pair("a")
    text += f"b = {SAME}(a_d, v) " + (pair("b") if branch == "b_d" else "") + f"c = Add({branch}, {skip}) r = Relu(c) " + behind
    return quantized(text + f"y = {SAME}({'rd' if behind else 'r'}, w) }}", **TWO, **codes(32, 32, 3, 3))


def test_p1_both_operands() -> None:
    weight_only = IMAGE + stored() + f"y = {SAME}(x, w) }}"
    activation_only = IMAGE + pair("x") + f"y = {SAME}(x_d, w) }}"
    assert findings(quantized(weight_only, **W), "P1")[0].what == "the weight is quantized, the activation is not"
    assert findings(quantized(activation_only, w=weight(32, 16, 3, 3)), "P1")[0].what == "the activation is quantized, the weight is not"
    assert places(conv(), "P1") == []


def test_p1_weight_only_products_are_a_matter_of_choice() -> None:
    text = "(float[N,32] x) => (float[N,64] y) { " + stored(axis=1) + "y = MatMul(x, w) }"
    assert [f.severity for f in findings(quantized(text, **codes(32, 64, axis=1)), "P1")] == ["note"]


BEFORE = IMAGE + pair("x") + stored() + f"c = {SAME}(x_d, w) "
ONES = {name: np.ones(32, np.float32) for name in "gbmv"}


def test_p2_outputs() -> None:
    assert places(quantized(BEFORE + pair("c") + "t = Softsign(c_d) y = Neg(t) }", **W), "P2") == ["n_c_d"]
    assert places(conv(), "P2") == []


@pytest.mark.parametrize("after", ["Relu(c_d)", "LeakyRelu(c_d)", "BatchNormalization(c_d, g, b, m, v)"])
def test_p3_what_is_fused_with_a_convolution(after: str) -> None:
    assert places(quantized(BEFORE + pair("c") + f"y = {after} }}", **W, **ONES), "P3")[0] == "n_c_d"
    assert places(quantized(BEFORE + "r = Relu(c) " + pair("r") + "y = Neg(r_d) }", **W), "P3") == []


def test_p3_a_normalization_that_is_not_folded() -> None:
    assert places(quantized(BEFORE + "y = BatchNormalization(c, g, b, m, v) }", **W, **ONES), "P3") == ["n_y"]


def test_p4_and_p5_residual_sums() -> None:
    assert (places(residual(), "P4"), places(residual(), "P5")) == ([], [])
    assert places(residual(skip="a"), "P4") == ["n_c"]
    assert places(residual(branch="b_d"), "P5") == ["n_b_d"]


def test_p4_matters_only_where_the_sum_is_quantized() -> None:
    assert places(residual(skip="a", behind=""), "P4") == []


POOLED = "(float[N,16,8,8] x) => (float[N,16,1,1] y) { n = Neg(x) " + pair("n") + "p = GlobalAveragePool(n_d) %s }"


def test_p6_both_sides() -> None:
    assert places(quantized(POOLED % "y = Abs(p)"), "P6") == ["n_n_d"]
    assert places(quantized(POOLED % (pair("p") + "y = Abs(p_d)")), "P6") == []


MOVED = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { n = Neg(x) " + pair("n") + "m = MaxPool<kernel_shape=[1,1]>(n_d) "


@pytest.mark.parametrize(("scale", "found"), [(0.05, []), (0.06, ["n_m"])])
def test_p7_scales_around_moves(scale: float, found: list[str]) -> None:
    text = MOVED + pair("m", "t") + stored() + f"y = {SAME}(m_d, w) }}"
    assert places(quantized(text, **W, t=np.float32(scale)), "P7") == found


CONCAT = (
    "(float[N,16,8,8] a, float[N,16,8,8] b) => (float[N,32,8,8] y) { "
    + pair("a")
    + "%s c = Concat<axis=1>(a_d, %s) "
    + pair("c")
    + "y = Abs(c_d) }"
)


@pytest.mark.parametrize(("scale", "found"), [(0.05, []), (0.06, ["n_c"])])
def test_p8_scales_of_a_concat(scale: float, found: list[str]) -> None:
    assert places(quantized(CONCAT % (pair("b", "t"), "b_d"), t=np.float32(scale)), "P8") == found


def test_p8_all_inputs_or_none() -> None:
    assert findings(quantized(CONCAT % ("", "b")), "P8")[0].what == "1 of 2 inputs are not quantized"


SHARED = (
    "(float[N,16,8,8] x) => (float[N,32,8,8] y) { " + pair("x") + "%s" + stored() + f"a = {SAME}(x_d, w) b = {SAME}(%s, w) y = Add(a, b) }}"
)


def test_p9_shared_pairs() -> None:
    twice = SHARED % (pair("x", "t", out="x_e"), "x_e")
    assert findings(quantized(twice, **W, t=np.float32(0.05)), "P9")[0].what == "'x' is quantized 2 times, equally"
    assert findings(quantized(twice, **W, t=np.float32(0.06)), "P9")[0].what == "'x' is quantized 2 times, differently"
    assert places(quantized(SHARED % ("", "x_d"), **W), "P9") == []


def test_p9_two_formats_of_one_value_are_two_pairs() -> None:
    text = SHARED % (pair("x", "t", "f", out="x_e"), "x_e")
    assert places(quantized(text, **W, t=np.float32(0.01), f=FP8(0)), "P9") == []


def test_p10_pairs_without_a_purpose() -> None:
    again = CONV.replace(pair("x"), pair("x", out="x0") + pair("x0", out="x_d"))
    assert findings(quantized(again, **W), "P10")[0].what == "it quantizes again what 'n_x0' has just dequantized"
    unread = "(float[N,16] x) => (float[N,16] y) { " + pair("x") + "y = Neg(x) }"
    assert findings(quantized(unread), "P10")[0].what == "nothing reads it"
    float_only = "(float[N,16] x) => (float[N,16] y) { " + pair("x") + "y = Neg(x_d) }"
    assert findings(quantized(float_only), "P10")[0].what == "'x' is quantized for Neg, which computes in floating point"
    assert places(conv(), "P10") == []


SILU = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { " + pair("x") + stored() + f"c = {SAME}(x_d, w) "


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (pair("c") + "g = Sigmoid(c_d) m = Mul(c_d, g) y = Neg(m) }", ["n_c_d"]),
        ("g = Sigmoid(c) " + pair("g") + "m = Mul(c, g_d) y = Neg(m) }", ["n_g_d"]),
        ("g = Sigmoid(c) m = Mul(c, g) " + pair("m") + "y = Neg(m_d) }", []),
    ],
    ids=["before", "within", "behind"],
)
def test_p11_silu(body: str, found: list[str]) -> None:
    assert places(quantized(SILU + body, **W), "P11") == found


GELU = "(float[N,64] x) => (float[N,64] y) { %s d = Div(%s, r2) e = Erf(d) %s f = Add(%s, one) m = Mul(x, f) y = Mul(m, half) }"
NUMBERS = {"r2": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}


@pytest.mark.parametrize(
    ("parts", "found"), [((pair("x"), "x_d", "", "e"), ["n_x_d"]), (("", "x", pair("e"), "e_d"), ["n_e_d"]), (("", "x", "", "e"), [])]
)
def test_p12_bodies(parts: tuple[str, ...], found: list[str]) -> None:
    assert places(quantized(GELU % parts, **NUMBERS), "P12") == found


def test_p12_a_bias_before_gelu_is_no_body() -> None:
    text = (
        "(float[N,32] x) => (float[N,32] y) { "
        + pair("x")
        + stored(axis=1)
        + "m = MatMul(x_d, w) "
        + pair("m")
        + "a = Add(m_d, b) y = Gelu(a) }"
    )
    model = quantized(text, b=weight(32), **codes(32, 32, axis=1))
    assert (places(model, "P12"), places(model, "P2")) == ([], ["n_m_d"])


PROJECTED = (
    "(float[N,32] x) => (float[N,64] y, float[N,64] y2) { l = LayerNormalization(x, g, b) " + pair("l")
    + stored("u", axis=1) + "%s y = MatMul(l_d, u) y2 = MatMul(%s) }"
)  # fmt: skip


@pytest.mark.parametrize(("parts", "found"), [((stored("v", axis=1), "l_d, v"), []), (("", "l, k"), ["n_l"])])
def test_p13_projections(parts: tuple[str, str], found: list[str]) -> None:
    constants = {**codes(32, 64, axis=1, name="u"), **codes(32, 64, axis=1, name="v"), "k": weight(32, 64)}
    model = quantized(PROJECTED % parts, **constants, g=np.ones(32, np.float32), b=np.zeros(32, np.float32))
    assert places(model, "P13") == found


STEM = "(float[N,16,8,8] x) => (float[N,32,7,7] y) { " + pair("x") + stored() + f"c = {SAME}(x_d, w) r = Relu(c) "


@pytest.mark.parametrize(
    ("tail", "found"),
    [
        (pair("r") + "p = MaxPool<kernel_shape=[2,2]>(r_d) y = Neg(p) }", ["n_r_d"]),
        ("p = MaxPool<kernel_shape=[2,2]>(r) " + pair("p") + "y = Neg(p_d) }", []),
    ],
)
def test_p14_stem(tail: str, found: list[str]) -> None:
    assert places(quantized(STEM + tail, **W), "P14") == found


def test_p15_constants_of_pointwise_ops() -> None:
    text = "(float[N,32] x) => (float[N,32] y) { %s y = Mul(x, k) }"
    assert places(quantized(text % stored("k"), **codes(32, name="k")), "P15") == ["n_k"]
    assert places(quantized(text % "", k=weight(32)), "P15") == []


def test_p16_outputs() -> None:
    text = CONV.replace("y = Conv<pads=[1,1,1,1]>(x_d, w) }", f"c = {SAME}(x_d, w) " + pair("c", out="y") + "}")
    assert places(quantized(text, **W), "P16") == ["n_y"]
    assert places(conv(), "P16") == []


def test_p17_plugins() -> None:
    model = conv()
    proto = ir.serde.serialize_model(model)
    proto.graph.node.append(onnx.helper.make_node("Deform", ["x_d"], ["out"], name="plugin", domain="trt.plugins"))
    proto.opset_import.append(onnx.helper.make_opsetid("trt.plugins", 1))
    assert places(ir.serde.deserialize_model(proto), "P17") == ["plugin"]
    assert places(model, "P17") == []


@pytest.mark.parametrize(("scale", "found"), [(0.05, []), (0.06, ["n_r"])])
def test_p18_resize(scale: float, found: list[str]) -> None:
    text = "(float[N,16,8,8] x) => (float[N,16,16,16] y) { " + pair("x") + "r = Resize(x_d, , k) " + pair("r", "t") + "y = Neg(r_d) }"
    assert places(quantized(text, k=np.array([1, 1, 2, 2], np.float32), t=np.float32(scale)), "P18") == found


def test_s9_norms_and_softmax() -> None:
    text = "(float[N,32] x) => (float[N,32] y) { " + pair("x") + "y = Softmax(%s) }"
    assert places(quantized(text % "x_d"), "S9") == ["n_x_d"]
    assert places(quantized(text % "x"), "S9") == []


def test_s9_squares_in_fp16() -> None:
    text = "(%s[N,32] x) => (%s[N,1] y) { p = Pow(x, two) y = ReduceMean<keepdims=1>(p, axes) }"
    constants = {"axes": np.array([-1])}
    assert places(quantized(text % ("float16", "float16"), two=np.float16(2), **constants), "S9") == ["n_p"]
    assert places(quantized(text % ("float", "float"), two=np.float32(2), **constants), "S9") == []
