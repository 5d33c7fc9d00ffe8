import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators, record

from passes.fuse_softmax import FuseSoftmax

FUSE = FuseSoftmax()
AXES = "<int64[1] last = {-1}, int64[1] second = {1}, int64[2] both = {1, 2}>"
STABLE = "a = Neg(x) m = ReduceMax(a, last) d = Sub(a, m) e = Exp(d) s = ReduceSum(e, last) y = Div(e, s)"
PLAIN = "a = Neg(x) e = Exp(a) s = ReduceSum(e, last) y = Div(e, s)"


@pytest.mark.parametrize("body", [STABLE, PLAIN, STABLE.replace("last", "second"), PLAIN.replace("last", "second")])
def test_both_forms_over_any_axis(body: str) -> None:
    before = graph(f"(float[N,6,8] x) => (float[N,6,8] y) {AXES} {{ {body} }}", opset=20)
    axis = -1 if "last" in body else -2
    after = apply(before, FUSE)
    assert_same(after, graph(f"(float[N,6,8] x) => (float[N,6,8] y) {{ a = Neg(x) y = Softmax<axis={axis}>(a) }}"))
    assert_close(before, after, (3, 6, 8), roundings=16)


def test_the_maximum_by_attribute() -> None:
    body = "a = Neg(x) m = ReduceMax<axes=[2]>(a) d = Sub(a, m) e = Exp(d) s = ReduceSum(e, last) y = Div(e, s)"
    assert operators(apply(graph(f"(float[N,6,8] x) => (float[N,6,8] y) {AXES} {{ {body} }}", opset=17), FUSE)) == ["Neg", "Softmax"]


def test_another_shift_stays_in_front() -> None:
    # What is subtracted must be the maximum over the axis of the sum; any other shift is kept, and so is the meaning.
    body = STABLE.replace("ReduceMax(a, last)", "ReduceMax(a, second)")
    before = graph(f"(float[N,6,8] x) => (float[N,6,8] y) {AXES} {{ {body} }}")
    after = apply(before, FUSE)
    assert operators(after) == ["Neg", "ReduceMax", "Sub", "Softmax"]
    assert_close(before, after, (3, 6, 8), roundings=16)


def test_declines_opset() -> None:
    body = "a = Neg(x) e = Exp(a) s = ReduceSum<axes=[2]>(e) y = Div(e, s)"
    assert codes(graph(f"(float[N,6,8] x) => (float[N,6,8] y) {{ {body} }}", opset=12), FUSE) == ["OPSET"]


def test_declines_axis() -> None:
    assert codes(graph(f"(float[N,6,8] x) => (float[N,6,8] y) {AXES} {{ {PLAIN.replace('last', 'both')} }}"), FUSE) == ["AXIS"]


@pytest.mark.parametrize("value", ["e", "d"])
def test_declines_multi_consumer(value: str) -> None:
    before = graph(f"(float[N,6,8] x) => (float[N,6,8] y, float[N,6,8] z) {AXES} {{ {STABLE} z = Relu({value}) }}")
    assert codes(before, FUSE) == ["MULTI_CONSUMER"]


@pytest.mark.parametrize(
    "body", [PLAIN.replace("Div(e, s)", "Div(s, e)"), PLAIN.replace("ReduceSum(e", "ReduceSum(a"), PLAIN.replace("Exp", "Relu")]
)
def test_other_quotients_are_not_mentioned(body: str) -> None:
    found = record(graph(f"(float[N,6,8] x) => (float[N,6,8] y) {AXES} {{ {body} }}"), FUSE)
    assert not found.rewrites
    assert not found.declines
