"""Chains of fully connected layers and the skip around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from pass_graphs import apply, assert_close, assert_same, codes, execute, graph, operators, record
from torch import nn
from torch_blocks import exported

from passes.eliminate_identity import EliminateIdentity
from passes.fold_constants import FoldConstants
from passes.fold_layerscale import FoldLayerscale
from passes.merge_linears import MergeLinears

if TYPE_CHECKING:
    import onnx_ir as ir

MERGE = MergeLinears()


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).uniform(-1, 1, shape).round(3)
    return f"float{list(shape)}".replace(" ", "") + f" {name} = {{{', '.join(map(str, values.ravel()))}}}"


GIVEN = ", ".join(
    [
        *(tensor("w", 6, 24), tensor("b", 24), tensor("v", 24, 6), tensor("c", 6), tensor("t", 6, 24), tensor("square", 6, 6)),
        *(tensor("narrow", 6, 2), tensor("wide", 2, 6), "float half = {0.5}", "float one = {1}", "int8 nought = {0}"),
        "float[24] g = {" + ", ".join(["1"] * 24) + "}",
    ]
)


def layers(text: str, *, size: str = "N,5,6", outputs: str = "", inputs: str = "") -> ir.Model:
    return graph(f"(float[{size}] x{inputs}) => ({outputs or f'float[{size}] y'}) <{GIVEN}> {{ {text} }}")


def test_before_and_expected() -> None:
    before = graph(
        """(float[N,1] x) => (float[N,1] y) <float[1,2] w = {1, 2}, float[2] b = {1, 0}, float[1,2] v = {3, 4}, float[1] c = {5}>
        { a = Gemm(x, w, b) y = Gemm<transB=1, alpha=2.0>(a, v, c) }"""
    )
    expected = graph("(float[N,1] x) => (float[N,1] y) <float[1,1] w = {22}, float[1] b = {11}> { y = Gemm(x, w, b) }")
    assert_same(apply(before, MERGE), expected)


CHAINS = {
    "gemms": ("a = Gemm(x, w, b) y = Gemm(a, v, c)", "N,6", ["Gemm"]),
    "gemms, transposed and scaled": ("a = Gemm<beta=0.5>(x, w, b) y = Gemm<transB=1, alpha=2.0>(a, t, c)", "N,6", ["Gemm"]),
    "products": ("a = MatMul(x, w) y = MatMul(a, v)", "N,5,6", ["MatMul"]),
    "products with biases": ("a = MatMul(x, w) d = Add(a, b) e = MatMul(d, v) y = Add(c, e)", "N,5,6", ["MatMul", "Add"]),
    "the first with a bias": ("a = MatMul(x, w) d = Add(a, b) y = MatMul(d, v)", "N,5,6", ["MatMul", "Add"]),
    "a product and a gemm": ("a = MatMul(x, w) y = Gemm(a, v, c)", "N,6", ["MatMul", "Add"]),
    "a slope of 1": ("a = Gemm(x, w, b) d = LeakyRelu<alpha=1.0>(a) y = Gemm(d, v)", "N,6", ["Gemm"]),
    "a skip around one": ("a = MatMul(x, square) d = Add(a, c) y = Add(x, d)", "N,5,6", ["MatMul", "Add"]),
    "a skip around two": ("a = Gemm(x, w, b) d = Gemm(a, v, c) y = Add(d, x)", "N,6", ["Gemm"]),
    "skips around each": ("a = Gemm(x, square) d = Add(a, x) e = Gemm(d, square, c) y = Add(d, e)", "N,6", ["Gemm"]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_merges(name: str) -> None:
    text, size, wanted = CHAINS[name]
    before = layers(text, size=size)
    after = apply(before, MERGE)
    assert operators(after) == wanted
    for batch in (1, 7):
        assert_close(before, after, (batch, *map(int, size.split(",")[1:])), roundings=512)


def test_weights_become_the_product_and_the_identity() -> None:
    before = layers("a = Gemm(x, square, c) y = Add(a, x)", size="N,6")
    after = apply(before, MERGE)
    assert after.graph[0].inputs[1] is not None
    difference = after.graph[0].inputs[1].const_value.numpy() - before.graph.initializers["square"].const_value.numpy()
    assert np.allclose(difference, np.eye(6), atol=1e-6)


DECLINED = {
    "MULTI_CONSUMER": ("a = Gemm(x, w) y = Gemm(a, v) z = Relu(a)", {"outputs": "float[N,6] y, float[N,24] z"}),
    "GRAPH_OUTPUT": ("a = Gemm(x, w) y = Gemm(a, v)", {"outputs": "float[N,6] y, float[N,24] a"}),
    "NONCONST_WEIGHT": ("a = Gemm(x, w) y = Gemm(a, k)", {"inputs": ", float[24,6] k"}),
    "DATA_DEPENDENT": ("a = Gemm(x, w) d = LayerNormalization(a, g) y = Gemm(d, v)", {}),
    "ACTIVATION_BETWEEN": ("a = Gemm(x, w) d = LeakyRelu(a) y = Gemm(d, v)", {}),
    "DTYPE": ("a = Gemm(x, w) d = QuantizeLinear(a, half, nought) e = DequantizeLinear(d, half, nought) y = Gemm(e, v)", {}),
    "COST": ("a = Gemm(x, narrow) y = Gemm(a, wide)", {}),
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines(code: str) -> None:
    text, options = DECLINED[code]
    assert codes(layers(text, size="N,6", **options), MERGE) == [code]


def test_declines_numeric() -> None:
    given = "float[1,2] w = {1e30, 1}, float[2,1] v = {1e30, 1}"
    before = graph(f"(float[N,1] x) => (float[N,1] y) <{given}> {{ a = Gemm(x, w) y = Gemm(a, v) }}")
    narrow = graph(f"(float[N,2] x) => (float[N,2] y) <{given}> {{ a = Gemm<transB=1>(x, w) y = Gemm<transB=1>(a, v) }}")
    assert codes(before, MERGE) == ["NUMERIC"]
    assert codes(narrow, MERGE) == ["COST"]


@pytest.mark.parametrize(
    "text",
    [
        "a = MatMul(x, w) d = Relu(a) y = MatMul(d, v)",
        "a = MatMul(x, square) d = Transpose<perm=[0,2,1]>(a) e = MatMul(x, d) f = Softmax(e) y = MatMul(f, a)",
        "a = MatMul(x, w) d = Relu(a) e = MatMul(d, v) y = Add(e, x)",
    ],
)
def test_ordinary_networks_are_not_spoken_of(text: str) -> None:
    found = record(layers(text), MERGE)
    assert (found.rewrites, found.declines) == ((), ())


def test_off_does_nothing() -> None:
    before = layers("a = Gemm(x, w) y = Gemm(a, v)", size="N,6")
    assert operators(apply(before, MergeLinears(merge="off"))) == ["Gemm", "Gemm"]


class PrunedFeedForward(nn.Module):
    """What depth pruning leaves of a feed-forward block: two layers, a LayerScale and the skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.linspace(-0.5, 0.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.second(self.first(x))


@pytest.mark.parametrize("tokens", [True, False])
def test_a_pruned_feed_forward_block_becomes_one_layer(tokens: bool) -> None:
    torch.manual_seed(0)
    block = PrunedFeedForward(12).eval()
    shape = (2, 7, 12) if tokens else (2, 12)
    after = apply(exported(block, *shape), FoldConstants(), EliminateIdentity(), FoldLayerscale(), MERGE)
    assert operators(after) == (["MatMul", "Add"] if tokens else ["Gemm"])
    for batch in (1, 5):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            wanted = block(x).numpy()
        assert np.max(np.abs(execute(after, {"x": x.numpy()})[0] - wanted)) <= 1e-5 * np.max(np.abs(wanted))
