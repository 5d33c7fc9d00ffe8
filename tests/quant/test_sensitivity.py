"""The score of a region is the noise of the graph in which ``insert-qdq`` quantizes that region and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import compute, dataset, graph, random, residual, transformer, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.contract import QUANTIZED
from deploycc.core.formats import FP8, FP32, INT8, Format
from deploycc.core.passes import run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.quant.calibrate import calibrate
from deploycc.quant.decide import scales_of
from deploycc.quant.regions import partition
from deploycc.quant.sensitivity import Scores, measure_noise, measure_scales, measure_whole
from passes.insert_qdq import InsertQdq

if TYPE_CHECKING:
    from pathlib import Path

    from deploycc.core.plan import Region

Scales = dict[str, dict[str, float]]


def scored(folder: Path, model: ir.Model, x: np.ndarray, formats: tuple[Format, ...]) -> tuple[tuple[Region, ...], Scales, Scores]:
    data, regions = dataset(folder, model, x=x), partition(model)
    values = [v for r in regions for v in (*r.activations, *r.residuals)]
    seen = calibrate(model, data, ranges=values, reference=OnnxRuntime())
    scales = scales_of(seen, regions, formats, FP32, softmax=frozenset())
    return regions, scales, measure_noise(model, regions, formats, scales, data, reference=OnnxRuntime(), batch=3)


def noise_alone(model: ir.Model, region: Region, format: Format, scales: Scales, x: np.ndarray) -> float:
    plan = PrecisionPlan(FP32, (Assignment(region, format, "alone"),), scales)
    quantized, records = run(model, [InsertQdq(plan)], contract=QUANTIZED)
    assert records[0].declines == ()
    plain, noisy = compute(model, x=x), compute(quantized, x=x)
    error = sum(np.sum((noisy[k].astype(np.float64) - v) ** 2) for k, v in plain.items())
    return float(error / sum(np.sum(v.astype(np.float64) ** 2) for v in plain.values()))


@pytest.mark.parametrize(("make", "shape"), [(residual, (5, 16, 6, 6)), (transformer, (5, 16, 64))])
@pytest.mark.parametrize("format", [INT8, FP8])
def test_the_score_is_the_noise_of_the_region_alone(tmp_path: Path, make: object, shape: tuple[int, ...], format: Format) -> None:
    model, x = make(), random(*shape)  # type: ignore[operator]
    regions, scales, scores = scored(tmp_path, model, x, (format,))
    expected = {r.name: noise_alone(model, r, format, scales, x) for r in regions if format.name in r.formats}
    assert len(expected) >= 3 - (format == FP8 and make is residual)
    for name, noise in expected.items():
        # Rounding can fall to the other side of a tie where sums were taken in another order.
        assert scores.noise[name][format.name] == pytest.approx(noise, rel=2e-3)
    assert {name for name, by in scores.noise.items() if by} == set(expected)


def test_the_skip_counts(tmp_path: Path) -> None:
    """P4 quantizes the other operand of the Add, so its rounding is part of the region's score."""
    model, x = residual(), random(5, 16, 6, 6)
    regions, scales, scores = scored(tmp_path, model, x, (INT8,))
    region = next(r for r in regions if r.residuals)
    coarse = {**scales, region.residuals[0]: {"int8": scales[region.residuals[0]]["int8"] * 8}}
    worse = measure_noise(model, regions, (INT8,), coarse, dataset(tmp_path, model, x=x), reference=OnnxRuntime())
    assert worse.noise[region.name]["int8"] > 3 * scores.noise[region.name]["int8"]


