import numpy as np
import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators, record

from passes.fold_constants import FoldConstants
from passes.fuse_layernorm import FuseLayernorm

FUSE = FuseLayernorm()
CONSTANTS = """<float eps = {1e-5}, float two = {2}, float half = {0.5}, float minus = {-0.5}, float one = {1},
    int64[1] last = {-1}, int64[1] three = {2},
    int64[2] pair = {-2, -1}, int64[1] first = {1}, float[4] g = {1, 2, 3, 4}, float[4] b = {0.5, 0, 1, -1}, float[1,1,4] gg = {1, 2, 3, 4},
    float[3,4] gp = {1,2,3,4,5,6,7,8,9,10,11,12}>"""
CENTRE = "m = ReduceMean(a, last) d = Sub(a, m)"
SQUARE = "s = Pow(d, two)"
STATISTICS = "v = ReduceMean(s, last) e = Add(v, eps)"
ROOT = "r = Sqrt(e) n = Div(d, r)"
AFFINE = "h = Mul(n, g) y = Add(h, b)"
TORCH = f"{CENTRE} {SQUARE} {STATISTICS} {ROOT} {AFFINE}"
VARIANTS = {
    "torch": TORCH,
    "product": TORCH.replace(SQUARE, "s = Mul(d, d)"),
    "reciprocal": TORCH.replace(ROOT, "q = Sqrt(e) r = Reciprocal(q) n = Mul(d, r)"),
    "one over": TORCH.replace(ROOT, "q = Sqrt(e) r = Div(one, q) n = Mul(r, d)"),
    "power": TORCH.replace(ROOT, "r = Pow(e, minus) n = Mul(d, r)"),
    "half power": TORCH.replace(ROOT, "r = Pow(e, half) n = Div(d, r)"),
    "positive axis": TORCH.replace("last)", "three)"),
    "mean twice": f"{CENTRE} m2 = ReduceMean(a, last) d2 = Sub(a, m2) s = Mul(d2, d2) {STATISTICS} {ROOT} {AFFINE}",
    "operands swapped": TORCH.replace("Add(v, eps)", "Add(eps, v)").replace("Mul(n, g)", "Mul(g, n)").replace("Add(h, b)", "Add(b, h)"),
    "broadcast scale": TORCH.replace("Mul(n, g)", "Mul(n, gg)"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    before = graph(f"(float[N,3,4] x) => (float[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {VARIANTS[variant]} }}")
    expected = graph(
        """(float[N,3,4] x) => (float[N,3,4] y) <float[4] g = {1, 2, 3, 4}, float[4] b = {0.5, 0, 1, -1}> {
        a = Neg(x) y = LayerNormalization<axis=-1, epsilon=1e-5, stash_type=1>(a, g, b) }"""
    )
    after = apply(before, FUSE)
    assert_same(after, expected)
    assert_close(before, after, (5, 3, 4), roundings=64)


def test_axes_as_an_attribute() -> None:
    text = TORCH.replace("ReduceMean(a, last)", "ReduceMean<axes=[-1]>(a)").replace("ReduceMean(s, last)", "ReduceMean<axes=[2]>(s)")
    before = graph(f"(float[N,3,4] x) => (float[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {text} }}", opset=17)
    assert operators(apply(before, FUSE)) == ["Neg", "LayerNormalization"]


def test_two_axes() -> None:
    text = TORCH.replace("last)", "pair)").replace("Mul(n, g)", "Mul(n, gp)")
    before = graph(f"(float[N,3,4] x) => (float[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {text} }}")
    after = apply(before, FUSE)
    assert operators(after) == ["Neg", "LayerNormalization"]
    assert_close(before, after, (5, 3, 4), roundings=256)


def test_without_scale_and_shift() -> None:
    text = TORCH.replace(f" {AFFINE}", " y = Relu(n)")
    before = graph(f"(float[N,3,4] x) => (float[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {text} }}")
    after = apply(before, FUSE)
    assert operators(after) == ["Neg", "LayerNormalization", "Relu"]
    assert_close(before, after, (5, 3, 4), roundings=64)


def test_a_computed_scale_stays_outside() -> None:
    text = TORCH.replace("Mul(n, g)", "Mul(n, a)")
    before = graph(f"(float[N,3,4] x) => (float[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {text} }}")
    after = apply(before, FUSE)
    assert operators(after) == ["Neg", "LayerNormalization", "Mul", "Add"]
    assert_close(before, after, (5, 3, 4), roundings=64)


def test_a_scale_of_known_size_makes_up_for_a_dynamic_axis() -> None:
    before = graph(f"(float[N,3,C] x) => (float[N,3,?] y) {CONSTANTS} {{ a = Neg(x) {TORCH} }}")
    assert operators(apply(before, FUSE)) == ["Neg", "LayerNormalization"]


def test_statistics_in_fp32_between_casts() -> None:
    text = TORCH.replace(SQUARE, "c = Cast<to=1>(d) s = Pow(c, two)").replace(ROOT, "q = Sqrt(e) r = Cast<to=10>(q) n = Div(d, r)")
    text = text.replace(AFFINE, "gh = CastLike(g, x) bh = CastLike(b, x) h = Mul(n, gh) y = Add(h, bh)")
    before = graph(f"(float16[N,3,4] x) => (float16[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {text} }}")
    after = apply(before, FoldConstants(), FUSE)
    assert operators(after) == ["Neg", "LayerNormalization"]
    assert {v.dtype.name for v in after.graph.initializers.values()} == {"FLOAT16"}


def test_name_metadata_and_proof() -> None:
    before = graph(f"(float[N,3,4] x) => (float[N,3,4] z) {CONSTANTS} {{ a = Neg(x) {TORCH} z = Neg(y) }}")
    before.graph[2].metadata_props["scope"] = "norm1"
    node = apply(before, FUSE).graph[1]
    assert (node.name, node.outputs[0].name, node.metadata_props["scope"]) == ("n_y", "y", "norm1")
    assert "9 nodes" in record(before, FUSE).rewrites[0].what


DECLINED = {
    "AXIS": TORCH.replace("last)", "first)").replace(f" {AFFINE}", " y = Relu(n)"),
    "EPSILON": TORCH.replace("Add(v, eps)", "Add(v, m)"),
    "NOT_AFFINE": TORCH.replace(f" {AFFINE}", " y = Relu(n)"),
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines(code: str) -> None:
    last = "C" if code == "NOT_AFFINE" else "4"
    before = graph(f"(float[N,3,{last}] x) => (float[N,3,{last}] y) {CONSTANTS} {{ a = Neg(x) {DECLINED[code]} }}")
    assert codes(before, FUSE) == [code]


@pytest.mark.parametrize("value", ["m", "d", "v", "r"])
def test_declines_multi_consumer(value: str) -> None:
    before = graph(f"(float[N,3,4] x) => (float[N,3,4] y, float[N,3,?] z) {CONSTANTS} {{ a = Neg(x) {TORCH} z = Relu({value}) }}")
    assert codes(before, FUSE) == ["MULTI_CONSUMER"]


def test_declines_opset() -> None:
    text = TORCH.replace("(a, last)", "<axes=[-1]>(a)").replace("(s, last)", "<axes=[-1]>(s)")
    assert codes(graph(f"(float[N,3,4] x) => (float[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {text} }}", opset=14), FUSE) == ["OPSET"]


def test_declines_dtype() -> None:
    double = f"(double[N,3,4] x) => (double[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {TORCH} }}".replace("float", "double")
    assert codes(graph(double), FUSE) == ["DTYPE"]


def test_a_standard_deviation_of_something_else_is_no_normalization() -> None:
    text = "m = ReduceMean(a, last) d = Sub(a, m) s = Mul(x, x) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) y = Div(d, r)"
    found = record(graph(f"(float[N,3,4] x) => (float[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {text} }}"), FUSE)
    assert not found.rewrites
    assert not found.declines


def test_a_tiny_variance_is_normalized_alike() -> None:
    before = graph(f"(float[N,3,4] x) => (float[N,3,4] y) {CONSTANTS} {{ a = Neg(x) {TORCH} }}")
    after = apply(before, FUSE)
    from pass_graphs import compute

    feeds = {"x": np.full((2, 3, 4), 7, np.float32)}
    assert np.array_equal(compute(before, feeds)[0], compute(after, feeds)[0])
