"""One kernel for every channel, by way of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pass_graphs import apply, codes, execute, graph, operators, record
from torch import nn
from torch_blocks import exported

from passes.eliminate_identity import EliminateIdentity
from passes.fold_constants import FoldConstants
from passes.lower_shared_kernel import LowerSharedKernel

LOWER = LowerSharedKernel()
GIVEN = (
    "float[1,1,3,3] w = {1,2,3,4,5,6,7,8,9}, float[1] b = {0.5}, float[2,1,1,1] two = {1, 2}, int64[4] apart = {-1,1,6,5}, "
    "int64[4] back = {-1,4,6,5}, int64[4] both = {-1,8,6,5}, int64[4] other = {-1,2,6,5}, int64[3] flat = {-1,4,30}"
)
APART = "a = Reshape(x, apart)"


def banked(text: str, *, outputs: str = "float[?,4,6,5] y", inputs: str = "") -> object:
    return graph(f"(float[N,4,6,5] x{inputs}) => ({outputs}) <{GIVEN}> {{ {text} }}")


@pytest.mark.parametrize(
    ("text", "outputs", "after_it"),
    [
        (f"{APART} c = Conv<pads=[1,1,1,1]>(a, w, b) y = Reshape(c, back)", "float[?,4,6,5] y", ["Conv"]),
        (f"{APART} c = Conv<pads=[1,1,1,1]>(a, w, b) d = Relu(c) y = Reshape(d, back)", "float[?,4,6,5] y", ["Conv", "Relu"]),
        (f"{APART} c = Conv(a, two) y = Reshape(c, both)", "float[?,8,6,5] y", ["Conv"]),
    ],
)
def test_before_and_expected_bit_for_bit(text: str, outputs: str, after_it: list[str]) -> None:
    before = banked(text, outputs=outputs)
    after = apply(before, LOWER)
    assert operators(after) == after_it
    assert after.graph[0].attributes["group"].as_int() == 4
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 4, 6, 5)).astype(np.float32)
        assert np.array_equal(execute(before, {"x": x})[0], execute(after, {"x": x})[0])


DECLINED = {
    "NONCONST_WEIGHT": (f"{APART} c = Conv<pads=[1,1,1,1]>(a, k) y = Reshape(c, back)", {"inputs": ", float[1,1,3,3] k"}),
    "MULTI_CONSUMER": (
        f"{APART} c = Conv<pads=[1,1,1,1]>(a, w) y = Reshape(c, back) z = Relu(c)",
        {"outputs": "float[?,4,6,5] y, float[?,1,6,5] z"},
    ),
    "GRAPH_OUTPUT": (f"{APART} c = Conv<pads=[1,1,1,1]>(a, w) y = Reshape(c, back)", {"outputs": "float[?,4,6,5] y, float[?,1,6,5] c"}),
    "RESHAPE": (f"{APART} c = Conv<pads=[1,1,1,1]>(a, w) y = Reshape(c, other)", {"outputs": "float[?,2,6,5] y"}),
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines(code: str) -> None:
    text, options = DECLINED[code]
    assert codes(banked(text, **options), LOWER) == [code]


def test_declines_where_nothing_comes_back() -> None:
    assert codes(banked(f"{APART} y = Conv<pads=[1,1,1,1]>(a, w)", outputs="float[?,1,6,5] y"), LOWER) == ["RESHAPE"]


def test_an_ordinary_convolution_is_not_spoken_of() -> None:
    found = record(graph(f"(float[N,1,6,5] x) => (float[N,1,4,3] y) <{GIVEN}> {{ y = Conv(x, w) }}"), LOWER)
    assert (found.rewrites, found.declines) == ((), ())


class SharedKernel(nn.Module):
    """One kernel, and its bias, correlated with every channel, as layers of Gabor functions do it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(1, 1, 3, 3)), nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        y = torch.relu(nn.functional.conv2d(x.reshape(n * c, 1, h, w), self.kernel, self.bias, padding=1))
        return y.reshape(n, c, h, w)


@pytest.mark.parametrize("sizes", [False, True])
def test_from_torch_with_a_dynamic_batch(sizes: bool) -> None:
    torch.manual_seed(0)
    block = SharedKernel().eval()
    before = apply(exported(block, 2, 6, 16, 13, sizes=sizes), FoldConstants(), EliminateIdentity())
    after = apply(before, LOWER, EliminateIdentity(), FoldConstants())
    assert operators(after) == ["Conv", "Relu"]
    for batch in (1, 5):
        x = torch.randn(batch, 6, 16, 13)
        assert np.array_equal(execute(before, {"x": x.numpy()})[0], execute(after, {"x": x.numpy()})[0])
