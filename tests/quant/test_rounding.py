from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from small_graphs import compute, dataset, graph, random, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.formats import FP8, FP16, FP32, INT8, Format
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.quantizers import decode, quantize_weight
from deploycc.quant import rounding
from deploycc.quant.layers import Layer, codes_of
from deploycc.quant.regions import partition
from deploycc.quant.rounding import SAMPLES, round_weights, rounded

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

C, OUT = 24, 16
FORMATS = pytest.mark.parametrize("format", [INT8, FP8], ids=str)


def correlated(rows: int, seed: int = 3) -> np.ndarray:
    """Return inputs that live near a subspace, as the activations of trained networks do."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((rows, 4)) @ np.random.default_rng(1).standard_normal((4, C)) + 0.02 * draw.standard_normal((rows, C))


def nearest(columns: np.ndarray, format: Format) -> np.ndarray:
    codes, scale = quantize_weight(columns.astype(np.float32), axis=1, format=format, base=FP32)
    return decode(codes, scale, axis=1).astype(np.float64)


@FORMATS
def test_the_output_error_falls_far_below_that_of_nearest_codes(format: Format) -> None:
    x, new, w = correlated(512), correlated(512, seed=4), weight(C, OUT).astype(np.float64)
    found = rounded(w, x.T @ x / len(x), format=format, base=FP32)
    for inputs in (x, new):
        error, plain = (float(np.sum((inputs @ (v - w)) ** 2)) for v in (found, nearest(w, format)))
        assert error < plain / 8


@FORMATS
@pytest.mark.parametrize("base", [FP32, FP16], ids=str)
def test_insertion_finds_exactly_these_values(format: Format, base: Format) -> None:
    x, w = correlated(256), weight(C, OUT).astype(np.float64)
    found = rounded(w, x.T @ x / len(x), format=format, base=base).astype(np.float32)
    codes, scale = quantize_weight(found, axis=1, format=format, base=base)
    assert np.array_equal(decode(codes, scale, axis=1), found)


@FORMATS
def test_layers_of_one_size_are_rounded_together_as_each_by_itself(format: Format) -> None:
    inputs = [correlated(256, seed=i) for i in range(3)]
    w = np.stack([weight(C, OUT, seed=i).astype(np.float64) for i in range(3)])
    grams = np.stack([x.T @ x / len(x) for x in inputs])
    together = rounded(w, grams, format=format, base=FP32)
    for found, alone, gram in zip(together, w, grams, strict=True):
        np.testing.assert_allclose(found, rounded(alone, gram, format=format, base=FP32), rtol=1e-12)


@pytest.mark.parametrize("numbers", [1, 2 * C * C])
def test_what_does_not_fit_together_is_rounded_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    names = [f"w{i}" for i in range(5)]
    body = " ".join(f"h{i} = MatMul(x{i}, w{i}) x{i + 1} = Relu(h{i})" for i in range(5))
    model = graph(f"(float[B,{C}] x0) => (x5) {{ {body} }}", **{n: weight(C, C, seed=i) for i, n in enumerate(names)})
    data = dataset(tmp_path, model, x0=correlated(64).astype(np.float32))
    whole = round_weights(model, plan_of(model, INT8), data, reference=OnnxRuntime())
    monkeypatch.setattr(rounding, "_STACK", numbers)
    parts = round_weights(model, plan_of(model, INT8), data, reference=OnnxRuntime())
    assert sorted(whole) == names
    assert all(np.array_equal(whole[n], parts[n]) for n in names)


def test_without_correlation_every_weight_goes_to_its_nearest_code() -> None:
    w = weight(C, OUT).astype(np.float64)
    found = rounded(w, np.eye(C), format=FP8, base=FP32)
    assert np.allclose(found, nearest(w, FP8), rtol=1e-6)


def test_a_smaller_step_is_taken_where_it_errs_less() -> None:
    # One large weight of an input that is nearly zero is not worth a coarse step for all others.
    w = np.concatenate([[[1.3]], np.full((C - 1, 1), 0.013) * np.arange(1, C)[:, None]])
    energy = np.concatenate([[1e-6], np.ones(C - 1)])
    found = rounded(w, np.diag(energy), format=INT8, base=FP32)
    assert abs(found[0, 0]) < 1.2
    assert energy @ (found - w)[:, 0] ** 2 < energy @ (nearest(w, INT8) - w)[:, 0] ** 2


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    x, w = correlated(64), weight(C, OUT).astype(np.float64)
    x[:, 3] = 0
    assert np.isfinite(rounded(w, x.T @ x / len(x), format=INT8, base=FP32)).all()
    assert np.isfinite(rounded(w, np.zeros((C, C)), format=INT8, base=FP32)).all()


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("", (6, 5, 3, 3)),
        ("<pads=[1,0,1,2]>", (6, 5, 3, 3)),
        ("<strides=[2,1], pads=[1,1,1,1]>", (6, 5, 3, 3)),
        ("<dilations=[2,1]>", (6, 5, 3, 2)),
        ("<strides=[2,2]>", (6, 5, 1, 1)),
    ],
)
def test_windows_of_a_convolution_times_its_columns_are_its_output(attributes: str, shape: tuple[int, ...]) -> None:
    model = graph(f"(float[B,5,9,8] x) => (float[B,6,?,?] y) {{ y = Conv{attributes}(x, w) }}", w=weight(*shape))
    x = random(2, 5, 9, 8)
    layer = Layer(model.graph[0], "x", "w", INT8, 1.0)
    expected = np.moveaxis(compute(model, x=x)["y"], 1, -1).reshape(-1, 6)
    assert np.allclose(layer.rows(x) @ layer.columns(), expected, atol=1e-4)
    assert np.array_equal(layer.back(layer.columns()), model.graph.initializers["w"].const_value.numpy())


@pytest.mark.parametrize(("text", "shape"), [("MatMul(x, w)", (7, 4)), ("Gemm(x, w)", (7, 4)), ("Gemm<transB=1>(x, w)", (4, 7))])
def test_rows_of_a_product_times_its_columns_are_its_output(text: str, shape: tuple[int, int]) -> None:
    model = graph(f"(float[B,7] x) => (float[B,4] y) {{ y = {text} }}", w=weight(*shape))
    x = random(5, 7)
    layer = Layer(model.graph[0], "x", "w", INT8, 1.0)
    assert np.allclose(layer.rows(x) @ layer.columns(), compute(model, x=x)["y"], atol=1e-5)
    assert np.array_equal(layer.back(layer.columns()), model.graph.initializers["w"].const_value.numpy())


def two_layers() -> ir.Model:
    body = "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)"
    return graph(f"(float[B,{C}] x) => (float[B,16] y) {{ {body} }}", w=weight(C, 32), v=weight(32, 16, seed=5))


def plan_of(model: ir.Model, format: Format, *, only: int | None = None) -> PrecisionPlan:
    regions = partition(model)
    chosen = [format if only is None or i == only else FP32 for i in range(len(regions))]
    scales = {v: {format.name: 0.05} for r in regions for v in r.activations}
    return PrecisionPlan(FP32, tuple(Assignment(r, f, "") for r, f in zip(regions, chosen, strict=True)), scales)


def test_only_what_the_plan_quantizes_is_rounded_and_nothing_twice(tmp_path: Path) -> None:
    model = two_layers()
    data = dataset(tmp_path, model, x=correlated(64).astype(np.float32))
    known: dict[tuple[str, str], np.ndarray] = {}
    calls: list[tuple[int, int]] = []
    first = round_weights(
        model, plan_of(model, INT8, only=0), data, reference=OnnxRuntime(), known=known, progress=lambda *c: calls.append(c)
    )
    assert list(first) == ["w"]
    assert calls == [(1, 1)]
    both = round_weights(model, plan_of(model, INT8), data, reference=OnnxRuntime(), known=known, progress=lambda *c: calls.append(c))
    assert sorted(both) == ["v", "w"]
    assert both["w"] is first["w"]
    assert calls == [(1, 1), (1, 1)]
    assert sorted(known) == [("v", "int8"), ("w", "int8")]


def test_the_result_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = two_layers()
    data = dataset(tmp_path, model, x=correlated(24).astype(np.float32))
    one, other = (round_weights(model, plan_of(model, INT8), data, reference=OnnxRuntime(), batch=b) for b in (3, 8))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_shared_weight_and_a_grouped_convolution_are_left_alone(tmp_path: Path) -> None:
    shared = graph(f"(float[B,{C}] x) => (float[B,{C}] y) {{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }}", w=weight(C, C))
    data = dataset(tmp_path, shared, x=correlated(16).astype(np.float32))
    assert round_weights(shared, plan_of(shared, INT8), data, reference=OnnxRuntime()) == {}
    grouped = graph("(float[B,32,6,6] x) => (float[B,32,4,4] y) { y = Conv<group=32>(x, w) }", w=weight(32, 1, 3, 3))
    images = dataset(tmp_path, grouped, x=random(4, 32, 6, 6))
    assert round_weights(grouped, plan_of(grouped, INT8), images, reference=OnnxRuntime()) == {}


@pytest.mark.parametrize("body", ["h = MatMul(x, w) y = Add(h, b)", "h = MatMul(x, w) y = Add(b, h)", "y = Gemm(x, w, b)"])
def test_the_bias_takes_up_the_mean_error(tmp_path: Path, body: str) -> None:
    model = graph(f"(float[B,{C}] x) => (float[B,32] y) {{ {body} }}", w=weight(C, 32), b=weight(32, seed=7))
    # Clipped on one side, the inputs lose much of their mean.
    x = np.abs(correlated(SAMPLES)).astype(np.float32)
    data = dataset(tmp_path, model, x=x)
    found = round_weights(model, plan_of(model, INT8), data, reference=OnnxRuntime())
    assert set(found) == {"w", "b"}
    wanted = (x @ weight(C, 32) + weight(32, seed=7)).mean(0)
    got = (codes_of(x / np.float32(0.05), INT8) * 0.05 @ found["w"] + found["b"]).mean(0)
    assert np.abs(got - wanted).max() < 1e-4
    assert set(round_weights(model, plan_of(model, FP8), data, reference=OnnxRuntime())) == {"w"}


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, w) y = Add(h, b) z = Mul(h, h)",  # the product is read elsewhere
        "h = MatMul(x, w) g = Add(h, b) z = Add(g, b) y = Identity(g)",  # so is the bias
        "y = Gemm<beta=2.0>(x, w, b) z = Relu(y)",
    ],
)
def test_a_bias_that_is_not_the_layers_own_stays(tmp_path: Path, body: str) -> None:
    model = graph(f"(float[B,{C}] x) => (float[B,32] y, float[B,32] z) {{ {body} }}", w=weight(C, 32), b=weight(32, seed=7))
    data = dataset(tmp_path, model, x=correlated(64).astype(np.float32))
    assert set(round_weights(model, plan_of(model, INT8), data, reference=OnnxRuntime())) == {"w"}
