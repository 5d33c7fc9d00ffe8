"""Calibration: the true extremes of every value, whatever the batch size, and a word about NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from small_graphs import dataset, graph, random, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.errors import UsageError
from deploycc.quant.calibrate import SAMPLE_PER_ROW, Statistics, calibrate

if TYPE_CHECKING:
    from pathlib import Path

TEXT = """(float[N,3,12,12] x) => (float[N,10] y) {
    c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv<strides=[2,2]>(r, u) a = Tanh(d) f = Flatten(a) y = MatMul(f, v) }"""
VALUES = ["x", "r", "a", "f", "y"]


def network() -> ir.Model:
    return graph(TEXT, w=weight(8, 3, 3, 3), u=weight(6, 8, 2, 2), v=weight(6 * 36, 10))


def observe(
    folder: Path, model: ir.Model, *, batch: int = 4, ranges: list[str], extremes: list[str] | None = None, **arrays: np.ndarray
) -> Statistics:
    data = dataset(folder, model, **arrays)
    return calibrate(model, data, ranges=ranges, extremes=extremes or [], reference=OnnxRuntime(), batch=batch)


def test_extremes_are_those_of_the_values(tmp_path: Path) -> None:
    model, x = network(), random(7, 3, 12, 12)
    before = ir.serde.serialize_model(model).SerializeToString()
    seen = observe(tmp_path, model, ranges=VALUES, x=x)
    assert ir.serde.serialize_model(model).SerializeToString() == before
    assert seen.samples == 7
    watched = ir.serde.serialize_model(model)
    del watched.graph.output[:]
    watched.graph.output.extend(v for v in watched.graph.value_info if v.name in VALUES)
    names = [v.name for v in watched.graph.output]
    # ONNX Runtime's own sums, since another order of summation gives other last bits.
    true = OnnxRuntime().executor(ir.serde.deserialize_model(watched))({"x": x})
    exact = dict(zip(names, ReferenceEvaluator(watched).run(None, {"x": x}), strict=True))
    for name in names:
        observer = seen.observers[name]
        np.testing.assert_allclose(observer.limit, np.abs(true[name]).max(), rtol=1e-6)
        np.testing.assert_allclose(observer.high, exact[name].max(), rtol=1e-5)
        if name != "r":  # What Relu makes has no lower extreme worth a look.
            np.testing.assert_allclose(observer.low, exact[name].min(), rtol=1e-5)
    assert (seen.observers["x"].low, seen.observers["x"].high) == (x.min(), x.max())


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_batch_size_does_not_matter(tmp_path: Path, batch: int) -> None:
    """Sums of products differ in their last bits between batch sizes; of exact numbers they do not."""
    model = graph(TEXT, w=np.sign(weight(8, 3, 3, 3)), u=np.sign(weight(6, 8, 2, 2)), v=np.sign(weight(6 * 36, 10)))
    x = np.rint(random(7, 3, 12, 12) * 4)
    one, other = (
        observe(tmp_path, model, batch=b, ranges=["x", "r", "d"], x=x[order]).observers
        for b, order in ((7, slice(None)), (batch, slice(None, None, -1)))
    )
    for name, observer in one.items():
        assert observer.limit == other[name].limit
        assert observer.histogram.exponent == other[name].histogram.exponent
        np.testing.assert_array_equal(observer.histogram.counts, other[name].histogram.counts)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_may_be_another_axis(tmp_path: Path, batch: int) -> None:
    """PyTorch's MultiheadAttention computes in [tokens, batch, channels]; a sample still belongs to one image."""
    model = graph("(float[N,9,96] x) => (float[9,N,96] y) { t = Transpose<perm=[1,0,2]>(x) y = Relu(t) }")
    x = random(5, 9, 96)
    seen = observe(tmp_path, model, batch=batch, ranges=["y"], x=x).observers["y"]
    expected = observe(tmp_path, model, batch=5, ranges=["y"], x=x[::-1]).observers["y"]
    np.testing.assert_array_equal(seen.histogram.counts, expected.histogram.counts)


def test_a_sample_is_drawn_from_large_maps(tmp_path: Path) -> None:
    model = graph("(float[N,16,40,40] x) => (float[N,16,40,40] y) { y = Relu(x) }")
    x = random(2, 16, 40, 40)
    seen = observe(tmp_path, model, ranges=["x"], x=x).observers["x"]
    assert 0.9 * SAMPLE_PER_ROW <= seen.histogram.counts.sum() / 2 <= SAMPLE_PER_ROW + 1
    # Every channel and every column is drawn from: the step shares no factor with the sizes.
    step = 16 * 40 * 40 // SAMPLE_PER_ROW
    while np.gcd(step, 16 * 40 * 40) != 1:
        step += 1
    drawn = np.zeros(16 * 40 * 40, bool)
    drawn[::step] = True
    assert drawn.reshape(16, -1).any(1).all()
    assert drawn.reshape(-1, 40).any(0).all()


MAPS = """(float[N,16,{0},{0}] x) => (float[N,16,{0},{0}] y) {{
    c = Conv<pads=[1,1,1,1]>(x, w) r = {1}(c{2}) y = Conv<pads=[1,1,1,1]>(r, u) }}"""


