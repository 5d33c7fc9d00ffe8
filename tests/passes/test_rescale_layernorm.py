import numpy as np
import onnx_ir as ir
import pytest
from pass_graphs import operators
from small_graphs import compute, graph, random, weight

from deploycc.core.contract import CANONICAL
from deploycc.core.passes import PassRecord, run
from deploycc.core.rescaling import Rescale
from passes.rescale_layernorm import RescaleLayernorm

D = 8
DRAW = np.random.default_rng(3)
SCALE = tuple(float(v) for v in np.exp2(-DRAW.uniform(0, 4, D)))
SHIFT = tuple(float(v) for v in DRAW.normal(0, 2, D))
LAYER = "n = LayerNormalization<axis=-1>(x, gamma, beta)"


def rescaled(model: ir.Model, *names: str, shift: tuple[float, ...] = SHIFT) -> tuple[ir.Model, PassRecord]:
    """Apply one rescale at each of the named nodes."""
    each = RescaleLayernorm({name: Rescale(SCALE, shift) for name in names})
    after, [found] = run(model, [each], contract=CANONICAL)
    return after, found


def layer(body: str, shape: str = "B,5,8", outputs: str = "float[?,?,4] y", **more: np.ndarray) -> ir.Model:
    constants = {"gamma": 1 + 0.2 * random(D), "beta": random(D), "w": weight(D, 4), "v": weight(4, D), "b": random(4), **more}
    used = {name: array for name, array in constants.items() if f" {name}" in body.replace("(", " ").replace(",", " ")}
    return graph(f"(float[{shape}] x) => ({outputs}) {{ {body} }}", **used)


def assert_same_function(before: ir.Model, after: ir.Model, *shape: int) -> None:
    """Compare on random inputs; the parameters are rounded once more, and shifts are as large as the values."""
    x = random(*shape)
    for name, expected in compute(before, x=x).items():
        found = compute(after, x=x)[name]
        assert np.max(np.abs(found - expected)) <= 1e-5 * max(1.0, float(np.max(np.abs(expected))))


LINEAR = {
    "MatMul with the sum of its bias": ("z = MatMul(n, w) y = Add(z, b)", (2, 5, D)),
    "MatMul without bias": ("y = MatMul(n, w)", (2, 5, D)),
    "through Reshape and Transpose": ("t = Transpose<perm=[1,0,2]>(n) z = MatMul(t, w) y = Add(b, z)", (2, 5, D)),
    "two readers": ("p = MatMul(n, w) q = MatMul(n, u) y = Add(p, q)", (2, 5, D)),
}


@pytest.mark.parametrize("form", LINEAR)
def test_the_function_stays(form: str) -> None:
    body, shape = LINEAR[form]
    before = layer(f"{LAYER} {body}", u=weight(D, 4, seed=11))
    after, found = rescaled(before, "n_n")
    assert len(found.rewrites) == 1
    assert_same_function(before, after, *shape)
    # The constants were changed for good: the normalized value is another one.
    gamma = next(n for n in after.graph if n.op_type == "LayerNormalization").inputs[1]
    assert gamma is not None
    assert np.allclose(gamma.const_value.numpy(), before.graph.initializers["gamma"].const_value.numpy() * np.array(SCALE), rtol=1e-6)


def test_a_bias_is_created_only_where_there_is_none() -> None:
    with_bias, _ = rescaled(layer(f"{LAYER} z = MatMul(n, w) y = Add(z, b)"), "n_n")
    without, _ = rescaled(layer(f"{LAYER} y = MatMul(n, w)"), "n_n")
    unshifted, _ = rescaled(layer(f"{LAYER} y = MatMul(n, w)"), "n_n", shift=(0.0,) * D)
    assert operators(with_bias) == ["LayerNormalization", "MatMul", "Add"]
    assert operators(without) == ["LayerNormalization", "MatMul", "Add"]
    assert [v.name for v in without.graph.outputs] == ["y"]
    assert operators(unshifted) == ["LayerNormalization", "MatMul"]


def test_a_normalization_without_bias_gets_one() -> None:
    before = layer("n = LayerNormalization<axis=-1>(x, gamma) y = MatMul(n, w)")
    after, _ = rescaled(before, "n_n")
    assert_same_function(before, after, 2, 5, D)


@pytest.mark.parametrize("attributes", ["", "<transB=1>", "<alpha=0.5, beta=2.0>"])
def test_gemm(attributes: str) -> None:
    name = "v" if "transB" in attributes else "w"
    before = layer(f"{LAYER} y = Gemm{attributes}(n, {name}, b)", "B,8", "float[?,4] y")
    after, _ = rescaled(before, "n_n")
    assert_same_function(before, after, 3, D)


