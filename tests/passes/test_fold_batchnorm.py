import numpy as np
import onnx_ir as ir
import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators, record

from passes.fold_batchnorm import FoldBatchnorm
from passes.fold_constants import FoldConstants

FOLD = FoldBatchnorm()
BN = "y = BatchNormalization(a, g, b, m, v)"
NORM = "float[4] g = {1, -2, 0.5, 3}, float[4] b = {0.1, 0.2, -0.3, 0}, float[4] m = {1, 0, -1, 2}, float[4] v = {1, 2, 0.5, 4}"
CENTRED = NORM.replace("b = {0.1, 0.2, -0.3, 0}", "b = {0, 0, 0, 0}").replace("m = {1, 0, -1, 2}", "m = {0, 0, 0, 0}")


def numbers(*shape: int) -> str:
    """Return an initializer's type and values, the same every time."""
    values = np.random.default_rng(7).uniform(-1, 1, shape).round(3)
    return f"{list(shape)}".replace(" ", "") + " {name} = {{" + ", ".join(map(str, values.ravel())) + "}}"


def tensor(name: str, *shape: int) -> str:
    return "float" + numbers(*shape).format(name=name)


def test_before_and_expected() -> None:
    before = graph(
        """(float[N,1,2,2] x) => (float[N,1,2,2] y) <float[1,1,1,1] w = {3}, float[1] c = {1}, float[1] g = {4}, float[1] b = {5},
        float[1] m = {2}, float[1] v = {3.75}> { a = Conv(x, w, c) y = BatchNormalization<epsilon=0.25>(a, g, b, m, v) }"""
    )
    expected = graph("(float[N,1,2,2] x) => (float[N,1,2,2] y) <float[1,1,1,1] w = {6}, float[1] c = {3}> { y = Conv(x, w, c) }")
    assert_same(apply(before, FOLD), expected)


@pytest.mark.parametrize(
    ("layer", "weights", "channels"),
    [
        ("Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)", [("w", 4, 3, 3, 3)], 3),
        ("Conv<group=2>(x, w, c)", [("w", 4, 3, 1, 1), ("c", 4)], 6),
        ("Conv<group=4, dilations=[2,2]>(x, w)", [("w", 4, 1, 2, 2)], 4),
        ("ConvTranspose<strides=[2,2], pads=[1,1,1,1]>(x, w, c)", [("w", 3, 4, 3, 3), ("c", 4)], 3),
        ("ConvTranspose<group=2, strides=[2,2]>(x, w)", [("w", 6, 2, 2, 2)], 6),
        ("ConvTranspose<group=4>(x, w, c)", [("w", 4, 1, 2, 2), ("c", 4)], 4),
    ],
)
def test_behind_a_convolution(layer: str, weights: list[tuple[str, int]], channels: int) -> None:
    given = ", ".join(tensor(name, *shape) for name, *shape in weights)
    before = graph(
        f"(float[N,{channels},5,5] x) => (float[N,4,?,?] y) <{given}, {NORM}> {{ a = {layer} y = BatchNormalization(a, g, b, m, v) }}"
    )
    after = apply(before, FOLD)
    assert operators(after) == [layer.split("<")[0]]
    assert_close(before, after, (2, channels, 5, 5), roundings=64)


@pytest.mark.parametrize(
    ("layer", "weights", "after_it"),
    [
        ("Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, c)", [("w", 4, 3), ("c", 4)], ["Gemm"]),
        ("Gemm(x, w)", [("w", 3, 4)], ["Gemm"]),
        ("Gemm<beta=0.5>(x, w, c)", [("w", 3, 4), ("c", 1)], ["Gemm"]),
        ("MatMul(x, w)", [("w", 3, 4)], ["MatMul", "Add"]),
    ],
)
def test_behind_a_matrix_product(layer: str, weights: list[tuple[str, int]], after_it: list[str]) -> None:
    given = ", ".join(tensor(name, *shape) for name, *shape in weights)
    before = graph(f"(float[N,3] x) => (float[N,4] y) <{given}, {NORM}> {{ a = {layer} y = BatchNormalization(a, g, b, m, v) }}")
    after = apply(before, FOLD)
    assert operators(after) == after_it
    assert_close(before, after, (5, 3), roundings=64)


def test_behind_a_matrix_product_and_its_bias() -> None:
    given = f"{tensor('w', 3, 4)}, {tensor('c', 4)}, {NORM}"
    before = graph(f"(float[N,3] x) => (float[N,4] y) <{given}> {{ a = MatMul(x, w) d = Add(c, a) y = BatchNormalization(d, g, b, m, v) }}")
    after = apply(before, FOLD)
    assert operators(after) == ["MatMul", "Add"]
    assert_close(before, after, (5, 3), roundings=64)