@pytest.mark.parametrize(("make", "shape"), [(residual, (5, 16, 6, 6)), (transformer, (5, 16, 64))])
def test_scales_are_compared_in_one_graph(tmp_path: Path, make: object, shape: tuple[int, ...]) -> None:
    model, x = make(), random(*shape)  # type: ignore[operator]
    regions, scales, _ = scored(tmp_path, model, x, (INT8,))
    coarse = {name: {"int8": 8 * by["int8"]} for name, by in scales.items() if by}
    data = dataset(tmp_path, model, x=x)
    eligible = [r for r in regions if "int8" in r.formats]
    found = measure_scales(model, eligible, INT8, (scales, coarse), data, reference=OnnxRuntime(), batch=3)
    whole = [measure_whole(model, eligible, [INT8], each, data, reference=OnnxRuntime(), batch=3)["int8"] for each in (scales, coarse)]
    assert found == pytest.approx(whole, rel=1e-6)
    assert found[1] > 3 * found[0]


def test_an_exact_region_scores_zero(tmp_path: Path) -> None:
    """Small integers with a largest magnitude of 127 have scale 1, and lose nothing."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (32, 32)).astype(np.float32)
    weights[0] = 127.0
    x = rng.integers(-127, 128, (8, 32)).astype(np.float32)
    x[0, 0] = 127.0
    model = graph("(float[N,32] x) => (float[N,32] y) { m = MatMul(x, w) y = MatMul(m, u) }", w=weights, u=weight(32, 32))
    data, regions = dataset(tmp_path, model, x=x), partition(model)
    scales = {"x": {"int8": 1.0}, "m": {"int8": 100.0}}
    noise = measure_noise(model, regions, (INT8,), scales, data, reference=OnnxRuntime()).noise
    assert noise["n_m"]["int8"] == 0.0
    assert noise["n_y"]["int8"] > 0.0


def test_an_anchor_that_reads_an_anchor_and_makes_an_output(tmp_path: Path) -> None:
    model = graph(
        "(float[N,32] x) => (float[N,32] m, float[N,32] y) { m = MatMul(x, w) y = MatMul(m, u) }", w=weight(32, 32), u=weight(32, 32)
    )
    x = random(6, 32)
    regions, scales, scores = scored(tmp_path, model, x, (INT8,))
    for region in regions:
        assert scores.noise[region.name]["int8"] == pytest.approx(noise_alone(model, region, INT8, scales, x), rel=2e-3)


def test_names_of_the_model_do_not_clash(tmp_path: Path) -> None:
    """Constants of the model that are called like those of the scoring graph keep their values."""
    text = "(float[N,32] x) => (float[N,32] y) { m = MatMul(x, w) k = Mul(m, n_m_0_int8_scale) y = Relu(k) }"
    model = graph(text, w=weight(32, 32), n_m_0_int8_scale=np.float32(3.0))
    x = random(4, 32)
    (region,), scales, scores = scored(tmp_path, model, x, (INT8,))
    assert scores.noise[region.name]["int8"] == pytest.approx(noise_alone(model, region, INT8, scales, x), rel=2e-3)


def test_results_whose_number_depends_on_the_data(tmp_path: Path) -> None:
    model = graph(
        "(float[N,32] x) => (int64[2,K] y) { m = MatMul(x, w) g = Greater(m, t) y = NonZero(g) }", w=weight(32, 32), t=np.float32(0.0)
    )
    data = dataset(tmp_path, model, x=random(4, 32))
    scores = measure_noise(model, partition(model), (INT8,), {"x": {"int8": 1.0}}, data, reference=OnnxRuntime())
    assert 0.0 < scores.noise["n_m"]["int8"] < 3.0


def test_the_model_is_not_changed_and_progress_reaches_the_end(tmp_path: Path) -> None:
    model, x, steps = residual(), random(2, 16, 6, 6), []
    before = ir.serde.serialize_model(model).SerializeToString()
    regions, scales, scores = scored(tmp_path, model, x, (INT8, FP8))
    data = dataset(tmp_path, model, x=x)
    measure_noise(
        model, regions, (INT8, FP8), scales, data, reference=OnnxRuntime(), progress=lambda done, total: steps.append((done, total))
    )
    assert ir.serde.serialize_model(model).SerializeToString() == before
    assert steps[-1] == (len(steps), len(steps))
    assert (scores.method, scores.samples) == ("output-noise", 2)
