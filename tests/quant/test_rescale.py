from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graphs import compute, dataset, graph, random, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.budget import parse_budget
from deploycc.core.contract import CANONICAL
from deploycc.core.data import open_data
from deploycc.core.errors import UsageError
from deploycc.core.formats import FP32, INT8
from deploycc.core.passes import run
from deploycc.core.plan import PrecisionPlan
from deploycc.core.shapes import profiles_for
from deploycc.core.target import Target
from deploycc.pipeline import build
from deploycc.quant import decide as deciding
from deploycc.quant.calibrate import calibrate
from deploycc.quant.clipping import Mse
from deploycc.quant.decide import analyse, decide
from deploycc.quant.rescale import channels_of, find_rescales, find_sites, rescaled
from deploycc.request import BuildRequest
from passes.insert_qdq import InsertQdq
from passes.rescale_layernorm import RescaleLayernorm

if TYPE_CHECKING:
    from pathlib import Path

    from deploycc.core.data import Dataset
    from deploycc.quant.calibrate import Statistics

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
    return find_rescales(find_sites(model), seen_at(model, data, batch=batch), base=FP32)


def seen_at(model: ir.Model, data: Dataset, *ranges: str, batch: int = 4) -> Statistics:
    """Return what calibration sees of the sites of ``model`` and of ``ranges``."""
    return calibrate(model, data, ranges=ranges, channels=channels_of(find_sites(model), ranges), reference=REFERENCE, batch=batch)


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


def check_derived(model: ir.Model, data: Dataset, *ranges: str, tolerance: float = 0.1) -> None:
    """Compare what is derived of the rescaled graph with what calibration sees of it."""
    before = seen_at(model, data, *ranges)
    rescales = find_rescales(find_sites(model), before, base=FP32)
    assert rescales
    derived = rescaled(before, find_sites(model), rescales)
    plain, _ = run(model, [RescaleLayernorm(rescales)], contract=CANONICAL)
    seen = calibrate(plain, data, ranges=ranges, reference=REFERENCE, batch=4)
    assert set(derived.observers) == set(ranges)
    for name, found in derived.observers.items():
        true = seen.observers[name]
        np.testing.assert_allclose([found.low, found.high], [true.low, true.high], rtol=1e-4)
        np.testing.assert_allclose(Mse().limit(found), Mse().limit(true), rtol=tolerance)


@pytest.mark.parametrize(
    "between",
    [
        "m = Identity(n)",
        "m = Transpose<perm=[1, 0, 2]>(n)",
        "m = Slice(n, one, end, one)",
        "m = Gather<axis=1>(n, zero)",
        "m = ReduceMean<axes=[1]>(n)",
        "m = Pad(n, pads)",
    ],
)
def test_ranges_behind_a_rescaled_site_need_no_second_pass(between: str, tmp_path: Path) -> None:
    gamma = 1 + 0.1 * random(D)
    gamma[:2] *= 20
    w = weight(D, 48)
    w[:2] /= 20
    model = graph(
        f"(float[B,16,{D}] x) => (y, k) {{ n = LayerNormalization<axis=-1>(x, gamma) {between} y = MatMul(m, w) k = MatMul(n, w) }}",
        opset=17, gamma=gamma, w=w, one=np.array([1]), end=np.array([9]), zero=np.array(0), pads=np.array([0, 2, 0, 0, 2, 0]),
    )  # fmt: skip
    check_derived(model, dataset(tmp_path, model, x=random(16, 16, D, seed=21)), "x", "n", "m")


@pytest.mark.parametrize("batch", ["B", "4"])
def test_channels_of_maps_are_seen_everywhere_however_many_images_there_are(tmp_path: Path, batch: str) -> None:
    scale, offset = 1 + 0.1 * random(D), 0.1 * random(D, seed=3)
    scale[:2] *= 20
    w = weight(16, D, 1, 1)
    w[:, :2] /= 20
    text = f"(float[{batch},{D},6,6] x) => (float[{batch},16,6,6] y) {{ s = Mul(x, scale) n = Add(s, offset) y = Conv(n, w) }}"
    model = graph(text, scale=scale.reshape(-1, 1, 1), offset=offset.reshape(-1, 1, 1), w=w)
    x = random(512, D, 6, 6, seed=21)
    x[:, :, 0, 0] /= 100  # A corner unlike the rest.
    check_derived(model, dataset(tmp_path, model, x=x), "x", "n")


