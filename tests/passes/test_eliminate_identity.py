import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators, record

from passes.eliminate_identity import EliminateIdentity

ELIMINATE = EliminateIdentity()
NO_OPS = [
    "i = Identity(a)",
    "i = Dropout(a)",
    "r = Constant<value_float=0.5>() i = Dropout(a, r)",
    "i = Cast<to=1>(a)",
    "i = Transpose<perm=[0,1,2]>(a)",
    "i = Reshape(a, same)",
    "i = Reshape(a, keep)",
    "i = Expand(a, ones)",
    "i = Tile(a, ones)",
    "i = Concat<axis=1>(a)",
    "i = Pad(a, none)",
    "i = Slice(a, zero, end, one)",
    "i = Slice(a, zero, four, two)",
    "i = Max(a)",
    "i = Add(a, plus)",
    "i = Add(plus, a)",
    "i = Sub(a, plus)",
    "i = Mul(times, a)",
    "i = Div(a, times)",
]
CONSTANTS = """<float[4] plus = {0,0,0,0}, float[1,1,1] times = {1}, float[2,1,1] twice = {1,1}, float[4] some = {0,0,1,0},
    int64[3] same = {-1,1,4}, int64[3] keep = {0,0,0}, int64[3] ones = {1,1,1}, int64[6] none = {0,0,0,0,0,0},
    int64[6] shift = {0,0,1,0,0,0},
    int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] end = {9223372036854775807}>"""


@pytest.mark.parametrize("node", NO_OPS)
def test_a_no_op_goes(node: str) -> None:
    before = graph(f"(float[N,1,4] x) => (float[N,1,4] y) {CONSTANTS} {{ a = Relu(x) {node} y = Neg(i) }}")
    after = apply(before, ELIMINATE)
    assert [o for o in operators(after) if o != "Constant"] == ["Relu", "Neg"]
    assert_close(before, after, (3, 1, 4), roundings=0)


@pytest.mark.parametrize(
    "node",
    [
        "i = Slice(a, one, end, two)",
        "i = Transpose<perm=[0,2,1]>(a)",
        "i = Cast<to=10>(a)",
        "p = Constant<value_ints=[0,0,1,0,0,0]>() i = Pad(a, p)",
        "i = Sub(plus, a)",
        "i = Div(times, a)",
        "i = Add(a, some)",
        "i = Mul(a, twice)",
    ],
)
def test_what_does_something_stays(node: str) -> None:
    before = graph(f"(float[N,1,4] x) => (float[?,?,?] y) {CONSTANTS} {{ a = Relu(x) {node} c = Cast<to=1>(i) y = Neg(c) }}")
    assert len(operators(apply(before, ELIMINATE))) >= 3


def test_a_transpose_that_moves_axes_of_size_one_keeps_the_index_map() -> None:
    before = graph("(float[N,1,1,4] x) => (float[N,1,1,4] y) { a = Relu(x) i = Transpose<perm=[0,2,1,3]>(a) y = Neg(i) }")
    assert operators(apply(before, ELIMINATE)) == ["Relu", "Neg"]


def test_transposes_are_composed() -> None:
    before = graph("(float[2,3,4] x) => (float[3,4,2] y) { a = Transpose<perm=[0,2,1]>(x) y = Transpose<perm=[2,1,0]>(a) }")
    expected = graph("(float[2,3,4] x) => (float[3,4,2] y) { y = Transpose<perm=[1,2,0]>(x) }")
    after = apply(before, ELIMINATE)
    assert_same(after, expected)
    assert_close(before, after, (2, 3, 4), roundings=0)


def test_inverse_transposes_vanish() -> None:
    before = graph("(float[2,3,4] x) => (float[2,3,4] y) { a = Transpose<perm=[2,0,1]>(x) b = Transpose<perm=[1,2,0]>(a) y = Neg(b) }")
    assert operators(apply(before, ELIMINATE)) == ["Neg"]


def test_reshapes_are_composed() -> None:
    before = graph(
        "(float[N,4,6] x) => (float[N,3,8] y) <int64[2] s = {-1, 24}, int64[3] t = {-1, 3, 8}> { a = Reshape(x, s) y = Reshape(a, t) }"
    )
    expected = graph("(float[N,4,6] x) => (float[N,3,8] y) <int64[3] t = {-1, 3, 8}> { y = Reshape(x, t) }")
    assert_same(apply(before, ELIMINATE), expected)


def test_a_reshape_that_copies_an_intermediate_dimension_is_not_composed() -> None:
    before = graph(
        "(float[N,4,6] x) => (float[N,3,8] y) <int64[2] s = {-1, 24}, int64[3] t = {0, 3, 8}> { a = Reshape(x, s) y = Reshape(a, t) }"
    )
    assert operators(apply(before, ELIMINATE)) == ["Reshape", "Reshape"]


def test_the_outputs_of_the_graph_keep_their_names() -> None:
    before = graph("(float[2] x) => (float[2] y) { a = Relu(x) y = Identity(a) }")
    after = apply(before, ELIMINATE)
    assert_same(after, graph("(float[2] x) => (float[2] y) { y = Relu(x) }"))
    assert after.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    "text",
    [
        "(float[2] x) => (float[2] y) { y = Identity(x) }",
        "(float[2] x) => (float[2] a, float[2] y) { a = Relu(x) y = Identity(a) }",
        "(float[2] x) => (float[2] y, float[2] z) <float[2] c = {1, 2}> { y = Identity(c) z = Neg(x) }",
    ],
)
def test_declines_graph_output(text: str) -> None:
    assert codes(graph(text), ELIMINATE) == ["GRAPH_OUTPUT"]


@pytest.mark.parametrize("mode", ["<bool t = {1}, float r = {0.5}>", None])
def test_declines_training_mode(mode: str | None) -> None:
    inputs = "float[2] x" if mode else "float[2] x, bool t, float r"
    before = graph(f"({inputs}) => (float[2] y) {mode or ''} {{ a = Dropout(x, r, t) y = Neg(a) }}")
    assert codes(before, ELIMINATE) == ["TRAINING_MODE"]


def test_declines_mask_output() -> None:
    before = graph("(float[2] x) => (float[2] y, bool[2] z) { a, m = Dropout(x) y = Neg(a) z = Not(m) }")
    assert codes(before, ELIMINATE) == ["MASK_OUTPUT"]


def test_every_rewrite_names_its_node() -> None:
    before = graph("(float[2] x) => (float[2] y) { a = Identity(x) b = Identity(a) y = Neg(b) }")
    assert [(r.anchor, r.what, r.proof) for r in record(before, ELIMINATE).rewrites] == [
        ("n_a", "Identity", "exact"),
        ("n_b", "Identity", "exact"),
    ]
