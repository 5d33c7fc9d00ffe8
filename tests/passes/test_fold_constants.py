import numpy as np
import onnx_ir as ir
import pytest
from pass_graphs import apply, assert_close, assert_same, codes, compute, graph, operators, record

from passes.fold_constants import FoldConstants

FOLD = FoldConstants()


def test_a_constant_becomes_an_initializer() -> None:
    before = graph("(float[2] x) => (float[2] y) { c = Constant<value_float=2.0>() y = Mul(x, c) }")
    expected = graph("(float[2] x) => (float[2] y) <float c = {2.0}> { y = Mul(x, c) }")
    after = apply(before, FOLD)
    assert_same(after, expected)
    assert after.graph.initializers["c"].dtype == ir.DataType.FLOAT


def test_arithmetic_is_carried_in_float64_and_rounded_once() -> None:
    before = graph("(float[2] x) => (float[2] y) <float a = {1.0}, float b = {3.0}> { c = Div(a, b) y = Mul(x, c) }")
    after = apply(before, FOLD)
    assert after.graph.initializers["c"].const_value.numpy() == np.float32(1.0 / 3.0)
    assert record(before, FOLD).rewrites[0].proof == "rounded once to the type of the tensor"


def test_the_bias_of_a_raw_export_becomes_zeros() -> None:
    before = graph(
        """(float[N,2,4,4] x) => (float[N,3,4,4] y) <float[3,2,1,1] w = {1,2,3,4,5,6}> {
        s = Shape<start=0, end=1>(w) k = Constant<value_ints=[1]>() e = Expand(s, k)
        z = Constant<value_float=0.0>() l = CastLike(z, x) b = Expand(l, e) y = Conv(x, w, b) }"""
    )
    expected = graph(
        """(float[N,2,4,4] x) => (float[N,3,4,4] y) <float[3,2,1,1] w = {1,2,3,4,5,6}, float[3] b = {0,0,0}> {
        y = Conv(x, w, b) }"""
    )
    assert_same(apply(before, FOLD), expected)


def test_cast_like_takes_the_type_and_not_the_value() -> None:
    before = graph("(int64[2] i, float[2] x) => (float[2] y) { c = CastLike(i, x) y = Mul(x, c) }")
    assert operators(apply(before, FOLD)) == ["Cast", "Mul"]


def test_a_target_with_one_dynamic_dimension_is_settled() -> None:
    before = graph(
        """(float[N,6,4] x) => (float[N,2,12] y) <int64 zero = {0}, int64[1] a = {0}, int64[2] rest = {2, 12}> {
        s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, a) t = Concat<axis=0>(u, rest) y = Reshape<allowzero=1>(x, t) }"""
    )
    expected = graph("(float[N,6,4] x) => (float[N,2,12] y) <int64[3] t = {-1, 2, 12}> { y = Reshape(x, t) }")
    assert_same(apply(before, FOLD), expected)
    assert ("n_y", "the computed target shape is [-1, 2, 12]") in {(r.anchor, r.what) for r in record(before, FOLD).rewrites}


def test_dynamic_dimensions_cancel_in_shape_arithmetic() -> None:
    before = graph(
        """(float[N,6,4] x) => (float[?,?] y) <int64[1] six = {6}, int64[1] all = {-1}> {
        n = Shape<start=0, end=1>(x) m = Mul(n, six) t = Concat<axis=0>(m, all) y = Reshape(x, t) }"""
    )
    after = apply(before, FOLD)
    assert after.graph[0].inputs[1].const_value.numpy().tolist() == [-1, 4]
    assert_close(before, after, (3, 6, 4), roundings=0)


def test_two_dynamic_dimensions_stay_computed() -> None:
    before = graph(
        """(float[N,M,4] x) => (float[?,?,?] y) <int64[2] r = {2, 2}> {
        s = Shape<start=0, end=2>(x) t = Concat<axis=0>(s, r) y = Reshape(x, t) }"""
    )
    assert operators(apply(before, FOLD)) == ["Shape", "Concat", "Reshape"]


def test_static_parts_of_a_dynamic_shape_are_numbers() -> None:
    before = graph(
        """(float[N,3,9] x) => (float[N,3,9] y) <int64 last = {-1}> {
        s = Shape(x) c = Gather(s, last) f = Cast<to=1>(c) r = Sqrt(f) y = Div(x, r) }"""
    )
    expected = graph("(float[N,3,9] x) => (float[N,3,9] y) <float r = {3.0}> { y = Div(x, r) }")
    assert_same(apply(before, FOLD), expected)


def test_a_rolled_window_gets_static_shapes() -> None:
    before = graph(
        """(float[N,5,2] x) => (float[N,2,5] y) <int64 k = {2}, int64[1] z = {0}, int64[1] one = {1}> {
        s = Shape<start=1, end=2>(x) m = Mod(k, s) a = Slice(x, z, m, one) b = Slice(x, m, s, one) r = Concat<axis=1>(b, a)
        n = Shape<start=0, end=1>(r) q = Shape<start=2, end=3>(r) p = Shape<start=1, end=2>(r)
        t = Concat<axis=0>(n, q, p) y = Reshape(r, t) }"""
    )
    after = apply(before, FOLD)
    assert operators(after) == ["Slice", "Slice", "Concat", "Reshape"]
    assert_close(before, after, (2, 5, 2), roundings=0)


