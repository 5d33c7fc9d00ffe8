"""What builders take is known before any long work: recorded, and asked again operator by operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from small_graphs import graph
from typer.testing import CliRunner

from deploycc.backends.probed import SCHEMA, lacking, recorded
from deploycc.cli import app
from deploycc.core.target import ARCHS, Target
from deploycc.interop import save_model
from deploycc.probe import PROBES, describe, probe
from deploycc.request import BuildRequest, Silent, resolve

if TYPE_CHECKING:
    from pathlib import Path

ADA = Target("tensorrt-rtx", ("sm_89",))


def test_a_real_builder_takes_one_and_refuses_the_other() -> None:
    found = probe(ADA, ("MatMul", "NonMaxSuppression"))
    assert found["MatMul"] == ""
    assert "no kernel for it" in found["NonMaxSuppression"]


def test_every_probe_is_recorded_for_every_architecture() -> None:
    assert recorded()["schema"] == SCHEMA
    archs = recorded()["backends"]["tensorrt-rtx"]["archs"]
    assert set(archs) == set(ARCHS["tensorrt-rtx"])
    assert all(set(results) == set(PROBES) for results in archs.values())


def test_what_one_architecture_lacks_the_target_lacks() -> None:
    turing = Target("tensorrt-rtx", ("sm_75", "sm_89"))
    assert set(lacking(["Conv", "MatMul", "NonZero"], ADA)) == {"NonZero"}
    assert set(lacking(["MatMul in FP32"], turing)) == {"MatMul in FP32"}
    assert lacking(["MatMul in FP32"], ADA) == lacking(["NonZero"], Target("onnxruntime")) == {}


def test_the_table_names_formats_operators_and_the_version() -> None:
    result = CliRunner().invoke(app, ["targets"])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == describe().strip()
    assert f"tensorrt-rtx {recorded()['backends']['tensorrt-rtx']['version']}" in result.output
    line = next(x for x in result.output.splitlines() if x.startswith("  NonMaxSuppression"))
    assert line.split()[1:7] == ["x"] * 6


class Warned(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(("target", "is_warned"), [("tensorrt-rtx:sm_89", True), ("onnxruntime", False)])
def test_a_build_says_at_once_what_its_target_lacks(tmp_path: Path, target: str, is_warned: bool) -> None:
    save_model(graph("(float[2,8] x) => (int64[2,n] y) { y = NonZero(x) }", opset=20), tmp_path / "net.onnx")
    watch = Warned()
    resolve(BuildRequest(tmp_path / "net.onnx", targets=(target,), out=tmp_path / "out"), watch)
    assert any("NonZero" in text and "tensorrt-rtx" in text for text in watch.texts) is is_warned
