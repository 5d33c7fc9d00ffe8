"""The walk that calibrates paper mode: on inputs quantized upstream, and in agreement with what the passes then build."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import compute, dataset, graph, random, transformer, weight

from deploycc.core.contract import CANONICAL, LOWERED
from deploycc.core.formats import FP32, SIMULATED
from deploycc.core.passes import run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.simulation import Logarithmic, Uniform, fit_uniform
from deploycc.quant.paper_calibrate import Simulation, calibrate_simulation
from deploycc.quant.paper_reparameterize import parse_reparameterization
from deploycc.quant.regions import partition
from passes.rescale_layernorm import RescaleLayernorm
from passes.simulate_quantizers import SimulateQuantizers

if TYPE_CHECKING:
    from pathlib import Path

OUTLIERS = np.where(np.arange(64) % 16 == 5, 15.0, 1.0).astype(np.float32)
POST_NORM = """(float[N,9,64] x) => (float[N,9,64] y) { n = LayerNormalization(x, g, b) m = MatMul(n, w) y = Add(n, m) }"""


def block() -> ir.Model:
    """Return an attention block whose normalization has four channels fifteen times larger, with weights that make up for it."""
    model = transformer()
    graph_values = model.graph.initializers
    for name in ("wq", "wk", "wv"):
        _set(graph_values[name], weight(64, 64, seed=len(name)) / OUTLIERS[:, None])
    _set(graph_values["g"], OUTLIERS)
    _set(graph_values["b"], (np.linspace(-1, 1, 64) * OUTLIERS).astype(np.float32))
    return model


def _set(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


def calibrated(folder: Path, model: ir.Model, way: str, *, format: str = "w4a4", batch: int = 32) -> tuple[Simulation, PrecisionPlan]:
    assignments = tuple(Assignment(r, SIMULATED[format], "test") for r in partition(model))
    shape = [int(d) for d in list(model.graph.inputs[0].shape or ())[1:]]
    found = calibrate_simulation(
        model, assignments, dataset(folder, model, x=random(40, *shape)), reparameterization=parse_reparameterization(way), batch=batch
    )
    return found, PrecisionPlan(FP32, assignments, rescales=found.rescales, quantizers=found.quantizers)


def built(model: ir.Model, plan: PrecisionPlan) -> ir.Model:
    rescaled, (record,) = run(model, [RescaleLayernorm(plan.rescales)], contract=CANONICAL)
    assert {r.anchor for r in record.rewrites} == set(plan.rescales)
    return run(rescaled, [SimulateQuantizers(plan)], contract=LOWERED)[0]


def noise(model: ir.Model, other: ir.Model) -> float:
    x = random(24, 16, 64, seed=99)
    found, wanted = compute(other, x=x)["y"], compute(model, x=x)["y"]
    return float(np.sum((found - wanted) ** 2) / np.sum(wanted**2))


def test_what_is_fitted_to_what(tmp_path: Path) -> None:
    found, _ = calibrated(tmp_path, block(), "layer")
    kinds = {name: type(by["w4a4"]) for name, by in found.quantizers.items()}
    assert kinds == {"ln": Uniform, "q": Uniform, "k": Uniform, "p": Logarithmic, "v": Uniform, "o2": Uniform}
    assert found.rescales == {}
    assert found.samples == 32


@pytest.mark.parametrize(("way", "scales", "rescaled"), [("layer", 1, 0), ("channel", 64, 0), ("repq", 1, 1), ("crl", 64, 1)])
def test_the_four_ways(tmp_path: Path, way: str, scales: int, rescaled: int) -> None:
    found, _ = calibrated(tmp_path, block(), way)
    quantizer = found.quantizers["ln"]["w4a4"]
    assert isinstance(quantizer, Uniform)
    assert (len(quantizer.scale), len(found.rescales)) == (scales, rescaled)


def test_the_ranges_are_those_of_the_data(tmp_path: Path) -> None:
    """The first quantized value has nothing quantized before it: 32 samples through the normalization, computed here."""
    found, _ = calibrated(tmp_path, block(), "channel")
    x = random(40, 16, 64)[:32].astype(np.float64)
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    n = (n * OUTLIERS + np.linspace(-1, 1, 64) * OUTLIERS).astype(np.float32)
    wanted, quantizer = fit_uniform(n, 4, axis=2), found.quantizers["ln"]["w4a4"]
    assert isinstance(quantizer, Uniform)
    assert quantizer.scale == pytest.approx(wanted.scale, rel=1e-4)


@pytest.mark.parametrize("way", ["layer", "channel", "repq", "crl"])
def test_calibration_sees_what_was_quantized_upstream(tmp_path: Path, way: str) -> None:
    """The last product reads what attention gives: its range fits the built graph's own value, not the exact model's."""
    model = block()
    found, plan = calibrated(tmp_path, model, way, format="w3a3")
    quantizer = found.quantizers["o2"]["w3a3"]
    assert isinstance(quantizer, Uniform)
    ranges = []
    for each in (built(model, plan), model):
        watched = each.clone()
        watched.graph.outputs.append(next(v for n in watched.graph for v in n.outputs if v.name == "o2"))
        ranges.append(fit_uniform(compute(watched, x=random(40, 16, 64)[:32])["o2"].reshape(-1), 3))
    in_built, in_exact = (abs(r.scale[0] / quantizer.scale[0] - 1) for r in ranges)
    assert in_built < 0.01
    assert in_built < in_exact


def test_the_ladder_on_outliers(tmp_path: Path) -> None:
    """Where four channels are fifteen times larger, one scale for all loses to every other way."""
    model, found = block(), {}
    for way in ("layer", "channel", "repq", "crl"):
        found[way] = noise(model, built(model, calibrated(tmp_path, model, way)[1]))
    assert min(found, key=found.__getitem__) != "layer"
    assert max(found["repq"], found["crl"], found["channel"]) < 0.7 * found["layer"]


@pytest.mark.parametrize("way", ["repq", "crl"])
def test_the_rewrite_alone_is_exact(tmp_path: Path, way: str) -> None:
    model = block()
    found, _ = calibrated(tmp_path, model, way)
    rescaled, _ = run(model, [RescaleLayernorm(found.rescales)], contract=CANONICAL)
    x = random(24, 16, 64, seed=99)
    before, after = compute(model, x=x)["y"], compute(rescaled, x=x)["y"]
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    assert not np.array_equal(before, after)


def test_more_bits_less_noise(tmp_path: Path) -> None:
    model = block()
    found = [noise(model, built(model, calibrated(tmp_path, model, "crl", format=f)[1])) for f in ("w3a3", "w4a4", "w6a6")]
    assert found == sorted(found, reverse=True)
    assert found[2] < found[0] / 20


def test_batches_do_not_matter(tmp_path: Path) -> None:
    one, other = (calibrated(tmp_path, block(), "crl", batch=n)[0] for n in (32, 5))
    for name, by in one.quantizers.items():
        for format, quantizer in by.items():
            again = other.quantizers[name][format]
            assert np.array(again.scale) == pytest.approx(np.array(quantizer.scale), rel=1e-3)


class TestRefusals:
    @pytest.mark.parametrize("way", ["channel", "repq", "crl"])
    def test_a_skip_from_behind_the_normalization(self, tmp_path: Path, way: str) -> None:
        """Post-norm: the sum would see rescaled values, so one quantizer for all channels stays."""
        vectors = {"g": np.ones(64, np.float32), "b": np.zeros(64, np.float32)}
        found, _ = calibrated(tmp_path, graph(POST_NORM, w=weight(64, 64), **vectors), way)
        quantizer = found.quantizers["n"]["w4a4"]
        assert isinstance(quantizer, Uniform)
        assert (len(quantizer.scale), found.rescales) == (1, {})

    @pytest.mark.parametrize("way", ["channel", "repq", "crl"])
    def test_readers_of_eight_bits(self, tmp_path: Path, way: str) -> None:
        """As RepQ-ViT leaves the last normalization, whose reader is the head, as it is."""
        found, _ = calibrated(tmp_path, block(), way, format="w8a8")
        quantizer = found.quantizers["ln"]["w8a8"]
        assert isinstance(quantizer, Uniform)
        assert (len(quantizer.scale), found.rescales) == (1, {})