def test_a_dimension_is_never_minus_one() -> None:
    before = graph(
        """(float[N,4] x) => (float[?,4] y) <int64[1] minus = {-1}, int64[1] one = {1}, int64[1] four = {4}> {
        n = Shape<start=0, end=1>(x) c = Equal(n, minus) t = Where(c, one, n) s = Concat<axis=0>(t, four) y = Reshape(x, s) }"""
    )
    assert operators(apply(before, FOLD)) == ["Reshape"]


@pytest.mark.parametrize("index", [0, -3])
def test_gather_of_a_dynamic_dimension_stays(index: int) -> None:
    before = graph(f"(float[N,3,9] x) => (int64 y) <int64 i = {{{index}}}> {{ s = Shape(x) y = Gather(s, i) }}")
    assert operators(apply(before, FOLD)) == ["Shape", "Gather"]


def test_metadata_and_name_of_a_settled_type_stay() -> None:
    before = graph("(int64[2] i, float[2] x) => (float[2] y) { c = CastLike(i, x) y = Mul(x, c) }")
    before.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'block']"
    node = apply(before, FOLD).graph[0]
    assert (node.name, node.metadata_props["pkg.torch.onnx.name_scopes"]) == ("n_c", "['', 'block']")


def test_dead_nodes_are_removed_and_listed() -> None:
    before = graph("(float[2] x) => (float[2] y) { d = Relu(x) e = Sqrt(d) y = Neg(x) }")
    found = record(before, FOLD)
    assert {r.anchor for r in found.rewrites} == {"n_d", "n_e"}
    assert found.nodes_after == 1


def test_declines_size() -> None:
    before = graph(
        "(float[1000,1000] x) => (float[1000,1000] y) <float z = {0}, int64[2] s = {1000, 1000}> { e = Expand(z, s) y = Add(x, e) }"
    )
    assert codes(before, FOLD) == ["SIZE"]
    assert codes(before, FoldConstants(growth_limit=4_000_000)) == []


def test_a_huge_range_is_not_even_tried() -> None:
    text = "(int64 x) => (int64[?] y) <int64 a = {0}, int64 b = {1099511627776}, int64 c = {1}> { r = Range(a, b, c) y = Add(r, x) }"
    assert codes(graph_without_propagation(text), FOLD) == ["SIZE"]


@pytest.mark.parametrize(("operator", "first", "second"), [("Div", -(2**63), -1), ("Div", 1, 0), ("Mod", 1, 0)])
def test_declines_evaluation(operator: str, first: int, second: int) -> None:
    before = graph(f"(int64 x) => (int64 y) <int64 a = {{{first}}}, int64 b = {{{second}}}> {{ c = {operator}(a, b) y = Add(x, c) }}")
    assert codes(before, FOLD) == ["EVALUATION"]


def test_declines_evaluation_of_a_cast_that_has_no_result() -> None:
    before = graph("(int64 x) => (int64 y) <float a = {1e30}> { c = Cast<to=7>(a) y = Add(x, c) }")
    assert codes(before, FOLD) == ["EVALUATION"]


def test_infinity_is_a_result() -> None:
    before = graph("(float x) => (float y) <float a = {1}, float b = {0}> { c = Div(a, b) d = Neg(c) y = Max(x, d) }")
    after = apply(before, FOLD)
    assert operators(after) == ["Max"]
    assert compute(after, {"x": np.float32(3)}) == [3]


def test_declines_graph_output() -> None:
    before = graph("(float[2] x) => (float y, float[2] z) { y = Constant<value_float=1.0>() z = Neg(x) }")
    assert codes(before, FOLD) == ["GRAPH_OUTPUT"]


def test_declines_zero_size() -> None:
    before = graph(
        """(float[N,0] x) => (float[N,0,2] y) <int64[2] r = {0, 2}> {
        n = Shape<start=0, end=1>(x) t = Concat<axis=0>(n, r) y = Reshape<allowzero=1>(x, t) }"""
    )
    assert codes(before, FOLD) == ["ZERO_SIZE"]


def test_declines_dtype() -> None:
    before = graph('(float x) => (string y, float z) { s = Constant<value_string="a">() y = Identity(s) z = Neg(x) }')
    assert codes(before, FOLD) == ["DTYPE"]


def test_quantize_pairs_are_left_to_the_backend() -> None:
    before = graph(
        """(float[2] x) => (float[2] y) <float[2] w = {1, 2}, float s = {0.5}, int8 z = {0}> {
        q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z) y = Mul(x, d) }"""
    )
    assert not record(before, FOLD).rewrites


def graph_without_propagation(text: str) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 9, opset_import: ["": 20]> g {text}')
    for node in model.graph:
        node.name = f"n_{node.outputs[0].name}"
    return model
