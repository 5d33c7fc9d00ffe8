"""From a graph to a plan: what is measured for which precision, which scales are kept, and what the files say."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
from small_graphs import dataset, graph, random, residual, transformer, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.budget import Budget
from deploycc.core.formats import FP8, FP16, INT8, Format
from deploycc.core.target import parse_target
from deploycc.quant import decide as deciding
from deploycc.quant.clipping import MinMax, Percentile
from deploycc.quant.decide import Analysis, analyse, decide, first_noise_bound

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir


def analysed(folder: Path, model: ir.Model, formats: tuple[Format, ...], *, choose: bool = False, sensitivity: str = "auto") -> Analysis:
    x = random(6, *(int(d) for d in list(model.graph.inputs[0].shape)[1:]))
    return analyse(
        model,
        digest="d1",
        base=FP16,
        formats=formats,
        choose=choose,
        target=parse_target("tensorrt-rtx:sm_89"),
        data=dataset(folder, model, x=x),
        reference=OnnxRuntime(),
        batch=16,
        stage=lambda name: nullcontext(),
        progress=lambda done, total: None,
        sensitivity=sensitivity,
    )


def test_floating_point_needs_no_data(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, residual(), ())
    assert (analysis.statistics, analysis.scores, analysis.scales) == (None, None, {})
    plan = decide(analysis, precision="fp16", budget=Budget(), noise_bound=None)
    assert plan.count() == {"fp16": 4}
    assert (plan.model, plan.scales) == ("d1", {})


def test_a_uniform_plan_needs_no_scores(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, residual(), (INT8,))
    assert analysis.scores is None
    plan = decide(analysis, precision="int8", budget=Budget(), noise_bound=None)
    assert plan.count() == {"int8": 4}
    assert set(plan.scales) == {"x", "r1", "s", "f"}
    assert all(set(by) == {"int8"} for by in plan.scales.values())
    assert json.loads(analysis.scores_json())["method"] == "none"


def test_a_mixed_plan_keeps_the_scales_it_uses(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, residual(), (INT8, FP8), choose=True)
    assert set(analysis.scales["r1"]) == {"int8", "fp8"}
    plan = decide(analysis, precision="mixed", budget=Budget(bits=9), noise_bound=None)
    used = {(v, a.format.name) for a in plan.assignments if a.format.is_quantized for v in (*a.region.activations, *a.region.residuals)}
    assert {(v, f) for v, by in plan.scales.items() for f in by} == used
    summary = analysis.summary(plan)
    assert summary["average_bits"] <= 9
    assert summary["weight_parameters"] == sum(r.parameters for r in analysis.regions)
    assert summary["estimated_latency_ratio"] == pytest.approx(
        summary["estimated_latency_us"] / sum(analysis.costs[r.name]["fp16"] for r in analysis.regions), abs=1e-3
    )
    assert summary["estimated_on"] == "L4, batch 16 (roofline estimate, not a measurement)"
    scores = json.loads(analysis.scores_json())
    assert (scores["schema"], scores["samples"]) == ("deploycc.scores/2", 6)
    assert set(scores["regions"]) == {r.name for r in analysis.regions}


def test_the_softmax_has_a_fixed_scale_in_fp8(tmp_path: Path) -> None:
    """F4."""
    analysis = analysed(tmp_path, transformer(), (INT8, FP8))
    assert analysis.scales["p"]["fp8"] == pytest.approx(1 / 448, rel=2.0**-11)
    assert analysis.scales["p"]["int8"] < 1 / 127


def test_same_analysis_same_bytes(tmp_path: Path) -> None:
    texts = []
    for _ in range(2):
        analysis = analysed(tmp_path, residual(), (INT8, FP8), choose=True)
        plan = decide(analysis, precision="mixed", budget=Budget(), noise_bound=None)
        texts.append((analysis.scores_json(), plan.to_json()))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("budget", "bound"),
    [(Budget(), None), (Budget(bits=8), None), (Budget(sqnr=30, accuracy_drop=1), 1e-3), (Budget(accuracy_drop=1), 10**-1.5)],
)
def test_where_the_guard_starts(budget: Budget, bound: float | None) -> None:
    assert first_noise_bound(budget) == (bound if bound is None else pytest.approx(bound))


class TestAuto:
    """The default measures every region while that is affordable, and estimates beyond."""

    def scored_by(self, analysis: Analysis) -> str:
        return decide(analysis, precision="mixed", budget=Budget(bits=12), noise_bound=None).scored_by

    def test_a_small_model_is_measured(self, tmp_path: Path) -> None:
        analysis = analysed(tmp_path, residual(), (INT8,), choose=True)
        assert (self.scored_by(analysis), analysis.notes) == ("sqnr", ())

    def test_a_large_one_is_estimated_and_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deciding, "AFFORDABLE", 1e5)
        analysis = analysed(tmp_path, residual(), (INT8,), choose=True)
        assert (self.scored_by(analysis), json.loads(analysis.scores_json())["method"]) == ("hybrid", "hybrid")
        assert "scored by --sensitivity hybrid; sqnr measures them nonetheless" in analysis.notes[0]

    def test_who_asks_for_measurement_gets_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deciding, "AFFORDABLE", 1e5)
        assert self.scored_by(analysed(tmp_path, residual(), (INT8,), choose=True, sensitivity="sqnr")) == "sqnr"

    def test_a_model_without_gradients_is_measured_however_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deciding, "AFFORDABLE", 1.0)
        text = "(float[N,16] x) => (float[N,16] y) { a = MatMul(x, w) h = Hardmax(a) y = MatMul(h, v) }"
        model = graph(text, w=weight(16, 16), v=weight(16, 16))
        analysis = analysed(tmp_path, model, (INT8,), choose=True)
        assert (self.scored_by(analysis), analysis.notes) == ("sqnr", ())


@pytest.mark.parametrize("order", [1, -1])
def test_ranges_reach_as_far_as_errs_least_at_the_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    candidates = (Percentile(20.0), MinMax())[::order]
    monkeypatch.setattr(deciding, "CANDIDATES", candidates)
    found = analysed(tmp_path, residual(), (INT8,))
    assert found.clipping == MinMax()
    assert found.statistics is not None
    assert all(by["int8"] == pytest.approx(found.statistics.observers[v].limit / 127, rel=1e-3) for v, by in found.scales.items())


def test_no_network_is_run_to_choose_for_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "measure_scales", lambda *arguments, **options: pytest.fail("measured for nothing"))
    assert analysed(tmp_path, residual(), (FP8,)).scales
