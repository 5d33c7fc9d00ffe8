"""Replay compares the bytes of engines where the builder is deterministic."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from small_graphs import graph, weight

from deploycc.interop import save_model
from deploycc.pipeline import build
from deploycc.replay import replay
from deploycc.request import BuildRequest

if TYPE_CHECKING:
    from pathlib import Path

TARGET = "tensorrt-rtx:sm_89"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an FP16 build with an engine."""
    folder = tmp_path_factory.mktemp("replayed")
    text = "(float[N,16] x) => (float[N,8] y) { h = MatMul(x, w) y = Relu(h) }"
    save_model(graph(text, opset=20, w=weight(16, 8)), folder / "net.onnx")
    return build(BuildRequest(folder / "net.onnx", targets=(TARGET,), out=folder / "out", shapes=("x=1:2:4",)))[1]


def test_an_engine_in_fp16_comes_out_with_the_same_bytes(built: Path) -> None:
    verdict = replay(built)
    assert verdict.exit_code == 0
    assert verdict.text.splitlines()[-1] == f"engine for {TARGET}: the same bytes"


def test_other_bytes_of_a_deterministic_builder_are_drift(built: Path) -> None:
    report = json.loads((built / "report.json").read_text())
    report["engines"][0]["sha256"] = "0" * 64
    (built / "report.json").write_text(json.dumps(report))
    verdict = replay(built)
    assert verdict.exit_code == 3
    assert f"drifted: {TARGET} has other bytes" in verdict.text
