"""What builders take is known before any long work: recorded, and asked again operator by operator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from small_graphs import graph
from typer.testing import CliRunner

from deploycc.backends.probed import SCHEMA, lacking, recorded
from deploycc.backends.tensorrt import TensorRT
from deploycc.backends.tensorrt_rtx import TensorRTRTX
from deploycc.cli import app
from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS, FP8, FP16, INT4, INT8
from deploycc.core.target import ARCHS, Target
from deploycc.interop import save_model
from deploycc.probe import PROBES, describe, installed, probe, remember
from deploycc.request import BuildRequest, Silent, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return where this machine keeps what was probed, and forget it afterwards."""
    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path / "cache"))
    recorded.cache_clear()
    yield tmp_path / "cache" / "probed.json"
    monkeypatch.undo()
    recorded.cache_clear()


def answers(version: str, arch: str, *lacking_formats: str) -> dict[str, Any]:
    """Return what a probe of one backend and architecture says, with some formats computed in another."""
    formats = {f: {"MatMul": "computes in fp16" if f in lacking_formats else ""} for f in FORMATS}
    return {"version": version, "archs": {arch: {"NonZero": "", "MatMul": "no kernel for it"}}, "formats": {arch: formats}}


def test_what_was_probed_here_decides(cache: Path) -> None:
    """The builder of TensorRT needs a GPU, so that no table of it comes with deploycc: what was found here is kept here."""
    hopper, ada = (Target("tensorrt", (arch,)) for arch in ("sm_90", "sm_89"))
    stated = TensorRT().formats(ada)
    assert INT4 in TensorRT().formats(hopper)
    assert remember({"schema": SCHEMA, "backends": {"tensorrt": answers("11.0", "sm_90", "int4", "nvfp4")}}) == cache
    assert INT4 not in TensorRT().formats(hopper)
    assert {FP8, INT8, FP16} <= TensorRT().formats(hopper)
    assert TensorRT().unsupported_reason(hopper, INT4)
    assert TensorRT().formats(ada) == stated
    assert lacking(["NonZero", "MatMul"], hopper) == {"MatMul": "no kernel for it"}
    remember({"schema": SCHEMA, "backends": {"tensorrt-rtx": answers("9.9", "sm_89", "fp8")}})
    assert recorded()["backends"]["tensorrt"]["version"] == "11.0"
    assert FP8 not in TensorRTRTX().formats(ADA)
    assert TensorRTRTX().unsupported_reason(ADA, FP8).startswith("sm_89 computes in fp16 where FP8 is asked for")
    assert TensorRTRTX().formats(Target("tensorrt-rtx", ("sm_80",))) == frozenset()
    cache.unlink()
    recorded.cache_clear()
    assert FP8 in TensorRTRTX().formats(ADA)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": "deploycc.probed/2"}', '{"schema": "deploycc.probed/2", "backends": {"tensorrt": {}}}']
)
def test_a_damaged_record_is_named_and_probing_replaces_it(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.raises(UsageError, match=rf"cannot be read .*Where: '{cache}'\. Fix: delete it, or run deploycc targets --probe"):
        recorded()
    remember({"schema": SCHEMA, "backends": {"tensorrt": answers("11.0", "sm_90")}})
    assert recorded()["backends"]["tensorrt"]["version"] == "11.0"
    assert not list(cache.parent.glob("*.tmp"))


def test_a_record_of_another_schema_is_left_alone(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text('{"schema": "deploycc.probed/1", "backends": {"tensorrt": 1}}')
    assert "tensorrt" not in recorded()["backends"]
    remember({"schema": SCHEMA, "backends": {"tensorrt-rtx": answers("9.9", "sm_89")}})
    assert "tensorrt" not in recorded()["backends"]


def test_the_builders_of_this_machine_are_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with one probe of one operator, for want of an hour: built for real, kept, and used from then on."""
    assert "tensorrt-rtx" in installed()
    assert "onnxruntime" not in installed()
    monkeypatch.setattr("deploycc.probe.FORMATS", {"int8": FORMATS["int8"]})
    monkeypatch.setattr("deploycc.probe.architectures", lambda name: ("sm_89",))
    monkeypatch.setattr("deploycc.probe.probe", partial(probe, names=("MatMul", "NonZero")))
    result = CliRunner().invoke(app, ["targets", "--probe"])
    assert result.exit_code == 0, result.output
    assert str(cache) in result.output.replace("\n", "")
    assert recorded()["backends"]["tensorrt-rtx"]["formats"] == {"sm_89": {"int8": {"MatMul": "", "Conv": ""}}}
    assert set(lacking(["MatMul", "NonZero"], ADA)) == {"NonZero"}


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