@pytest.mark.parametrize(
    ("layer", "weights", "shape", "after_it"),
    [
        ("Conv<group=2, strides=[2,2]>(a, w, c)", [("w", 6, 2, 2, 2), ("c", 6)], (4, 5, 5), ["Conv"]),
        ('Conv<auto_pad="VALID">(a, w)', [("w", 3, 4, 3, 3)], (4, 5, 5), ["Conv"]),
        ("Gemm<transB=1, alpha=0.5, beta=2.0>(a, w, c)", [("w", 3, 4), ("c", 3)], (4,), ["Gemm"]),
        ("Gemm<alpha=2.0>(a, w)", [("w", 4, 3)], (4,), ["Gemm"]),
        ("MatMul(a, w)", [("w", 4, 3)], (4,), ["MatMul", "Add"]),
    ],
)
def test_before_a_linear_node(layer: str, weights: list[tuple[str, int]], shape: tuple[int, ...], after_it: list[str]) -> None:
    given = ", ".join(tensor(name, *each) for name, *each in weights)
    sizes = ",".join(map(str, shape))
    out = ",".join("?" * len(shape))
    before = graph(f"(float[N,{sizes}] x) => (float[N,{out}] y) <{given}, {NORM}> {{ a = BatchNormalization(x, g, b, m, v) y = {layer} }}")
    after = apply(before, FOLD)
    assert operators(after) == after_it
    assert_close(before, after, (3, *shape), roundings=64)


@pytest.mark.parametrize("layer", ["Conv<pads=[1,1,1,1]>", "ConvTranspose"])
def test_before_a_padding_convolution_without_an_offset(layer: str) -> None:
    given = f"{tensor('w', 4, 4, 3, 3)}, {CENTRED}"
    before = graph(f"(float[N,4,5,5] x) => (float[N,4,?,?] y) <{given}> {{ a = BatchNormalization(x, g, b, m, v) y = {layer}(a, w) }}")
    after = apply(before, FOLD)
    assert len(operators(after)) == 1
    assert_close(before, after, (2, 4, 5, 5), roundings=64)


def test_a_chain_of_normalizations_folds_to_the_end() -> None:
    given = f"{tensor('w', 4, 4, 1, 1)}, {NORM}"
    before = graph(
        f"""(float[N,4,3,3] x) => (float[N,4,3,3] y) <{given}> {{
        a = BatchNormalization(x, g, b, m, v) c = BatchNormalization(a, g, b, m, v) d = Conv(c, w)
        y = BatchNormalization(d, g, b, m, v) }}"""
    )
    after = apply(before, FOLD)
    assert operators(after) == ["Conv"]
    assert_close(before, after, (2, 4, 3, 3), roundings=256)


def test_a_shared_weight_is_not_touched() -> None:
    given = f"{tensor('w', 4, 4, 1, 1)}, {NORM}"
    before = graph(
        f"(float[N,4,3,3] x) => (float[N,4,3,3] y) <{given}> {{ a = Conv(x, w) c = BatchNormalization(a, g, b, m, v) y = Conv(c, w) }}"
    )
    after = apply(before, FOLD)
    assert operators(after) == ["Conv", "Conv"]
    assert after.graph[1].inputs[1].name == "w"
    assert_close(before, after, (2, 4, 3, 3), roundings=64)


def test_metadata_of_both_nodes_is_merged() -> None:
    before = graph(f"(float[N,4,3,3] x) => (float[N,4,3,3] y) <{tensor('w', 4, 4, 1, 1)}, {NORM}> {{ a = Conv(x, w) {BN} }}")
    before.graph[0].metadata_props["scope"] = "conv"
    before.graph[1].metadata_props.update({"scope": "bn", "only": "bn"})
    assert apply(before, FOLD).graph[0].metadata_props == {"scope": "conv", "only": "bn"}


def test_half_precision_weights_stay_half() -> None:
    half = graph(
        f"""(float16[N,4,3,3] x) => (float16[N,4,3,3] y) <{tensor("w", 4, 4, 1, 1)}, {NORM}> {{
        k = CastLike(w, x) a = Conv(x, k) y = BatchNormalization(a, g, b, m, v) }}"""
    )
    after = apply(half, FoldConstants(), FOLD)
    assert {v.dtype for v in after.graph.initializers.values()} == {ir.DataType.FLOAT16}


