"""Padding before convolutions."""

from __future__ import annotations

import numpy as np
import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators

from passes.fold_pad import FoldPad

FOLD = FoldPad()
WEIGHTS = ", ".join(map(str, np.random.default_rng(0).uniform(-1, 1, 54).round(3)))
GIVEN = (
    f"float[2,3,3,3] w = {{{WEIGHTS}}}, int64[8] p = {{0,0,1,2,0,0,0,3}}, int64[4] q = {{1,2,0,3}}, int64[2] axes = {{2,-1}}, "
    "int64[8] c = {0,1,0,0,0,0,0,0}, int64[8] n = {0,0,-1,0,0,0,0,0}, float zero = {0}, float one = {1}, "
    "float[4,1,1,1] deep = {1, 2, 3, 4}"
)


def padded(text: str, *, outputs: str = "float[N,2,?,?] y", inputs: str = "") -> object:
    return graph(f"(float[N,3,6,5] x{inputs}) => ({outputs}) <{GIVEN}> {{ {text} }}")


def test_before_and_expected() -> None:
    given = "float[1,1,2,2] w = {1,2,3,4}"
    before = graph(
        f"""(float[N,1,3,3] x) => (float[N,1,4,3] y) <{given}, int64[8] p = {{0,0,1,0,0,0,0,1}}>
        {{ a = Pad(x, p) y = Conv<pads=[0,0,1,0]>(a, w) }}"""
    )
    expected = graph(f"(float[N,1,3,3] x) => (float[N,1,4,3] y) <{given}> {{ y = Conv<pads=[1,0,1,1]>(x, w) }}")
    assert_same(apply(before, FOLD), expected)


@pytest.mark.parametrize("pad", ["Pad(x, p)", "Pad(x, p, zero)", "Pad(x, q, zero, axes)", "Pad(x, q, , axes)"])
@pytest.mark.parametrize("attributes", ["", "<strides=[2,2], pads=[1,0,0,1]>", '<auto_pad="VALID">'])
def test_folds(pad: str, attributes: str) -> None:
    before = padded(f"a = {pad} y = Conv{attributes}(a, w)")
    after = apply(before, FOLD)
    assert operators(after) == ["Conv"]
    assert_close(before, after, (2, 3, 6, 5), roundings=64)


def test_folds_into_several_convolutions() -> None:
    before = padded("a = Pad(x, p) d = Conv(a, w) e = Conv(a, w) y = Mul(d, e)")
    after = apply(before, FOLD)
    assert operators(after) == ["Conv", "Conv", "Mul"]
    assert_close(before, after, (2, 3, 6, 5), roundings=64)


def test_padding_before_something_else_is_not_spoken_of() -> None:
    assert codes(padded("a = Pad(x, p) y = Relu(a)", outputs="float[N,3,?,?] y"), FOLD) == []


DECLINED = {
    "NON_ZERO_PAD_MODE": ('a = Pad<mode="reflect">(x, p) y = Conv(a, w)', {}),
    "NONCONST_PADS": ("a = Pad(x, k) y = Conv(a, w)", {"inputs": ", int64[8] k"}),
    "AXIS": ("a = Pad(x, c) y = Conv<group=4>(a, deep)", {"outputs": "float[N,4,?,?] y"}),
    "CROP": ("a = Pad(x, n) y = Conv(a, w)", {}),
    "MULTI_CONSUMER": ("a = Pad(x, p) y = Conv(a, w) z = Relu(a)", {"outputs": "float[N,2,?,?] y, float[N,3,?,?] z"}),
    "GRAPH_OUTPUT": ("a = Pad(x, p) y = Conv(a, w)", {"outputs": "float[N,2,?,?] y, float[N,3,?,?] a"}),
    "DYNAMIC_SHAPE": ('a = Pad(x, p) y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(a, w)', {}),
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines(code: str) -> None:
    text, options = DECLINED[code]
    assert codes(padded(text, **options), FOLD) == [code]


@pytest.mark.parametrize("pad", ["Pad(x, p, one)", 'Pad<mode="edge">(x, p)', "Pad(x, p, k)"])
def test_declines_other_values(pad: str) -> None:
    assert codes(padded(f"a = {pad} y = Conv(a, w)", inputs=", float k"), FOLD) == ["NON_ZERO_PAD_MODE"]
