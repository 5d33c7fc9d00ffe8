"""Chains of convolutions: what becomes one, and what stays and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators, record

from passes.merge_convolutions import MergeConvolutions

if TYPE_CHECKING:
    import onnx_ir as ir

MERGE = MergeConvolutions()


def tensor(name: str, *shape: int, zero: bool = False) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).uniform(-1, 1, shape).round(3) * (not zero)
    return f"float{list(shape)}".replace(" ", "") + f" {name} = {{{', '.join(map(str, values.ravel()))}}}"


def chain(*layers: str, weights: str, channels: int = 4, outputs: int = 4, spatial: str = "9,7", between: str = "") -> str:
    """Return a graph of convolutions, each ``attributes(constants)``; ``between`` stands behind the first."""
    lines, value = [], "x"
    for index, layer in enumerate(layers):
        name = "y" if index == len(layers) - 1 else f"v{index}"
        attributes, constants = layer.split("(")
        lines.append(f"{name} = Conv{attributes}({value}, {constants}")
        value = name
        if index == 0 and between:
            lines.append(between)
            value = "b"
    axes = ",".join("?" * len(spatial.split(",")))
    return f"(float[N,{channels},{spatial}] x) => (float[N,{outputs},{axes}] y) <{weights}> {{ {' '.join(lines)} }}"


def test_before_and_expected() -> None:
    before = graph(
        """(float[N,1,4,4] x) => (float[N,1,2,2] y) <float[1,1,3,3] w = {1,2,3,4,5,6,7,8,9}, float[1] c = {1}, float[1,1,1,1] v = {2}>
        { a = Conv(x, w, c) y = Conv(a, v) }"""
    )
    expected = graph(
        """(float[N,1,4,4] x) => (float[N,1,2,2] y) <float[1,1,3,3] w = {2,4,6,8,10,12,14,16,18}, float[1] c = {2}>
        { y = Conv<kernel_shape=[3,3], strides=[1,1], dilations=[1,1], pads=[0,0,0,0], group=1>(x, w, c) }"""
    )
    assert_same(apply(before, MERGE), expected)


CHAINS = {
    "1x1 to 3x3": (("(w)", "<pads=[1,1,1,1]>(v, c)"), [("w", 8, 4, 1, 1), ("v", 4, 8, 3, 3), ("c", 4)]),
    "3x3 to 1x1": (("<pads=[1,1,1,1]>(w, c)", "(v, d)"), [("w", 16, 4, 3, 3), ("c", 16), ("v", 4, 16, 1, 1), ("d", 4)]),
    "padding on the first": (("<pads=[1,1,1,1]>(w, c)", "(v)"), [("w", 6, 4, 1, 1), ("c", 6), ("v", 4, 6, 3, 3)]),
    "pointwise, depthwise": (("<group=2>(w)", "<group=4, pads=[1,0,1,2]>(v)"), [("w", 4, 2, 1, 1), ("v", 4, 1, 3, 3)]),
    "pointwise, depthwise, pointwise": (
        ("<pads=[1,1,1,1]>(w, c)", "<group=24, strides=[2,2]>(v)", "(u, d)"),
        [("w", 24, 4, 1, 1), ("c", 24), ("v", 24, 1, 3, 3), ("u", 4, 24, 1, 1), ("d", 4)],
    ),
    "grouped, depthwise": (("<group=2>(w)", "<group=4>(v)"), [("w", 4, 2, 3, 3), ("v", 4, 1, 1, 1)]),
    "both strided": (("<strides=[2,2], pads=[1,1,1,1]>(w)", "<strides=[2,1]>(v)"), [("w", 12, 4, 3, 3), ("v", 4, 12, 1, 1)]),
    "dilated": (("(w)", "<dilations=[2,2], pads=[2,2,2,2]>(v)"), [("w", 4, 4, 1, 1), ("v", 4, 4, 3, 3)]),
    "separable": (("<pads=[1,0,1,0]>(w)", "<pads=[0,1,0,1]>(v)"), [("w", 8, 4, 3, 1), ("v", 4, 8, 1, 3)]),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("spatial", ["9,7", "H,W"])
def test_merges(name: str, spatial: str) -> None:
    layers, weights = CHAINS[name]
    outputs = next(w[1] for w in reversed(weights) if len(w) == 5)
    given = ", ".join(tensor(n, *shape) for n, *shape in weights)
    before = graph(chain(*layers, weights=given, outputs=outputs, spatial=spatial))
    after = apply(before, MERGE)
    assert operators(after) == ["Conv"]
    for size in [(1, 4, 9, 7)] + [(3, 4, 12, 15), (2, 4, 5, 5)] * (spatial == "H,W"):
        assert_close(before, after, size, roundings=256)


def pair(text: str, *, outputs: str = "float[N,4,?,?] y", inputs: str = "", size: str = "9,7") -> ir.Model:
    return graph(f"(float[N,4,{size}] x{inputs}) => ({outputs}) <{GIVEN}> {{ {text} }}")


GIVEN = ", ".join(
    [
        *(tensor("w", 16, 4, 3, 3), tensor("b", 16), tensor("v", 4, 16, 1, 1), tensor("small", 16, 4, 1, 1), tensor("large", 4, 16, 3, 3)),
        *(
            tensor("halves", 12, 2, 1, 1),
            tensor("thirds", 12, 4, 1, 1),
            tensor("wide", 16, 1, 1, 1),
            tensor("narrow", 1, 4, 1, 1),
            tensor("four", 4, 4, 1, 1),
        ),
        *("float half = {0.5}", "float[16] g = {" + ", ".join(["1"] * 16) + "}", "int64[5] parts = {0, 4, 4, 9, 7}"),
        *("int64[4] whole = {0, 16, 9, 7}", "int8 nought = {0}", "float[16,1,1] ones = {" + ", ".join(["1"] * 16) + "}", tensor("c4", 4)),
    ]
)
FIRST = "a = Conv<pads=[1,1,1,1]>(x, w, b)"
DECLINED = {
    "MULTI_CONSUMER": (f"{FIRST} y = Conv(a, v) z = Relu(a)", {"outputs": "float[N,4,?,?] y, float[N,16,?,?] z"}),
    "GRAPH_OUTPUT": (f"{FIRST} y = Conv(a, v)", {"outputs": "float[N,4,?,?] y, float[N,16,?,?] a"}),
    "NONCONST_WEIGHT": (f"{FIRST} y = Conv(a, k)", {"inputs": ", float[4,16,1,1] k"}),
    "PAD2_NONZERO": (f"{FIRST} y = Conv<pads=[1,1,1,1]>(a, large)", {}),
    "STRIDE_GROWTH": ("a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w, b) y = Conv(a, large)", {}),
    "GROUP_MISMATCH": ("a = Conv<group=2>(x, halves) y = Conv<group=3>(a, thirds)", {"outputs": "float[N,12,?,?] y"}),
    "SHUFFLE": (f"{FIRST} c = Reshape(a, parts) d = Transpose<perm=[0,2,1,3,4]>(c) e = Reshape(d, whole) y = Conv(e, v)", {}),
    "DATA_DEPENDENT": (f"{FIRST} c = GlobalAveragePool(a) d = Sigmoid(c) e = Mul(a, d) y = Conv(e, v)", {}),
    "ACTIVATION_BETWEEN": (f"{FIRST} c = LeakyRelu<alpha=0.2>(a) y = Conv(c, v)", {}),
    "DTYPE": (f"{FIRST} c = QuantizeLinear(a, half, nought) d = DequantizeLinear(c, half, nought) y = Conv(d, v)", {}),
    "COST": ("a = Conv(x, narrow) y = Conv(a, wide)", {"outputs": "float[N,16,?,?] y"}),
    "DYNAMIC_SHAPE": (f'{FIRST} y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(a, v)', {}),
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines(code: str) -> None:
    text, options = DECLINED[code]
    assert codes(pair(text, **options), MERGE) == [code]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("ACTIVATION_BETWEEN", f"{FIRST} c = PRelu(a, half) y = Conv(c, v)"),
        ("DATA_DEPENDENT", f"{FIRST} c = InstanceNormalization(a, g, g) y = Conv(c, v)"),
        ("DTYPE", f"{FIRST} c = Cast<to=10>(a) d = Cast<to=1>(c) y = Conv(d, v)"),
        ("DTYPE", f"{FIRST} k = QuantizeLinear(v, half, nought) l = DequantizeLinear(k, half, nought) y = Conv(a, l)"),
        ("PAD2_NONZERO", "a = Conv(x, small, b) y = Conv<pads=[1,1,1,1]>(a, large)"),
    ],
)
def test_declines_other_forms(code: str, text: str) -> None:
    assert codes(pair(text), MERGE) == [code]


@pytest.mark.parametrize(
    "text",
    [
        f"{FIRST} c = Relu(a) y = Conv(c, v)",
        f"{FIRST} c = Sigmoid(a) d = Mul(a, c) y = Conv(d, v)",
        f"{FIRST} c = LeakyRelu<alpha=0.2>(a) y = Conv<pads=[1,1,1,1]>(c, large)",
        "y = Conv(x, four)",
    ],
)
def test_ordinary_networks_are_not_spoken_of(text: str) -> None:
    assert codes(pair(text), MERGE) == []


def test_declines_numeric() -> None:
    given = "float[4,1,1,1] w = {1e30, 1e30, 1e30, 1e30}, float[1,4,1,1] v = {1e30, 1, 1, 1}"
    before = graph(f"(float[N,1,4,4] x) => (float[N,1,4,4] y) <{given}> {{ a = Conv(x, w) y = Conv(a, v) }}")
    assert codes(before, MERGE) == ["NUMERIC"]
    assert operators(apply(before, MERGE)) == ["Conv", "Conv"]


def test_a_slope_of_1_is_no_activation() -> None:
    before = pair(f"{FIRST} c = LeakyRelu<alpha=1.0>(a) d = PRelu(c, ones) y = Conv(d, v)")
    after = apply(before, MERGE)
    assert operators(after) == ["Conv"]
    assert_close(before, after, (2, 4, 9, 7), roundings=256)


def test_the_cheapest_partition_is_taken() -> None:
    """Of 7x7 depthwise, 1x1 up and 1x1 down, the pointwise pair is merged and the depthwise kernel stays apart."""
    given = f"{tensor('w', 32, 1, 7, 7)}, {tensor('u', 128, 32, 1, 1)}, {tensor('d', 32, 128, 1, 1)}"
    before = graph(
        f"""(float[N,32,14,14] x) => (float[N,32,14,14] y) <{given}> {{
        a = Conv<group=32, pads=[3,3,3,3]>(x, w) c = Conv(a, u) y = Conv(c, d) }}"""
    )
    found = record(before, MERGE)
    after = apply(before, MERGE)
    assert [tuple(n.inputs[1].shape) for n in after.graph] == [(32, 1, 7, 7), (32, 32, 1, 1)]
    assert "merged 'n_c', 'n_y': MACs per position 8,192 to 1,024 (x0.12)" in found.rewrites[0].what
    assert [d.code for d in found.declines] == ["COST"]
    assert_close(before, after, (1, 32, 14, 14), roundings=512)


def test_an_inverted_residual_block_without_activations_becomes_dense() -> None:
    given = f"{tensor('u', 144, 24, 1, 1)}, {tensor('w', 144, 1, 3, 3)}, {tensor('d', 24, 144, 1, 1)}"
    before = graph(
        f"""(float[N,24,28,28] x) => (float[N,24,28,28] y) <{given}> {{
        a = Conv(x, u) c = Conv<group=144, pads=[1,1,1,1]>(a, w) y = Conv(c, d) }}"""
    )
    after = apply(before, MERGE)
    assert [tuple(n.inputs[1].shape) for n in after.graph] == [(24, 24, 3, 3)]
    assert_close(before, after, (2, 24, 28, 28), roundings=1024)


def test_a_chain_of_the_first_order_merges_in_one_dimension() -> None:
    given = f"{tensor('w', 8, 4, 1)}, {tensor('v', 4, 8, 5)}, {tensor('c', 4)}"
    before = graph(f"(float[N,4,L] x) => (float[N,4,M] y) <{given}> {{ a = Conv(x, w) y = Conv<pads=[2,2], strides=[2]>(a, v, c) }}")
    after = apply(before, MERGE)
    assert operators(after) == ["Conv"]
    assert_close(before, after, (2, 4, 21), roundings=256)


BIASED = "a = Conv(x, small, b) y = Conv<pads=[1,1,1,1], strides=[2,1]>(a, large, c4)"


def test_a_map_of_border_biases_if_all_is_asked_for() -> None:
    before = pair(BIASED, outputs="float[N,4,5,7] y")
    every = MergeConvolutions(merge="all")
    after = apply(before, every)
    assert operators(after) == ["Conv", "Add"]
    assert tuple(after.graph[1].inputs[1].shape) == (1, 4, 5, 7)
    assert_close(before, after, (3, 4, 9, 7), roundings=256)
    assert codes(before, MERGE) == ["PAD2_NONZERO"]
    assert codes(pair(BIASED, size="H,W"), every) == ["DYNAMIC_SHAPE"]
    assert codes(pair(f"{FIRST} y = Conv<pads=[1,1,1,1]>(a, large)"), every) == ["PAD2_NONZERO"]


def test_off_does_nothing() -> None:
    before = pair(f"{FIRST} y = Conv(a, v)")
    assert operators(apply(before, MergeConvolutions(merge="off"))) == ["Conv", "Conv"]
    assert codes(before, MergeConvolutions(merge="off")) == []


def test_shared_weights_and_metadata_are_kept() -> None:
    before = pair(f"{FIRST} c = Conv(a, v) d = Relu(c) e = Conv<pads=[1,1,1,1]>(d, w, b) f = Relu(e) y = Conv(f, v)")
    before.graph[0].metadata_props["scope"] = "first"
    after = apply(before, MERGE)
    assert operators(after) == ["Conv", "Relu", "Conv", "Relu", "Conv"]
    assert after.graph[0].metadata_props["scope"] == "first"
    assert_close(before, after, (2, 4, 9, 7), roundings=2048)


def test_the_proof_and_the_gate_are_stated() -> None:
    (rewrite,) = record(pair(f"{FIRST} y = Conv(a, v)"), MERGE).rewrites
    assert rewrite.proof == "exact in float64, rounded once"
    for text in ("MACs per position 640 to 144 (x0.23)", "parameters 656 to 148", "bytes", "estimate"):
        assert text in rewrite.what
