from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from small_graphs import compute, dataset, graph, random, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.budget import parse_budget
from deploycc.core.contract import CANONICAL
from deploycc.core.formats import FP32, INT8
from deploycc.core.passes import run
from deploycc.core.plan import PrecisionPlan
from deploycc.core.target import Target
from deploycc.quant.decide import analyse, decide
from deploycc.quant.rescale import find_rescales
from passes.insert_qdq import InsertQdq
from passes.rescale_layernorm import RescaleLayernorm

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

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
    data = dataset(folder, model, x=random(16, 16, D, seed=21))
    return find_rescales(model, data, base=FP32, reference=REFERENCE, batch=batch)


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
    assert find_rescales(model, data, base=FP32, reference=REFERENCE) == {}


def test_a_model_without_normalizations_costs_nothing(tmp_path: Path) -> None:
    model = graph(f"(float[B,{D}] x) => (float[B,4] y) {{ y = MatMul(x, w) }}", w=weight(D, 4))
    assert find_rescales(model, dataset(tmp_path, model, x=random(4, D)), base=FP32, reference=REFERENCE) == {}


def test_the_plan_carries_them_through_its_file(tmp_path: Path) -> None:
    found = find(outliers(1), tmp_path)
    plan = PrecisionPlan(FP32, (), rescales=found)
    again = PrecisionPlan.from_json(plan.to_json())
    assert again.rescales == plan.rescales
    assert again.to_json() == plan.to_json()
