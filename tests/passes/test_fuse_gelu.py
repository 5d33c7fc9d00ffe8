import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators, record

from passes.fuse_gelu import FuseGelu

FUSE = FuseGelu()
CONSTANTS = """<float root = {1.4142135}, float inverse = {0.70710677}, float half = {0.5}, float one = {1}, float two = {2},
    float three = {3},
    float k = {0.7978846}, float c = {0.044715}, float ck = {0.03567741}, float[1] halves = {0.5}>"""
EXACT = {
    "torch": "d = Div(a, root) e = Erf(d) p = Add(e, one) q = Mul(a, p) y = Mul(q, half)",
    "half first": "d = Mul(inverse, a) e = Erf(d) p = Add(one, e) h = Mul(a, half) y = Mul(h, p)",
    "half on the sum": "d = Div(a, root) e = Erf(d) p = Add(e, one) q = Mul(half, p) y = Mul(q, a)",
    "divided by two": "d = Div(a, root) e = Erf(d) p = Add(e, one) q = Mul(p, a) y = Div(q, two)",
    "distributed": "d = Div(a, root) e = Erf(d) p = Mul(e, half) q = Add(p, half) y = Mul(a, q)",
    "a vector of one": "d = Div(a, root) e = Erf(d) p = Add(e, one) q = Mul(a, p) y = Mul(q, halves)",
}
TANH = {
    "pow": "u = Pow(a, three) v = Mul(u, c) w = Add(a, v) d = Mul(w, k) e = Tanh(d) p = Add(e, one) q = Mul(a, p) y = Mul(q, half)",
    "cube": "s = Mul(a, a) u = Mul(s, a) v = Mul(c, u) w = Add(a, v) d = Mul(k, w) e = Tanh(d) p = Add(one, e)"
    " h = Mul(a, half) y = Mul(h, p)",
    "factored": "s = Mul(a, a) v = Mul(s, ck) w = Add(v, k) d = Mul(a, w) e = Tanh(d) p = Add(e, one) q = Mul(half, p) y = Mul(a, q)",
}


@pytest.mark.parametrize("form", EXACT)
def test_the_erf_form_in_any_order(form: str) -> None:
    before = graph(f"(float[N,8] x) => (float[N,8] y) {CONSTANTS} {{ a = Neg(x) {EXACT[form]} }}")
    expected = graph('(float[N,8] x) => (float[N,8] y) { a = Neg(x) y = Gelu<approximate="none">(a) }')
    after = apply(before, FUSE)
    assert_same(after, expected)
    assert_close(before, after, (16, 8), roundings=8)


@pytest.mark.parametrize("form", TANH)
def test_the_tanh_form_in_any_order(form: str) -> None:
    before = graph(f"(float[N,8] x) => (float[N,8] y) {CONSTANTS} {{ a = Neg(x) {TANH[form]} }}")
    expected = graph('(float[N,8] x) => (float[N,8] y) { a = Neg(x) y = Gelu<approximate="tanh">(a) }')
    after = apply(before, FUSE)
    assert_same(after, expected)
    assert_close(before, after, (16, 8), roundings=16)


def test_the_new_node_keeps_name_and_metadata() -> None:
    before = graph(f"(float[N,8] x) => (float[N,8] z) {CONSTANTS} {{ a = Neg(x) {EXACT['torch']} z = Neg(y) }}")
    before.graph[1].metadata_props["scope"] = "mlp.act"
    node = apply(before, FUSE).graph[1]
    assert (node.name, node.outputs[0].name, node.metadata_props["scope"]) == ("n_y", "y", "mlp.act")
    assert "5 nodes" in record(before, FUSE).rewrites[0].what


def test_x_may_be_a_product_itself() -> None:
    before = graph(f"(float[N,8] x) => (float[N,8] y) {CONSTANTS} {{ a = Mul(x, two) {EXACT['torch']} }}")
    after = apply(before, FUSE)
    assert operators(after) == ["Mul", "Gelu"]
    assert_close(before, after, (16, 8), roundings=8)


def test_declines_opset() -> None:
    assert codes(graph(f"(float[N,8] x) => (float[N,8] y) {CONSTANTS} {{ a = Neg(x) {EXACT['torch']} }}", opset=17), FUSE) == ["OPSET"]


@pytest.mark.parametrize("value", ["d", "e", "p", "q"])
def test_declines_multi_consumer(value: str) -> None:
    before = graph(f"(float[N,8] x) => (float[N,8] y, float[N,8] z) {CONSTANTS} {{ a = Neg(x) {EXACT['torch']} z = Relu({value}) }}")
    assert codes(before, FUSE) == ["MULTI_CONSUMER"]


def test_declines_multi_consumer_of_a_graph_output() -> None:
    before = graph(f"(float[N,8] x) => (float[N,8] y, float[N,8] q) {CONSTANTS} {{ a = Neg(x) {EXACT['torch']} }}")
    assert codes(before, FUSE) == ["MULTI_CONSUMER"]


@pytest.mark.parametrize("text", [EXACT["torch"].replace("root", "two"), EXACT["torch"].replace("y = Mul(q, half)", "y = Identity(q)")])
def test_declines_constants(text: str) -> None:
    before = graph(f"(float[N,8] x) => (float[N,8] y) {CONSTANTS} {{ a = Neg(x) {text} }}")
    assert codes(before, FUSE) == ["CONSTANTS"]


@pytest.mark.parametrize("text", ["y = Erf(a)", "d = Mul(a, k) y = Tanh(d)", "d = Sqrt(a) e = Erf(d) p = Add(e, one) y = Mul(p, x)"])
def test_other_uses_of_erf_and_tanh_are_not_mentioned(text: str) -> None:
    before = graph(f"(float[N,8] x) => (float[N,8] y) {CONSTANTS} {{ a = Neg(x) {text} }}")
    found = record(before, FUSE)
    assert not found.rewrites
    assert not found.declines


def test_a_constant_that_adds_a_dimension_is_no_scalar() -> None:
    text = CONSTANTS.replace("float[1] halves", "float[1,1,1] halves")
    before = graph(f"(float[N,8] x) => (float[?,N,8] y) {text} {{ a = Neg(x) {EXACT['a vector of one']} }}")
    assert "Gelu" not in operators(apply(before, FUSE))
