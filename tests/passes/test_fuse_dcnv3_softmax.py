import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, record

from passes.fuse_dcnv3_softmax import FuseDcnv3Softmax

FUSE = FuseDcnv3Softmax()
INPUTS = "(float[N,4,5,8] x, float[N,4,5,36] o, float[N,4,5,18] l)"
SHAPES = "<int64[5] five = {-1,4,5,2,9}, int64[4] four = {-1,4,5,18}>"
SOFTMAX = "a = Reshape(l, five) s = Softmax<axis=-1>(a) m = Reshape(s, four)"
NODE = "y = deploycc.DCNv3<group=2>(x, o, m)"


def test_before_and_after() -> None:
    before = graph(f"{INPUTS} => (float[N,4,5,8] y) {SHAPES} {{ {SOFTMAX} {NODE} }}")
    after = apply(before, FUSE)
    assert_same(after, graph(f"{INPUTS} => (float[N,4,5,8] y) {{ y = deploycc.DCNv3<group=2, softmax=1>(x, o, l) }}"))
    assert_close(before, after, (2, 4, 5, 8), (2, 4, 5, 36), (2, 4, 5, 18), roundings=64)
    assert "took over the softmax 'n_s'" in record(before, FUSE).rewrites[0].what


def test_logits_that_are_apart_already() -> None:
    inputs = "(float[N,4,5,8] x, float[N,4,5,36] o, float[N,4,5,9] l)"
    before = graph(f"{inputs} => (float[N,4,5,8] y) {{ m = Softmax<axis=3>(l) y = deploycc.DCNv3<group=1, kernel_h=3>(x, o, m) }}")
    assert codes(before, FUSE) == []
    assert len(apply(before, FUSE).graph) == 1


@pytest.mark.parametrize("mask", ["l", "m"])
def test_nothing_to_do(mask: str) -> None:
    body = f"m = Sigmoid(l) y = deploycc.DCNv3<group=2>(x, o, {mask})"
    before = graph(f"{INPUTS} => (float[N,4,5,8] y) {{ {body} }}")
    assert_same(apply(before, FUSE), before)
    assert codes(before, FUSE) == []


def test_declines_axis() -> None:
    for softmax in ("a = Reshape(l, five) s = Softmax<axis=3>(a) m = Reshape(s, four)", "m = Softmax<axis=-1>(l)"):
        assert codes(graph(f"{INPUTS} => (float[N,4,5,8] y) {SHAPES} {{ {softmax} {NODE} }}"), FUSE) == ["AXIS"]


def test_declines_shape() -> None:
    inputs = "(float[N,4,5,8] x, float[N,4,5,36] o, float[N,20,18] l)"
    assert codes(graph(f"{inputs} => (float[N,4,5,8] y) {SHAPES} {{ {SOFTMAX} {NODE} }}"), FUSE) == ["SHAPE"]


@pytest.mark.parametrize("other", ["s", "m"])
def test_declines_multi_consumer(other: str) -> None:
    before = graph(f"{INPUTS} => (float[N,4,5,8] y, float z) {SHAPES} {{ {SOFTMAX} {NODE} z = Neg({other}) }}")
    assert codes(before, FUSE) == ["MULTI_CONSUMER"]
