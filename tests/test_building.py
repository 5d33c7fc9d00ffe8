"""Engines of several targets: built at the same time, and one that fails does not lose the others."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from small_graphs import graph, weight

from deploycc.core.errors import BackendError
from deploycc.interop import save_model
from deploycc.pipeline import build
from deploycc.request import BuildRequest, Silent

if TYPE_CHECKING:
    from pathlib import Path


class Log(Silent):
    """A watcher that remembers which stages began and ended beside others."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def begin(self, name: str) -> None:
        self.events.append(("begin", name))

    def end(self, name: str) -> None:
        self.events.append(("end", name))


def request(folder: Path, *targets: str) -> BuildRequest:
    """Return a request for a network with a matrix product in FP32, which sm_75 does not have."""
    save_model(graph("(float[N,16] x) => (float[N,8] y) { y = MatMul(x, w) }", opset=20, w=weight(16, 8)), folder / "net.onnx")
    return BuildRequest(folder / "net.onnx", precision="fp32", targets=targets, out=folder / "out", shapes=("x=1:2:4",))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core builds one engine at a time")
def test_two_targets_are_built_at_the_same_time_and_reported_in_order(tmp_path: Path) -> None:
    log = Log()
    report, _ = build(request(tmp_path, "tensorrt-rtx:sm_89", "tensorrt-rtx:sm_80"), log)
    assert [kind for kind, _ in log.events] == ["begin", "begin", "end", "end"]
    assert [e["target"] for e in report.engines] == ["tensorrt-rtx:sm_89", "tensorrt-rtx:sm_80"]
    assert {"build tensorrt-rtx:sm_80", "build tensorrt-rtx:sm_89"} <= set(report.seconds)


def test_a_target_that_fails_is_reported_and_the_others_are_kept(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"tensorrt-rtx:sm_75: .*2 of 3 engines were built") as caught:
        build(request(tmp_path, "tensorrt-rtx:sm_75", "tensorrt-rtx:sm_89", "onnxruntime"))
    assert caught.value.exit_code == 4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [e["target"] for e in report["engines"]] == ["tensorrt-rtx:sm_89", "onnxruntime"]
    assert [f["target"] for f in report["failures"]] == ["tensorrt-rtx:sm_75"]
    assert sorted(p.suffix for p in (tmp_path / "out" / "engines").iterdir()) == ["", ".engine", ".onnx"]
