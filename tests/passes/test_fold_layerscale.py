"""Constant scales and shifts behind convolutions and matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir
import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators, record

from passes.fold_constants import FoldConstants
from passes.fold_layerscale import FoldLayerscale

if TYPE_CHECKING:
    import onnx_ir as ir

FOLD = FoldLayerscale()
BEHIND = FoldLayerscale(layernorm="fold")


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).uniform(0.25, 1, shape).round(3)
    return f"float{list(shape)}".replace(" ", "") + f" {name} = {{{', '.join(map(str, values.ravel()))}}}"


GIVEN = ", ".join(
    [
        *(tensor("w", 4, 3, 3, 3), tensor("b", 4), tensor("deep", 3, 1, 3, 3), tensor("s", 4, 1, 1), tensor("s4", 1, 4, 1, 1)),
        *(tensor("m", 3, 4), tensor("v", 4), tensor("v3", 1, 1, 4), tensor("d", 3, 1, 1), tensor("g", 3), tensor("h", 3)),
        *(tensor("map", 1, 1, 5, 5), "float half = {0.5}", "float[1] two = {2}", "int8 nought = {0}"),
    ]
)


def image(text: str, *, outputs: str = "float[N,4,?,?] y", inputs: str = "") -> ir.Model:
    return graph(f"(float[N,3,7,7] x{inputs}) => ({outputs}) <{GIVEN}> {{ {text} }}")


def tokens(text: str, *, size: str = "N,5", outputs: str = "") -> ir.Model:
    return graph(f"(float[{size},3] x) => ({outputs or f'float[{size},4] y'}) <{GIVEN}> {{ {text} }}")


def test_before_and_expected() -> None:
    given = "float[1,1,1,1] w = {3}, float[1] b = {1}, float[1,1,1] s = {2}"
    before = graph(f"(float[N,1,2,2] x) => (float[N,1,2,2] y) <{given}> {{ a = Conv(x, w, b) y = Mul(a, s) }}")
    expected = graph(
        """(float[N,1,2,2] x) => (float[N,1,2,2] y) <float[1,1,1,1] w = {6}, float[1] b = {2}>
        { y = Conv<kernel_shape=[1,1], strides=[1,1], dilations=[1,1], pads=[0,0,0,0], group=1>(x, w, b) }"""
    )
    assert_same(apply(before, FOLD), expected)


@pytest.mark.parametrize(
    "behind",
    [
        "Mul(a, s)",
        "Mul(s4, a)",
        "Mul(a, half)",
        "Div(a, s)",
        "Div(a, two)",
        "Add(a, s)",
        "Add(s4, a)",
        "Sub(a, s)",
        "Sub(s, a)",
        "Sub(half, a)",
    ],
)
@pytest.mark.parametrize("layer", ["Conv(x, w)", "Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b)"])
def test_behind_a_convolution(layer: str, behind: str) -> None:
    before = image(f"a = {layer} y = {behind}")
    after = apply(before, FOLD)
    assert operators(after) == ["Conv"]
    assert_close(before, after, (2, 3, 7, 7), roundings=64)


@pytest.mark.parametrize("behind", ["Mul(a, v)", "Mul(v3, a)", "Div(a, v)", "Sub(half, a)", "Add(v, a)"])
@pytest.mark.parametrize("layer", ["a = MatMul(x, m)", "z = MatMul(x, m) a = Add(z, v)"])
def test_behind_a_product(layer: str, behind: str) -> None:
    before = tokens(f"{layer} y = {behind}")
    after = apply(before, FOLD)
    assert operators(after) == (["MatMul"] if "z" not in layer and behind[:3] in {"Mul", "Div"} else ["MatMul", "Add"])
    assert_close(before, after, (2, 5, 3), roundings=64)


def test_behind_a_gemm_and_in_a_row() -> None:
    before = tokens("a = Gemm<beta=0.5, alpha=2.0>(x, m, v) c = Mul(a, half) e = Add(c, v) y = Div(e, v)", size="N")
    after = apply(before, FOLD)
    assert operators(after) == ["Gemm"]
    assert_close(before, after, (3, 3), roundings=64)


@pytest.mark.parametrize("behind", ["Mul(t, s)", "Sub(s4, t)", "Mul(half, t)"])
@pytest.mark.parametrize("layer", ["a = MatMul(x, m)", "z = MatMul(x, m) a = Add(z, v)"])
def test_past_a_transposition(layer: str, behind: str) -> None:
    before = graph(
        f"(float[N,5,6,3] x) => (float[N,4,5,6] y) <{GIVEN}> {{ {layer} t = Transpose<perm=[0,3,1,2]>(a) y = {behind} }}",
    )
    after = apply(before, FOLD)
    assert operators(after)[-1] == "Transpose"
    assert_close(before, after, (2, 5, 6, 3), roundings=64)
    assert not record(after, FOLD).rewrites


def test_a_scale_of_another_axis_does_not_pass_a_transposition() -> None:
    text = "a = MatMul(x, m) t = Transpose<perm=[0,2,1,3]>(a) y = Mul(t, s)"
    before = graph(f"(float[N,4,4,3] x) => (float[N,4,4,4] y) <{GIVEN}> {{ {text} }}")
    assert not record(before, FOLD).rewrites


def test_behind_a_depthwise_convolution() -> None:
    before = image("a = Conv<group=3>(x, deep) y = Mul(a, d)", outputs="float[N,3,?,?] y")
    after = apply(before, FOLD)
    assert operators(after) == ["Conv"]
    assert_close(before, after, (1, 3, 7, 7), roundings=64)


@pytest.mark.parametrize(
    "text",
    [
        "a = Conv(x, w) y = Mul(a, map)",
        "a = Conv(x, w) c = Relu(a) y = Mul(c, s)",
        "a = Conv(x, w) y = Div(half, a)",
        "a = Conv(x, w) c = Add(a, half) e = Clip(c) y = Mul(a, e)",
    ],
)
def test_what_is_no_scale_of_channels_is_not_spoken_of(text: str) -> None:
    found = record(image(text), FOLD)
    assert (found.rewrites, found.declines) == ((), ())


def test_the_bias_of_a_product_is_its_own() -> None:
    assert not record(tokens("a = MatMul(x, m) y = Add(a, v)"), FOLD).rewrites


DECLINED = {
    "MULTI_CONSUMER": ("a = Conv(x, w) y = Mul(a, s) z = Relu(a)", {"outputs": "float[N,4,?,?] y, float[N,4,?,?] z"}),
    "GRAPH_OUTPUT": ("a = Conv(x, w) y = Mul(a, s)", {"outputs": "float[N,4,?,?] y, float[N,4,?,?] a"}),
    "NONCONST_WEIGHT": ("a = Conv(x, k) y = Mul(a, s)", {"inputs": ", float[4,3,3,3] k"}),
    "DTYPE": ("k = DequantizeLinear(q, half) a = Conv(x, k) y = Mul(a, s)", {"inputs": ", int8[4,3,3,3] q"}),
    "DYNAMIC_SHAPE": ('a = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) y = Mul(a, s)', {}),
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines(code: str) -> None:
    text, options = DECLINED[code]
    assert codes(image(text, **options), FOLD) == [code]


@pytest.mark.parametrize("scale", ["1e9, 1, 1, 1", "1e38, 1e38, 1e38, 1e38"])
def test_declines_numeric(scale: str) -> None:
    given = GIVEN.replace(tensor("s", 4, 1, 1), f"float[4,1,1] s = {{{scale}}}")
    before = graph(f"(float[N,3,7,7] x) => (float[N,4,5,5] y) <{given}> {{ a = Conv(x, w) y = Mul(a, s) }}")
    assert codes(before, FOLD) == ["NUMERIC"]


NORMALIZED = "n = LayerNormalization(x, g, h) a = MatMul(n, m) y = Add(a, v)"


def test_the_affine_part_of_a_layer_normalization_if_asked_for() -> None:
    before = tokens(NORMALIZED)
    after = apply(before, BEHIND)
    assert operators(after) == ["LayerNormalization", "MatMul", "Add"]
    assert np.all(after.graph[0].inputs[1].const_value.numpy() == 1)  # type: ignore[union-attr]
    assert len(after.graph[0].inputs) == 2
    assert_close(before, after, (2, 5, 3), roundings=64)
    assert not record(after, BEHIND).rewrites
    assert not record(before, FOLD).rewrites


def test_a_layer_normalization_with_several_readers_keeps_its_affine_part() -> None:
    before = tokens("n = LayerNormalization(x, g, h) a = MatMul(n, m) c = MatMul(n, m) y = Add(a, c)")
    assert codes(before, BEHIND) == ["MULTI_CONSUMER"]


def test_half_precision_weights_stay_half() -> None:
    before = graph(
        f"""(float16[N,3,7,7] x) => (float16[N,4,5,5] y) <{GIVEN}> {{
        k = CastLike(w, x) t = CastLike(s, x) a = Conv(x, k) y = Mul(a, t) }}"""
    )
    after = apply(before, FoldConstants(), FOLD)
    assert operators(after) == ["Conv"]
    assert {v.dtype for v in after.graph.initializers.values()} == {onnx_ir.DataType.FLOAT16}
