import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph

from passes.fuse_dcnv3_center import FuseDcnv3Center

FUSE = FuseDcnv3Center()
INPUTS = "(float[N,4,5,8] x, float[N,4,5,36] o, float[N,4,5,18] m, float[N,4,5,2] c)"
CONSTANTS = "<float one = {1}, float half = {0.5}, int64[1] last = {-1}, int64[5] wide = {1,1,1,1,4}, int64[4] four = {-1,4,5,8}>"
SPREAD = "a = Unsqueeze(c, last) b = Expand(a, wide) s = Reshape(b, four)"
SHAPES = [(2, 4, 5, 8), (2, 4, 5, 36), (2, 4, 5, 18), (2, 4, 5, 2)]
BLENDS = {
    "x last": "r = Sub(one, s) k = Mul(d, r) e = Mul(x, s) y = Add(k, e)",
    "x first": "r = Sub(one, s) e = Mul(s, x) k = Mul(r, d) y = Add(e, k)",
}


def layer(blend: str, spread: str = SPREAD, outputs: str = "float[N,4,5,8] y") -> str:
    return f"{INPUTS} => ({outputs}) {CONSTANTS} {{ {spread} d = deploycc.DCNv3<group=2>(x, o, m) {blend} }}"


@pytest.mark.parametrize("form", BLENDS)
def test_before_and_after(form: str) -> None:
    before = graph(layer(BLENDS[form]))
    after = apply(before, FUSE)
    assert_same(after, graph(f"{INPUTS} => (float[N,4,5,8] y) {{ y = deploycc.DCNv3Center<group=2>(x, o, m, c) }}"))
    assert list(after.functions) == [("deploycc", "DCNv3Center", "")]
    assert_close(before, after, *SHAPES, roundings=64)


@pytest.mark.parametrize(
    "blend",
    [
        "r = Sub(half, s) k = Mul(d, r) e = Mul(x, s) y = Add(k, e)",
        "r = Sub(one, s) k = Mul(d, r) e = Mul(d, s) y = Add(k, e)",
        "r = Sub(one, s) k = Mul(d, r) y = Add(k, x)",
    ],
)
def test_what_is_no_blend_stays(blend: str) -> None:
    before = graph(layer(blend))
    assert_same(apply(before, FUSE), before)
    assert codes(before, FUSE) == []


def test_declines_share() -> None:
    """Shares in another order than one per group: the last axis is the groups."""
    turned = "a = Unsqueeze(c, third) b = Expand(a, wide) s = Reshape(b, four)"
    text = layer(BLENDS["x last"], turned).replace("int64[5] wide = {1,1,1,1,4}", "int64[1] third = {3}, int64[5] wide = {1,1,1,4,1}")
    assert codes(graph(text), FUSE) == ["SHARE"]


def test_declines_multi_consumer() -> None:
    before = graph(layer(f"{BLENDS['x last']} z = Neg(d)", outputs="float[N,4,5,8] y, float[N,4,5,8] z"))
    assert codes(before, FUSE) == ["MULTI_CONSUMER"]