def test_gemm_without_bias() -> None:
    before = layer(f"{LAYER} y = Gemm<alpha=0.5>(n, w)", "B,8", "float[?,4] y")
    after, _ = rescaled(before, "n_n")
    assert_same_function(before, after, 3, D)


def convolution(attributes: str) -> ir.Model:
    body = f"n = BatchNormalization(x, gamma, beta, mean, variance) y = Conv{attributes}(n, k)"
    statistics = {"mean": random(D, seed=5), "variance": 1 + np.abs(random(D, seed=6)), "k": weight(4, D, 2, 2)}
    return layer(body, "B,8,6,6", "float[?,4,?,?] y", **statistics)


def test_a_convolution_without_padding_is_shifted_too() -> None:
    before = convolution("<strides=[2,2]>")
    after, _ = rescaled(before, "n_n")
    assert_same_function(before, after, 2, D, 6, 6)


def test_a_padded_convolution_is_scaled_only() -> None:
    before = convolution("<pads=[1,1,0,0]>")
    after, found = rescaled(before, "n_n", shift=(0.0,) * D)
    assert found.rewrites
    assert_same_function(before, after, 2, D, 6, 6)
    assert [d.code for d in rescaled(before, "n_n")[1].declines] == ["NUMERIC"]


def test_a_product_with_a_vector_and_a_sum() -> None:
    before = layer("m = Mul(x, gamma) a = Add(m, beta) y = MatMul(a, w)")
    after, found = rescaled(before, "n_a")
    assert [r.anchor for r in found.rewrites] == ["n_a"]
    assert_same_function(before, after, 2, 5, D)


def test_windows_of_a_rolled_map() -> None:
    """The shifted windows of Swin: slices of the normalized map are put together again in another order."""
    body = (
        f"{LAYER} s = Slice(n, one, five, axis) t = Slice(n, zero, one, axis) c = Concat<axis=1>(s, t)"
        " r = Reshape(c, windows) z = MatMul(r, w) y = Add(z, b)"
    )
    numbers = {k: np.array([v], np.int64) for k, v in (("zero", 0), ("one", 1), ("five", 5), ("axis", 1))}
    before = layer(body, windows=np.array([-1, 1, D], np.int64), **numbers)
    after, found = rescaled(before, "n_n")
    assert found.rewrites
    assert_same_function(before, after, 2, 5, D)


REFUSED = {
    "POST_NORM": "y = Add(n, x)",
    "READER": "y = Relu(n)",
    "NONCONST_WEIGHT": "t = Transpose<perm=[0,2,1]>(n) y = MatMul(n, t)",
    "AXIS": "t = Transpose<perm=[0,2,1]>(n) y = MatMul(t, five)",
    "JOINED": "c = Concat<axis=1>(n, x) y = MatMul(c, w)",
    "NO_READER": "y = Shape(n)",
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    kind = "int64[3] y" if code == "NO_READER" else "float[?,?,?] y"
    before = layer(f"{LAYER} {REFUSED[code]}", outputs=kind, five=weight(5, 4))
    after, found = rescaled(before, "n_n")
    assert [d.code for d in found.declines] == [code]
    assert after is before


def test_refuses_a_graph_output() -> None:
    before = layer(f"{LAYER} y = MatMul(n, w)", outputs="float[?,?,4] y, float[?,?,8] n")
    assert [d.code for d in rescaled(before, "n_n")[1].declines] == ["GRAPH_OUTPUT"]


def test_refuses_a_depthwise_convolution() -> None:
    before = convolution("<group=8>")
    before.graph.initializers["k"].const_value = ir.tensor(weight(8, 1, 2, 2), name="k")
    assert [d.code for d in rescaled(before, "n_n")[1].declines] == ["GROUP_MISMATCH"]


@pytest.mark.parametrize("scale", [(0.5,) * 3, (0.0,) * D, (1e-6,) * D])
def test_refuses_numbers_that_do_not_fit(scale: tuple[float, ...]) -> None:
    before = layer(f"{LAYER} y = MatMul(n, w)", w=1e3 * weight(D, 4))
    each = RescaleLayernorm({"n_n": Rescale(scale, (0.0,) * len(scale))})
    after, [found] = run(before, [each], contract=CANONICAL)
    assert [d.code for d in found.declines] == ["NUMERIC"]
    assert after is before


def test_nothing_is_done_where_the_plan_has_nothing() -> None:
    before = layer(f"{LAYER} y = MatMul(n, w)")
    after, found = rescaled(before)
    assert after is before
    assert not found.rewrites
    assert not found.declines
