"""Builds in paper mode: what they write, what they promise, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graphs import transformer

from deploycc.core.errors import UsageError
from deploycc.core.plan import PrecisionPlan
from deploycc.output import digest_file
from deploycc.pipeline import build
from deploycc.request import BuildRequest

if TYPE_CHECKING:
    from deploycc.core.report import BuildReport

FASHION = Path(__file__).parent.parent / "examples" / "fashion"
BENCHMARK = FASHION.parent.parent / "benchmarks" / "lrp_qvit.py"
# The export of the example names its products so; the last is the classifier.
EDGES = {"node_conv2d", "node_conv2d_1", "node_conv2d_2", "node_linear_16"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "calib.npz"
    with np.load(FASHION / "vit.calib.npz") as whole:
        np.savez(path, image=whole["image"][:48])
    return path


@pytest.fixture(scope="module")
def mixed(data: Path) -> tuple[BuildReport, Path]:
    """Return a build of the example's transformer in mp4."""
    return build(BuildRequest(FASHION / "vit.onnx", "mp4", data=str(data), out=data.parent / "mp4", shapes=("image=1:16:48",)))


def small(folder: Path) -> Path:
    """Write one attention block."""
    ir.save(transformer(), folder / "block.onnx")
    return folder / "block.onnx"


def refusal(folder: Path, precision: str, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as refused:
        build(BuildRequest(small(folder), precision, out=folder / "out", **options))
    assert not (folder / "out").exists()
    return refused.value


class TestMixed:
    def test_the_bits(self, mixed: tuple[BuildReport, Path]) -> None:
        """Of four equal blocks two rise and two fall, whatever the relevance; edges keep 8 bits."""
        report, directory = mixed
        assert report.plan["regions"] == {"w3a3": 10, "w5a5": 10, "w8a8": 4}
        body = json.loads((directory / "plan.json").read_text())
        formats = {r["name"]: r["format"] for r in body["regions"]}
        assert {name for name, format in formats.items() if format == "w8a8"} == EDGES
        blocks = [format for name, format in formats.items() if name not in EDGES]
        assert blocks == ["w5a5"] * 10 + ["w3a3"] * 10
        inside = [r for r in body["regions"] if r["name"] not in EDGES]
        bits = sum(int(r["format"][1]) * r["parameters"] for r in inside) / sum(r["parameters"] for r in inside)
        assert bits == 4.0

    def test_it_says_what_it_is(self, mixed: tuple[BuildReport, Path]) -> None:
        report, directory = mixed
        warning = "--precision mp4 simulates quantizers that no engine has: the result shows accuracy, not speed or size"
        assert warning in report.warnings
        assert warning in (directory / "report.md").read_text()
        assert all(r["reason"].endswith("(simulated)") for r in report.regions)
        assert report.plan["estimated_latency_ratio"] == 1.0

    def test_the_scores(self, mixed: tuple[BuildReport, Path]) -> None:
        report, directory = mixed
        scores = json.loads((directory / "scores.json").read_text())
        assert scores["method"] == report.scores["method"] == "relevance"
        assert scores["meaning"].startswith("positive part of gradient times relevance")
        assert set(scores["regions"]) == {r["name"] for r in report.regions}
        assert report.calibration["samples"] == 32

    def test_the_file_holds_standard_operators_and_few_values(self, mixed: tuple[BuildReport, Path]) -> None:
        model = onnx.load(mixed[1] / "model.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert {n.domain for n in model.graph.node} <= {""}
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_w3a3")}
        assert len(weights) == 8
        assert max(len(np.unique(column)) for w in weights.values() for column in w.T) == 8

    def test_the_plan_can_be_read_back(self, mixed: tuple[BuildReport, Path]) -> None:
        text = (mixed[1] / "plan.json").read_text()
        plan = PrecisionPlan.from_json(text)
        assert plan.to_json() == text
        assert len(plan.rescales) == 8
        assert {len(q.scale) for by in plan.quantizers.values() for q in by.values() if hasattr(q, "zero_point")} == {1, 96}

    def test_the_plan_builds_the_same_file(self, mixed: tuple[BuildReport, Path], data: Path) -> None:
        again = data.parent / "again"
        request = BuildRequest(FASHION / "vit.onnx", plan=mixed[1] / "plan.json", targets=("onnxruntime",), data=str(data), out=again)
        build(request)
        assert digest_file(again / "model.onnx") == digest_file(mixed[1] / "model.onnx")

    def test_it_is_still_right(self, mixed: tuple[BuildReport, Path]) -> None:
        (row,) = mixed[0].verification
        assert row["agreement"] >= 0.85
        assert 8 < row["sqnr_db"] < 40


@pytest.mark.parametrize("way", ["layer", "channel", "repq", "crl:2.5"])
def test_every_reparameterization_builds(tmp_path: Path, way: str) -> None:
    request = BuildRequest(small(tmp_path), "w6a6", reparam=way, out=tmp_path / "out")
    report, directory = build(request)
    assert report.request["reparam"] == way
    assert report.verification[0]["sqnr_db"] > 20
    rescaled = [p for p in report.passes if p["spec"].startswith("RescaleLayernorm") and p["rewrites"]]
    assert bool(rescaled) == (way in {"repq", "crl:2.5"})
    assert json.loads((directory / "plan.json").read_text())["base"] == "fp32"


class TestRefusals:
    @pytest.mark.parametrize("precision", ["w4a4", "mp4", "w6a6", "mp6"])
    def test_engines(self, tmp_path: Path, precision: str) -> None:
        error = refusal(tmp_path, precision, targets=("tensorrt-rtx:sm_89",))
        assert "no engine computes in n bits" in error.what
        assert error.at == f"--precision {precision} --target tensorrt-rtx:sm_89"
        assert "--target onnxruntime" in error.fix

    def test_an_engine_beside_the_simulation(self, tmp_path: Path) -> None:
        assert "no engine computes" in refusal(tmp_path, "w4a4", targets=("onnxruntime", "tensorrt-rtx:sm_89")).what

    @pytest.mark.parametrize("budget", ["bits<=4", "size<=0.5x", "latency<=0.5x"])
    def test_budgets_on_what_is_fixed(self, tmp_path: Path, budget: str) -> None:
        error = refusal(tmp_path, "w4a4", budget=budget)
        assert error.what == "--precision w4a4 fixes the bits of every layer"

    def test_too_few_blocks(self, tmp_path: Path) -> None:
        assert "the rule protects the first 2 transformer blocks, and the graph has 1" in refusal(tmp_path, "mp4").what

    def test_reparameterization_of_another_precision(self, tmp_path: Path) -> None:
        assert refusal(tmp_path, "int8", targets=("onnxruntime",), reparam="crl").at == "--reparam"

    def test_an_unknown_reparameterization(self, tmp_path: Path) -> None:
        assert refusal(tmp_path, "w4a4", reparam="smooth").fix == "use layer, channel, repq, crl or crl:K with K above 0"


@pytest.mark.slow
def test_the_benchmark_prints_its_tables(tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), "swin", "--draws", "1", "--images", "100", "--keep", str(kept)]
    for _ in range(2):  # The second run takes the figures from the file.
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = [line for line in done.stdout.splitlines() if line.startswith("| swin | ")]
        assert len(rows) == 4
        assert "| layer < repq | +35.86 | " in done.stdout
    (results,) = json.loads(kept.read_text()).values()
    assert set(results["swin"]) == {"fp32", "four", "three", "planted"}