@pytest.mark.parametrize(("act", "bounds"), [("Relu", ""), ("Clip", ", low, high"), ("Tanh", "")])
@pytest.mark.parametrize("size", [7, 13, 26, 56])
def test_maps_between_convolutions_are_pooled(tmp_path: Path, act: str, bounds: str, size: int) -> None:
    """Extremes are exact wherever they are, also at the edges that the sample leaves out, and the sample is of the map."""
    low, high = np.float32(0), np.float32(6)
    limits = {"low": low, "high": high} if bounds else {}
    model = graph(MAPS.format(size, act, bounds), w=np.eye(16, dtype=np.float32)[:, :, None, None] * np.ones((1, 1, 3, 3), np.float32),
                  u=weight(16, 16, 3, 3), **limits)  # fmt: skip
    x = 0.1 * random(5, 16, size, size)
    for i, (row, column) in enumerate([(0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1), (size // 2, size // 2)]):
        x[i, i, row, column] = 5.0 + i
    seen = observe(tmp_path, model, ranges=["c", "r"], x=x)
    true = OnnxRuntime().executor(watched(model, "c", "r"))({"x": x})
    for name in ("c", "r"):
        observer = seen.observers[name]
        assert observer.high == pytest.approx(true[name].max(), rel=1e-6)
        if name == "c" or act == "Tanh":
            assert observer.low == pytest.approx(true[name].min(), rel=1e-6)
        counted = observer.histogram.counts.sum() / 5
        assert min(0.7 * SAMPLE_PER_ROW, 16 * size * size / 2) <= counted <= 1.05 * min(SAMPLE_PER_ROW, 16 * size * size)
        grid = (np.arange(len(observer.histogram.counts)) + 0.5) * observer.histogram.width
        rms = np.sqrt(np.average(grid**2, weights=observer.histogram.counts))
        assert rms == pytest.approx(np.sqrt(np.mean(true[name] ** 2)), rel=0.2)


def watched(model: ir.Model, *names: str) -> ir.Model:
    clone = model.clone()
    clone.graph.outputs.extend(v for node in clone.graph for v in node.outputs if v.name in names)
    return clone


def test_nan_in_a_map_names_it(tmp_path: Path) -> None:
    text = "(float[N,16,28,28] x) => (float[N,16,28,28] y) { s = Sqrt(x) c = Conv<pads=[1,1,1,1]>(s, w) y = Relu(c) }"
    x = np.ones((2, 16, 28, 28), np.float32)
    x[1, :, 10:20, 10:20] = -1.0
    model = graph(text, w=weight(16, 16, 3, 3))
    with pytest.raises(UsageError, match="the value 'c' becomes nan in calibration"):
        observe(tmp_path, model, ranges=["c"], x=x)


@pytest.mark.parametrize("version", [17, 18])
def test_every_opset_is_observed(tmp_path: Path, version: int) -> None:
    model = graph("(float[N,4,9] x) => (float[N,4,9] y) { y = Tanh(x) }")
    model.graph.opset_imports[""] = version
    x = random(3, 4, 9)
    seen = observe(tmp_path, model, ranges=["x"], x=x).observers["x"]
    assert (seen.low, seen.high) == (x.min(), x.max())


def test_a_value_without_elements_has_no_range(tmp_path: Path) -> None:
    """How many rows NonZero finds depends on the data: here none in the second batch."""
    model = graph(
        "(float[N,6] x) => (float[M,1] y) { z = NonZero(x) t = Transpose(z) f = Cast<to=1>(t) y = MatMul(f, w) }",
        w=np.ones((2, 1), np.float32),
    )
    x = np.zeros((4, 6), np.float32)
    x[1, 5] = 1.0
    seen = observe(tmp_path, model, batch=2, ranges=["f"], x=x).observers["f"]
    assert seen.high == 5.0


@pytest.mark.parametrize("position", [0, 1, 17, 287])
def test_nan_names_the_value(tmp_path: Path, position: int) -> None:
    """ONNX Runtime's ReduceMin and ReduceMax pass over NaN; here the value is NaN for one number of one sample."""
    model = graph("(float[N,288] x) => (float[N,288] y) { s = Sqrt(x) y = Relu(s) }")
    x = np.ones((3, 288), np.float32)
    x[1, position] = -1.0
    with pytest.raises(
        UsageError, match=r"^the value 's' becomes nan in calibration\. Where: the FP32 model itself, on the calibration data\. Fix: "
    ):
        observe(tmp_path, model, ranges=["x", "s"], x=x)


def test_infinity_names_the_value(tmp_path: Path) -> None:
    model = graph("(float[N,8] x) => (float[N,8] y) { e = Exp(x) y = Relu(e) }")
    with pytest.raises(UsageError, match="the value 'e' becomes inf in calibration"):
        observe(tmp_path, model, ranges=["e"], x=np.full((1, 8), 100.0, np.float32))


def test_a_mask_of_infinities_has_finite_extremes(tmp_path: Path) -> None:
    """Values that are looked at for FP16 overflow alone may be masks."""
    model = graph("(float[N,8] x) => (float[N,8] y) { m = Where(c, x, low) y = Softmax(m) }", c=np.arange(8) < 7, low=np.float32(-np.inf))
    x = random(3, 8)
    seen = observe(tmp_path, model, ranges=[], extremes=["m"], x=x).observers["m"]
    assert seen.limit == seen.high == x[:, :7].max()
    assert seen.histogram.counts.sum() == 0


def test_models_in_fp16_are_observed(tmp_path: Path) -> None:
    model = graph("(float16[N,8] x) => (float16[N,8] y) { y = Relu(x) }")
    x = random(4, 8).astype(np.float16)
    seen = observe(tmp_path, model, ranges=["y"], x=x).observers["y"]
    assert seen.high == x.max()


def test_only_numbers_have_ranges(tmp_path: Path) -> None:
    model = graph("(float[N,8] x) => (int64[N,1] y) { y = ArgMax<axis=1>(x) }")
    with pytest.raises(TypeError, match="'y' is INT64"):
        observe(tmp_path, model, ranges=["y"], x=random(1, 8))
