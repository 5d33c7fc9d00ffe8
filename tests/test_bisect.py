"""Bisection of builds in which one region was spoiled on purpose: it is named, with what it recovers; and what is said otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploycc import cli
from deploycc.bisect import bisect
from deploycc.core.errors import UsageError
from deploycc.pipeline import build
from deploycc.request import BuildRequest

if TYPE_CHECKING:
    from collections.abc import Callable

FASHION = Path(__file__).parent.parent / "examples" / "fashion"
CULPRIT = "stages.1.conv2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a little data, with and without labels."""
    folder = tmp_path_factory.mktemp("bisect")
    with np.load(FASHION / "cnn.calib.npz") as calibration, np.load(FASHION / "eval.npz") as labelled:
        np.savez(folder / "few.npz", image=calibration["image"][:16])
        np.savez(folder / "labelled.npz", image=labelled["image"][:256], labels=labelled["labels"][:256])
    return folder


@pytest.fixture(scope="module")
def make(folder: Path) -> Callable[..., Path]:
    """Return a function that builds the CNN for ONNX Runtime."""

    def build_here(out: str, **options: object) -> Path:
        given = {"data": str(folder / "few.npz"), "targets": ("onnxruntime",), "shapes": ("image=1:8:64",), **options}
        return build(BuildRequest(FASHION / "cnn.onnx", out=folder / out, **given))[1]  # type: ignore[arg-type]

    return build_here


@pytest.fixture(scope="module")
def spoiled(make: Callable[..., Path], folder: Path) -> Path:
    """Return a build in INT8 in which one region reads its input through a scale that is 120 times too large."""
    body = json.loads((make("whole", precision="int8") / "plan.json").read_text())
    region = next(r for r in body["regions"] if r["source"] == CULPRIT)
    body["scales"][region["activations"][0]]["int8"] *= 120
    (folder / "spoiled.json").write_text(json.dumps(body))
    return make("spoiled", plan=folder / "spoiled.json")


def test_the_region_that_loses_the_accuracy_is_named(spoiled: Path, folder: Path) -> None:
    found = bisect(spoiled, data=str(folder / "labelled.npz"))
    first = found.suspects[0]
    assert (found.metric, first["torch"], first["format"]) == ("top-1", CULPRIT, "int8")
    assert first["share"] > 0.8
    assert first["score"] > found.built + 5
    assert "node_conv2d_4" in first["nodes"]
    assert found.runs <= 25
    text = str(found)
    assert f'"{CULPRIT}" = "fp32"' in text
    assert "restored alone" in text


def test_without_labels_it_goes_by_sqnr(spoiled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["deploycc", "bisect", str(spoiled), "--json", "--runs", "12"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    body = json.loads(capsys.readouterr().out)
    assert (ended.value.code, body["schema"], body["metric"]) == (0, "deploycc.bisection/1", "SQNR")
    assert body["suspects"][0]["torch"] == CULPRIT
    assert body["runs"] <= 12
    assert body["restored"] > body["built"] + 5


def test_a_floating_point_build_has_nothing_to_restore(make: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="every region of the build computes in FP32: there is nothing to restore"):
        bisect(make("float", precision="fp32"))


def test_in_fp16_no_region_explains_what_little_is_lost(make: Callable[..., Path], folder: Path) -> None:
    found = bisect(make("half", precision="fp16"), data=str(folder / "labelled.npz"), runs=8)
    assert (found.metric, found.restored_to) == ("SQNR", "fp32")
    assert "too little to search by, so SQNR is used" in found.verdict
    assert found.restored > found.built


def test_a_folder_that_is_no_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a build directory"):
        bisect(tmp_path)
