from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from small_graphs import compute, dataset, graph, random, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.budget import parse_budget
from deploycc.core.contract import CANONICAL
from deploycc.core.formats import FP32, INT8
from deploycc.core.passes import run
from deploycc.core.plan import PrecisionPlan
from deploycc.core.target import Target
from deploycc.quant.calibrate import ROWS, calibrate
from deploycc.quant.clipping import Mse
from deploycc.quant.decide import analyse, decide
from deploycc.quant.rescale import find_rescales, find_sites, rescaled
from passes.insert_qdq import InsertQdq
from passes.rescale_layernorm import RescaleLayernorm

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from deploycc.core.data import Dataset

D = 32
REFERENCE = OnnxRuntime()


def outliers(count: int) -> ir.Model:
    """Return LayerNormalization and a linear layer, where a few channels are twenty times larger than the rest."""
    gamma, beta = 1 + 0.1 * random(D), 0.3 * random(D, seed=2)
    gamma[:count] *= 20
    w = weight(D, 48)
    w[:count] /= 20
    body = "n = LayerNormalization<axis=-1>(x, gamma, beta) z = MatMul(n, w) y = Add(z, b)"
    return graph(f"(float[B,16,{D}] x) => (float[B,16,48] y) {{ {body} }}", gamma=gamma, beta=beta, w=w, b=random(48))


def find(model: ir.Model, folder: Path, *, batch: int = 4) -> dict:  # type: ignore[type-arg]
    """Search on sixteen random samples."""
    return search(model, dataset(folder, model, x=random(16, 16, D, seed=21)), batch=batch)


def search(model: ir.Model, data: Dataset, *, batch: int = 4) -> dict:  # type: ignore[type-arg]
    """Return what is found on ``data``."""
    sites = find_sites(model)
    return find_rescales(sites, calibrate(model, data, ranges=[], sites=sites, reference=REFERENCE, batch=batch), base=FP32)


def sqnr(model: ir.Model, folder: Path, rescales: dict) -> float:  # type: ignore[type-arg]
    """Return the SQNR in dB of the INT8 model on new samples."""
    data = dataset(folder, model, x=random(16, 16, D, seed=21))
    plain, _ = run(model, [RescaleLayernorm(rescales)], contract=CANONICAL)
    from contextlib import nullcontext

    analysis = analyse(
        plain, digest="", base=FP32, formats=[INT8], choose=False, target=Target("onnxruntime"), data=data, reference=REFERENCE, batch=4,
        stage=lambda name: nullcontext(), progress=lambda done, total: None, rescales=rescales,
    )  # fmt: skip
    plan = decide(analysis, precision="int8", budget=parse_budget(""), noise_bound=None)
    assert plan.rescales == rescales
    quantized = plain.clone()
    InsertQdq(plan)(quantized)
    x = random(16, 16, D, seed=99)
    expected, found = compute(model, x=x)["y"], compute(quantized, x=x)["y"]
    return float(10 * np.log10(np.sum(expected**2) / np.sum((found - expected) ** 2)))


def test_outlier_channels_are_made_smaller_and_int8_gains_what_was_promised(tmp_path: Path) -> None:
    model = outliers(3)
    found = find(model, tmp_path)
    [rescale] = found.values()
    assert max(rescale.scale[:3]) < 0.5
    assert min(rescale.scale[3:]) > 2 * max(rescale.scale[:3])
    before, after = sqnr(model, tmp_path, {}), sqnr(model, tmp_path, found)
    assert rescale.gain_db > 6
    assert after - before > 0.7 * rescale.gain_db


def test_the_result_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = outliers(2)
    one, other = find(model, tmp_path, batch=2), find(model, tmp_path, batch=8)
    assert one.keys() == other.keys()
    assert [r.scale for r in one.values()] == [r.scale for r in other.values()]
    assert [r.shift for r in one.values()] == [r.shift for r in other.values()]


def test_nothing_is_found_where_nothing_gains(tmp_path: Path) -> None:
    # All channels alike and centred: there is nothing to move.
    model = graph(
        f"(float[B,16,{D}] x) => (float[B,16,48] y) {{ n = LayerNormalization<axis=-1>(x, gamma) y = MatMul(n, w) }}",
        gamma=np.ones(D, np.float32),
        w=weight(D, 48),
    )
    data = dataset(tmp_path, model, x=np.sign(random(16, 16, D, seed=21)) + 0.01 * random(16, 16, D))
    assert search(model, data) == {}


def test_a_model_without_normalizations_has_no_site() -> None:
    model = graph(f"(float[B,{D}] x) => (float[B,4] y) {{ y = MatMul(x, w) }}", w=weight(D, 4))
    assert find_sites(model) == []


@pytest.mark.parametrize(
    ("between", "known"),
    [
        ("m = Identity(n)", {"n", "m"}),
        ("m = Transpose<perm=[1, 0, 2]>(n)", {"n", "m"}),
        ("m = Slice(n, one, end, one)", {"n"}),  # Its extremes are those of what it takes.
        ("m = ReduceMean<axes=[1]>(n)", {"n"}),
    ],
)
def test_ranges_behind_a_rescaled_site_need_no_second_pass(between: str, known: set[str], tmp_path: Path) -> None:
    gamma = 1 + 0.1 * random(D)
    gamma[:2] *= 20
    w = weight(D, 48)
    w[:2] /= 20
    model = graph(
        f"(float[B,16,{D}] x) => (y, k) {{ n = LayerNormalization<axis=-1>(x, gamma) {between} y = MatMul(m, w) k = MatMul(n, w) }}",
        opset=17, gamma=gamma, w=w, one=np.array([1]), end=np.array([9]),
    )  # fmt: skip
    data, sites = dataset(tmp_path, model, x=random(16, 16, D, seed=21)), find_sites(model)
    before = calibrate(model, data, ranges=["x", "n", "m"], sites=sites, reference=REFERENCE, batch=4)
    rescales = find_rescales(sites, before, base=FP32)
    assert rescales
    derived = rescaled(before, sites, rescales)
    plain, _ = run(model, [RescaleLayernorm(rescales)], contract=CANONICAL)
    seen = calibrate(plain, data, ranges=["x", "n", "m"], reference=REFERENCE, batch=4)
    assert set(derived.observers) == {"x", *known}
    for name, found in derived.observers.items():
        true = seen.observers[name]
        np.testing.assert_allclose([found.low, found.high], [true.low, true.high], rtol=1e-5)
        np.testing.assert_allclose(Mse().limit(found), Mse().limit(true), rtol=0.1)


def test_a_site_is_observed_in_bounded_memory_whatever_the_batch(tmp_path: Path) -> None:
    model = outliers(1)
    data, sites = dataset(tmp_path, model, x=random(1300, 16, D, seed=21)), find_sites(model)
    one, other = (calibrate(model, data, ranges=[], sites=sites, reference=REFERENCE, batch=b).channels["n"] for b in (7, 64))
    assert one.rows.shape == (2 * ROWS, D)
    for name in ("low", "high", "rows"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_plan_carries_them_through_its_file(tmp_path: Path) -> None:
    found = find(outliers(1), tmp_path)
    plan = PrecisionPlan(FP32, (), rescales=found)
    again = PrecisionPlan.from_json(plan.to_json())
    assert again.rescales == plan.rescales
    assert again.to_json() == plan.to_json()