CONV = f"{tensor('w', 4, 4, 3, 3)}, {tensor('p', 4, 4, 1, 1)}, {NORM}"
DECLINED = {
    "TRAINING_MODE": "(float[2,4,3,3] x) => (float[N,4,H,W] y) { a = Conv(x, p)"
    " y, q, r = BatchNormalization<training_mode=1>(a, g, b, m, v) }",
    "NONCONST_PARAMETERS": "(float[2,4,3,3] x, float[4] s) => (float[2,4,?,?] y) { a = Conv(x, p) y = BatchNormalization(a, s, b, m, v) }",
    "NONCONST_WEIGHT": "(float[2,4,3,3] x, float[4,4,1,1] k) => (float[2,4,?,?] y) { a = Conv(x, k) " + BN + " }",
    "NONCONST_BIAS": "(float[2,4,3,3] x, float[4] k) => (float[2,4,?,?] y) { a = Conv(x, p, k) y = BatchNormalization(a, g, b, m, v) }",
    "MULTI_CONSUMER": "(float[2,4,3,3] x) => (float[N,4,H,W] y) { a = Conv(x, p) c = BatchNormalization(a, g, b, m, v) y = Add(a, c) }",
    "GRAPH_OUTPUT": "(float[2,4,3,3] x) => (float[2,4,?,?] y, float[2,4,?,?] a) { a = Conv(x, p) y = BatchNormalization(a, g, b, m, v) }",
    "PAD2_NONZERO": "(float[2,4,3,3] x) => (float[N,4,H,W] y) { a = BatchNormalization(x, g, b, m, v) y = Conv<pads=[1,1,1,1]>(a, w) }",
    "STANDALONE": "(float[2,4,3,3] x) => (float[N,4,H,W] y) { a = Relu(x) y = BatchNormalization(a, g, b, m, v) }",
    "AXIS": "(float[2,4,4] x) => (float[2,4,4] y) { k = Reshape(p, f) a = MatMul(x, l) y = BatchNormalization(a, g, b, m, v) }",
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines(code: str) -> None:
    text = DECLINED[code].replace("{ ", f"<{CONV}, int64[2] f = {{4, 4}}, {tensor('l', 4, 4)}> {{ ", 1)
    assert codes(graph(text), FOLD) == [code]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("NONCONST_WEIGHT", "(float[2,4] x, float[4,4] k) => (float[2,4] y) { a = BatchNormalization(x, g, b, m, v) y = MatMul(a, k) }"),
        ("NONCONST_BIAS", "(float[2,4] x, float[4] k) => (float[2,4] y) { a = BatchNormalization(x, g, b, m, v) y = Gemm(a, l, k) }"),
        ("MULTI_CONSUMER", "(float[2,4] x) => (float[2,4] y) { a = BatchNormalization(x, g, b, m, v) c = MatMul(a, l) y = Add(a, c) }"),
        ("GRAPH_OUTPUT", "(float[2,4] x) => (float[2,4] a, float[2,4] y) { a = BatchNormalization(x, g, b, m, v) y = MatMul(a, l) }"),
        ("AXIS", "(float[2,4,4] x) => (float[2,4,4] y) { a = BatchNormalization(x, g, b, m, v) y = MatMul(a, l) }"),
        (
            "PAD2_NONZERO",
            '(float[2,4,3,3] x) => (float[N,4,H,W] y) { a = BatchNormalization(x, g, b, m, v) y = Conv<auto_pad="SAME_UPPER">(a, w) }',
        ),
    ],
)
def test_declines_forward(code: str, text: str) -> None:
    given = text.replace("{ ", f"<{CONV}, {tensor('l', 4, 4)}> {{ ", 1)
    assert codes(graph(given), FOLD) == [code]


@pytest.mark.parametrize("variance", ["1e-30, 1, 1, 1", "-1, 1, 1, 1"])
def test_declines_numeric(variance: str) -> None:
    given = CONV.replace("v = {1, 2, 0.5, 4}", f"v = {{{variance}}}")
    before = graph(
        f"(float[2,4,3,3] x) => (float[2,4,3,3] y) <{given}> {{ a = Conv(x, p) y = BatchNormalization<epsilon=1e-20>(a, g, b, m, v) }}"
    )
    assert codes(before, FOLD) == ["NUMERIC"]


def test_the_proof_is_stated() -> None:
    before = graph(f"(float[2,4,3,3] x) => (float[2,4,3,3] y) <{CONV}> {{ a = Conv(x, p) y = BatchNormalization(a, g, b, m, v) }}")
    assert record(before, FOLD).rewrites[0].proof == "exact in float64, rounded once"