def test_rows_are_few_whatever_the_number_of_images_and_the_batch(tmp_path: Path) -> None:
    model = outliers(1)
    data = dataset(tmp_path, model, x=random(1300, 16, D, seed=21))
    one, other = (seen_at(model, data, batch=b).channels["n"] for b in (7, 64))
    assert one.rows.shape == (-(-1300 // 41) * 16, D)  # every 41st image, all of its positions
    assert one.rows.base is None
    for name in ("low", "high", "rows"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_rows_are_few_where_their_number_is_not_known(tmp_path: Path) -> None:
    text = "(float[B,S,32] x) => (float[B,S,48] y) { n = LayerNormalization<axis=-1>(x, gamma) y = MatMul(n, w) }"
    model = graph(text, gamma=np.ones(D, np.float32), w=weight(D, 48))
    data = dataset(tmp_path, model, x=random(64, 160, D, seed=21))
    assert seen_at(model, data, batch=8).channels["n"].rows.shape == (32 * 80, D)  # every second of 160 positions


def test_an_unknown_number_of_channels_is_that_of_the_constants(tmp_path: Path) -> None:
    model = graph(
        "(float[B,16,C] x) => (y) { n = LayerNormalization<axis=-1>(x, gamma) y = MatMul(n, w) }",
        gamma=np.ones(D, np.float32),
        w=weight(D, 48),
    )
    path = tmp_path / "x.npz"
    np.savez(path, x=random(8, 16, D))
    profiles, _ = profiles_for(model.graph.inputs, ["x=4x16x32"])
    seen = seen_at(model, open_data(str(path), model.graph.inputs, profiles, seed=0))
    assert seen.channels["n"].low.shape == (D,)


def test_what_the_pass_declines_keeps_its_ranges(tmp_path: Path) -> None:
    gamma, w = 1 + 0.1 * random(D), 5e4 * weight(D, 48)
    gamma[:2] *= 20  # Made smaller, their weights would exceed what FP16 holds.
    text = f"(float[B,16,{D}] x) => (float[B,16,48] y) {{ n = LayerNormalization<axis=-1>(x, gamma) y = MatMul(n, w) }}"
    onnx.save(ir.serde.serialize_model(graph(text, gamma=gamma, w=w)), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=random(32, 16, D, seed=21))
    report, directory = build(BuildRequest(tmp_path / "m.onnx", precision="int8", targets=("onnxruntime",), out=tmp_path / "out"))
    [record] = [r for r in report.passes if r["spec"].startswith("RescaleLayernorm")]
    assert [d["code"] for d in record["declines"]] == ["NUMERIC"]
    plan = PrecisionPlan.from_json((directory / "plan.json").read_text())
    assert plan.rescales == {}
    assert report.verification[0]["sqnr_db"] > 25


def test_one_pass_serves_calibration_and_rescaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gamma, w = 1 + 0.1 * random(D), weight(D, 48)
    gamma[:2] *= 20
    w[:2] /= 20
    text = f"(float[B,16,{D}] x) => (y) {{ n = LayerNormalization<axis=-1>(x, gamma) c = Gather<axis=1>(n, first) y = MatMul(c, w) }}"
    onnx.save(ir.serde.serialize_model(graph(text, gamma=gamma, w=w, first=np.array(0))), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=random(32, 16, D, seed=21))
    monkeypatch.setattr(deciding, "calibrate", lambda *arguments, **options: pytest.fail("observed again"))
    request = {"precision": "int8", "targets": ("onnxruntime",), "out": tmp_path / "out", "shapes": ("x=1:16:32",)}
    report, directory = build(BuildRequest(tmp_path / "m.onnx", **request))
    assert PrecisionPlan.from_json((directory / "plan.json").read_text()).rescales
    assert report.verification[0]["sqnr_db"] > 30


def test_a_region_left_in_floating_point_needs_no_range(tmp_path: Path) -> None:
    text = f"""(float[B,16,{D}] x) => (y, k) {{
        n = LayerNormalization<axis=-1>(x, gamma) y = MatMul(n, w) s = Mul(x, large) e = Exp(s) u = MatMul(e, v) k = Tanh(u) }}"""
    model = graph(text, gamma=np.ones(D, np.float32), w=weight(D, 48), v=np.abs(weight(D, 48)), large=np.float32(200))
    onnx.save(ir.serde.serialize_model(model), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=random(32, 16, D, seed=21))
    request = {"precision": "int8", "targets": ("onnxruntime",), "out": tmp_path / "out"}
    with pytest.raises(UsageError, match="'e' becomes inf in calibration"):
        build(BuildRequest(tmp_path / "m.onnx", **request))
    report, _ = build(BuildRequest(tmp_path / "m.onnx", **request, regions=(("n_u", "fp32"),)))
    assert {r["name"]: r["format"] for r in report.regions} == {"n_y": "int8", "n_u": "fp32"}


def test_the_plan_carries_them_through_its_file(tmp_path: Path) -> None:
    found = find(outliers(1), tmp_path)
    plan = PrecisionPlan(FP32, (), rescales=found)
    again = PrecisionPlan.from_json(plan.to_json())
    assert again.rescales == plan.rescales
    assert again.to_json() == plan.to_json()
