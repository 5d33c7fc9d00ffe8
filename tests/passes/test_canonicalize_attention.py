import numpy as np
import onnx_ir as ir
import pytest
from pass_graphs import apply, assert_close, codes, graph, operators, record

from passes.canonicalize_attention import CanonicalizeAttention

CANONICALIZE = CanonicalizeAttention()
SHAPE = (2, 3, 5, 4)
CONSTANTS = (
    "<float half = {0.5}, float[1] quarter = {0.25}, float two = {2}, float[1,1,5,5] m = {" + ", ".join(["0.5", "-1"] * 12 + ["0"]) + "}>"
)
# How exporters write the scale of attention: which, and by how much in all.
SCALES = {
    "on the scores, divided": ("s = MatMul(q, k) t = Div(s, two)", 0.5),
    "on the scores, twice": ("s = MatMul(q, k) s2 = Mul(s, half) t = Mul(quarter, s2)", 0.125),
    "before a mask": ("s = MatMul(q, k) s2 = Mul(s, half) t = Add(s2, m)", 0.5),
    "before two masks": ("s = MatMul(q, k) s2 = Mul(s, half) s3 = Add(m, s2) t = Add(s3, m)", 0.5),
    "on query and key": ("q2 = Mul(q, half) k2 = Mul(half, k) s = MatMul(q2, k2) t = Add(s, m)", 0.25),
    "on the key": ("k2 = Mul(k, quarter) t = MatMul(q, k2)", 0.25),
    "on the query, divided": ("q2 = Div(q, two) t = MatMul(q2, k)", 0.5),
    "everywhere": ("q2 = Div(q, two) k2 = Mul(k, half) s = MatMul(q2, k2) t = Mul(s, quarter)", 0.0625),
}


def core(scores: str, *, extra: str = "", outputs: str = "", before: str = "q = Neg(x)") -> ir.Model:
    """Return attention of x with itself around ``scores``, which makes ``t`` of ``q`` and ``k``."""
    body = f"{before} k = Transpose<perm=[0,1,3,2]>(x) v = Relu(x) {scores} w = Softmax<axis=-1>(t) y = MatMul(w, v) {extra}"
    return graph(f"(float[B,3,5,4] x) => (float[B,3,5,4] y{outputs}) {CONSTANTS} {{ {body} }}")


@pytest.mark.parametrize("form", SCALES)
def test_one_scale_on_the_query(form: str) -> None:
    text, factor = SCALES[form]
    before = core(text)
    after = apply(before, CANONICALIZE)
    [product] = [n for n in after.graph if n.op_type == "MatMul" and n.outputs[0].name == before_product(text)]
    scale = product.inputs[0].producer()
    assert scale is not None
    assert scale.op_type == "Mul"
    assert float(scale.inputs[1].const_value.numpy()) == factor
    assert [n for n in after.graph if n.op_type in {"Mul", "Div"}] == [scale]
    assert_close(before, after, SHAPE, roundings=16)
    assert not record(after, CANONICALIZE).rewrites


def before_product(text: str) -> str:
    return "s" if "s = MatMul" in text else "t"


@pytest.mark.parametrize("text", ["q2 = Mul(q, half) t = MatMul(q2, k)", "t = MatMul(q, k)", "s = MatMul(q, k) t = Add(s, m)"])
def test_what_is_canonical_stays(text: str) -> None:
    found = record(core(text), CANONICALIZE)
    assert not found.rewrites
    assert not found.declines


def test_scales_are_found_through_operators_that_move_elements() -> None:
    before = core(
        "q2 = Mul(q1, half) k2 = Transpose<perm=[0,1,2,3]>(k) t = MatMul(q2, k2)",
        before="q0 = Div(x, two) shape = Constant<value_ints=[0, 3, 5, 4]>() q1 = Reshape(q0, shape)",
    )
    after = apply(before, CANONICALIZE)
    assert sum(op in {"Mul", "Div"} for op in operators(after)) == 1
    assert_close(before, after, SHAPE, roundings=16)


def test_three_nodes_that_turn_the_key_become_one() -> None:
    flat, back = "Constant<value_ints=[-1, 5, 4]>()", "Constant<value_ints=[-1, 3, 4, 5]>()"
    body = (
        f"f = {flat} b = {back} k1 = Reshape(x, f) k2 = Transpose<perm=[0,2,1]>(k1) k = Reshape(k2, b) ks = Mul(k, half) q = Mul(x, half)"
        " t = MatMul(q, ks) w = Softmax<axis=-1>(t) y = MatMul(w, x)"
    )
    before = graph(f"(float[B,3,5,4] x) => (float[B,3,5,4] y) {CONSTANTS} {{ {body} }}")
    from passes.fold_constants import FoldConstants

    after = apply(before, FoldConstants(), CANONICALIZE)
    assert sorted(operators(after)) == ["MatMul", "MatMul", "Mul", "Softmax", "Transpose"]
    assert_close(before, after, SHAPE, roundings=16)


def test_a_reshape_that_moves_elements_between_heads_stays() -> None:
    # 3 x 5 rows regrouped as 5 x 3: the same nodes, another permutation of the elements.
    body = (
        "f = Constant<value_ints=[-1, 3, 4]>() b = Constant<value_ints=[-1, 5, 4, 3]>() k1 = Reshape(x, f)"
        " k2 = Transpose<perm=[0,2,1]>(k1) k = Reshape(k2, b) q = Transpose<perm=[0,2,1,3]>(x) t = MatMul(q, k)"
        " w = Softmax<axis=-1>(t) v = Transpose<perm=[0,2,1,3]>(x) y = MatMul(w, v)"
    )
    before = graph(f"(float[B,3,5,4] x) => (float[B,5,3,4] y) {CONSTANTS} {{ {body} }}")
    from passes.fold_constants import FoldConstants

    assert not record(apply(before, FoldConstants()), CANONICALIZE).rewrites


def test_declines_multi_consumer() -> None:
    assert codes(core("s = MatMul(q, k) t = Div(s, two)", extra="z = Relu(s)", outputs=", float[B,3,5,5] z"), CANONICALIZE) == [
        "MULTI_CONSUMER"
    ]


def test_a_scale_that_something_else_reads_stays() -> None:
    before = core("q2 = Mul(q, half) k2 = Mul(k, half) t = MatMul(q2, k2)", extra="z = Relu(k2)", outputs=", float[B,3,4,5] z")
    assert not record(before, CANONICALIZE).rewrites


def test_declines_mask_scaled() -> None:
    assert codes(core("s = MatMul(q, k) s2 = Add(s, m) t = Mul(s2, half)"), CANONICALIZE) == ["MASK_SCALED"]


def test_declines_numeric() -> None:
    before = core("k2 = Mul(k, half) t = MatMul(q, k2)")
    before.graph.initializers["half"].const_value = ir.tensor(np.array(0.0, np.float32), name="half")
    assert codes(before, CANONICALIZE) == ["NUMERIC"]


def test_a_softmax_over_another_axis_is_no_attention() -> None:
    before = core("s = MatMul(q, k) t = Div(s, two)")
    next(n for n in before.graph if n.op_type == "Softmax").attributes["axis"] = ir.AttrInt64("axis", 1)
    assert not record(before, CANONICALIZE).rewrites
