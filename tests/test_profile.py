"""Profiles: layers joined with regions, and estimates that say what they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_graphs import graph, weight
from typer.testing import CliRunner

from deploycc.backends.layers import assemble, measure, module_of, nodes_of
from deploycc.backends.tensorrt import present_arch
from deploycc.cli import app
from deploycc.core.errors import BackendError, UsageError
from deploycc.interop import save_model
from deploycc.pipeline import build
from deploycc.profile import OTHER, by_region, chart, estimated, measured, table
from deploycc.request import BuildRequest

NODES = frozenset({"conv_1", "relu_1", "conv_2", "fc", "ln"})
WITHOUT_GPU = pytest.mark.skipif(present_arch() is not None, reason="there is a GPU here")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a build of two layers with an engine."""
    folder = tmp_path_factory.mktemp("profile")
    text = "(float[N,16,8,8] x) => (float[N,5] y) { c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) f = Flatten(r) y = Gemm(f, v) }"
    save_model(graph(text, opset=20, w=weight(32, 16, 3, 3), v=weight(2048, 5)), folder / "net.onnx")
    request = BuildRequest(
        folder / "net.onnx", precision="fp16", targets=("tensorrt-rtx:sm_89",), out=folder / "net.deploycc", shapes=("x=1:2:4",)
    )
    return build(request)[1]


class TestLayerNames:
    @pytest.mark.parametrize(
        ("name", "metadata", "nodes"),
        [
            ("conv_1", "", ("conv_1",)),
            ("conv_1 + relu_1", "", ("conv_1", "relu_1")),
            ("PWN(relu_1, conv_2)", "", ("relu_1", "conv_2")),
            ("{ForeignNode[conv_1...fc]}", "", ("conv_1", "fc")),
            ("__myl_Conv_myl0_3", "[ONNX Layer: conv_1]\x1f[ONNX Layer: relu_1]", ("conv_1", "relu_1")),
            ("Reformatting CopyNode for Input Tensor 0 to conv_1", "", ()),
            ("conv_1", "[ONNX Layer: conv_2]", ("conv_2",)),
        ],
    )
    def test_nodes_come_from_the_metadata_or_the_parts_of_the_name(self, name: str, metadata: str, nodes: tuple[str, ...]) -> None:
        assert nodes_of(name, {"Metadata": metadata}, NODES) == nodes

    def test_times_are_medians_and_types_those_of_the_inspector(self) -> None:
        layer = {"Name": "conv_1", "Inputs": [{"Format/Datatype": "Channel major FP16 format, Half"}, {"Datatype": "Int8"}]}
        answer = {
            "milliseconds": {"conv_1": [9.0, 1.0, 2.0]},
            "layers": [layer, "bare"],
            "device": "GPU",
            "shapes": {"x": [1, 2]},
            "runs": 3,
        }
        (found,) = assemble(answer, NODES).layers
        assert (found.microseconds, found.types, found.nodes) == (2000.0, "Half x Int8", ("conv_1",))


def test_layers_add_up_per_region_and_shared_ones_are_shared_out() -> None:
    one, two = ({"name": n, "source": f"module.{n}", "kind": "conv", "format": "int8", "noise": {"int8": 1e-4}} for n in ("a", "b"))
    times = {"conv_1": [0.004], "conv_1 + conv_2": [0.002], "copy": [0.001]}
    layers = assemble({"milliseconds": times, "layers": [], "device": "GPU", "shapes": {}, "runs": 1}, NODES).layers
    rows = {r.region: r for r in by_region(layers, {"conv_1": one, "relu_1": one, "conv_2": two})}
    assert {name: row.microseconds for name, row in rows.items()} == pytest.approx({"a": 5.0, "b": 1.0, OTHER: 1.0})
    assert (rows["a"].layers, rows["a"].source, rows["a"].noise) == (("conv_1", "conv_1 + conv_2"), "module.a", 1e-4)
    assert rows[OTHER].layers == ("copy",)


class TestEstimate:
    def test_it_adds_up_to_the_estimate_of_the_report_and_says_what_it_is(self, built: Path) -> None:
        found = estimated(built)
        report = json.loads((built / "report.json").read_text())
        assert found.microseconds == pytest.approx(report["plan"]["estimated_latency_us"], abs=0.01)
        assert not found.is_measured
        assert found.basis == "ESTIMATE, not a measurement: roofline of one L4, batch 2"
        assert table(found).splitlines()[-1].endswith("ESTIMATED in all")

    def test_another_target_has_another_estimate(self, built: Path) -> None:
        assert "RTX 5090" in estimated(built, target="tensorrt-rtx:sm_120").basis

    def test_long_tables_are_cut_and_still_add_up(self, built: Path) -> None:
        lines = table(estimated(built), most=1).splitlines()
        assert lines[-2].endswith("1 more")
        assert len(lines) == 5

    def test_the_evidence_of_the_scores_is_joined(self, built: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(built, tmp_path / "b"))
        scores = json.loads((copy / "scores.json").read_text())
        region = estimated(built).rows[0].region
        (copy / "scores.json").write_text(json.dumps(scores | {"evidence": {region: {"mean": 0.25, "stderr": None, "samples": 1}}}))
        assert [r.evidence for r in estimated(copy).rows] == [0.25, None]
        assert "0.25" in table(estimated(copy)).splitlines()[2]

    def test_the_chart_says_that_it_is_an_estimate(self, built: Path, tmp_path: Path) -> None:
        chart(estimated(built), tmp_path / "p.svg")
        assert "<svg" in (tmp_path / "p.svg").read_text()
        chart(estimated(built), tmp_path / "p.png")
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


class TestWithoutGpu:
    @WITHOUT_GPU
    def test_the_command_says_so_and_offers_the_estimate(self, built: Path) -> None:
        result = CliRunner().invoke(app, ["profile", str(built)])
        assert result.exit_code == 4
        assert "no GPU with a driver was found" in result.output
        assert "ESTIMATE, not a measurement" in result.output
        asked = CliRunner().invoke(app, ["profile", str(built), "--estimate", "--json"])
        assert (asked.exit_code, json.loads(asked.output)["measured"]) == (0, False)

    @WITHOUT_GPU
    def test_an_engine_that_cannot_run_is_refused_with_the_reason(self, built: Path) -> None:
        engine = next((built / "engines").glob("*.engine"))
        assert module_of(engine) == "tensorrt_rtx"
        with pytest.raises(BackendError, match="the engine cannot be profiled"):
            measure(engine, (), runs=1)

    def test_what_cannot_be_profiled_is_refused(self, built: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="neither a build directory nor an engine"):
            estimated(tmp_path)
        with pytest.raises(UsageError, match="an engine alone cannot be estimated"):
            estimated(next((built / "engines").glob("*.engine")))
        with pytest.raises(UsageError, match=r"has no engine for 'tensorrt-rtx:sm_80'.*tensorrt-rtx:sm_89"):
            measured(built, target="tensorrt-rtx:sm_80")


@pytest.mark.parametrize("words", [["inspect", "model"], ["run", "--onnxrt", "--iterations", "1"]])
def test_polygraphy_works_on_what_a_build_writes(built: Path, words: list[str]) -> None:
    polygraphy = shutil.which("polygraphy") or str(Path(sys.executable).with_name("polygraphy"))
    split = 2 if words[0] == "inspect" else 1
    result = subprocess.run([polygraphy, *words[:split], built / "model.onnx", *words[split:]], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "x [dtype=float32" in result.stdout
