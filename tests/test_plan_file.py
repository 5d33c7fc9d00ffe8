"""A plan as a file: the same bytes without calibrating; edited plans and the section [regions] are obeyed; replay knows both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploycc import pipeline
from deploycc.core.errors import UsageError
from deploycc.explain import explain
from deploycc.pipeline import build
from deploycc.replay import replay
from deploycc.request import BuildRequest

if TYPE_CHECKING:
    from collections.abc import Callable

FASHION = Path(__file__).parent.parent / "examples" / "fashion"
REGIONS = '[regions]\n"stages.0.*" = "fp32"\n"stages.2.conv1" = "fp8"\n'


@pytest.fixture(scope="module")
def request_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BuildRequest]:
    """Return a function that makes a request for the CNN on 8 samples, for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("plans")
    (folder / "deploycc.toml").write_text(REGIONS)
    with np.load(FASHION / "cnn.calib.npz") as calibration:
        np.savez(folder / "few.npz", image=calibration["image"][:8])

    def make(out: str, **options: object) -> BuildRequest:
        data = {"data": str(folder / "few.npz"), "targets": ("onnxruntime",), "shapes": ("image=1:4:8",), **options}
        return BuildRequest(FASHION / "cnn.onnx", out=folder / out, **data)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def overridden(request_in: Callable[..., BuildRequest]) -> Path:
    """Return a build in INT8 with two patterns."""
    config = request_in("x").directory.parent / "deploycc.toml"
    return build(request_in("overridden", precision="int8", config=config))[1]


def test_the_same_plan_gives_the_same_bytes_and_calibrates_nothing(
    request_in: Callable[..., BuildRequest], overridden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "analyse", lambda *_, **__: pytest.fail("the model was analysed again"))
    report, again = build(request_in("again", plan=overridden / "plan.json"))
    for name in ("model.onnx", "plan.json"):
        assert (again / name).read_bytes() == (overridden / name).read_bytes()
    assert (report.calibration["samples"], report.request["precision"]) == (0, "plan")
    assert replay(again).exit_code == 0


def test_patterns_decide_and_are_the_reason(overridden: Path) -> None:
    found = {r["source"]: (r["format"], r["reason"]) for r in json.loads((overridden / "plan.json").read_text())["regions"]}
    assert found["stages.0.conv1"] == ("fp32", 'the configuration says so: [regions] "stages.0.*" = "fp32"')
    assert found["stages.2.conv1"][0] == "fp8"
    assert found["stages.2.conv2"][0] == "int8"
    assert 'why: the configuration says so: [regions] "stages.0.*" = "fp32"' in explain(overridden, "stages.0.conv1")


@pytest.mark.slow
def test_a_build_with_patterns_is_replayed(overridden: Path) -> None:
    assert replay(overridden).exit_code == 0


def test_an_edited_plan_is_obeyed(request_in: Callable[..., BuildRequest], overridden: Path) -> None:
    body = json.loads((overridden / "plan.json").read_text())
    edited = next(r for r in body["regions"] if r["source"] == "stages.2.conv2")
    edited.update(format=body["base"], reason="by hand")
    path = overridden.parent / "edited.json"
    path.write_text(json.dumps(body))
    _, result = build(request_in("edited", plan=path))
    assert explain(result, "stages.2.conv2").startswith(f"{edited['name']} (conv) computes in {body['base']}")
    assert "why: by hand" in explain(result, "stages.2.conv2")


def test_what_the_plan_decides_is_not_asked_twice(request_in: Callable[..., BuildRequest], overridden: Path) -> None:
    config = overridden.parent / "deploycc.toml"
    for options in ({"precision": "int8"}, {"config": config}):
        with pytest.raises(UsageError, match="the plan says every precision already"):
            build(request_in("twice", plan=overridden / "plan.json", **options))


def test_a_target_without_the_formats_of_the_plan_is_refused(request_in: Callable[..., BuildRequest], overridden: Path) -> None:
    with pytest.raises(UsageError, match=r"sm_80 has no FP8 units.* Where: --plan .*plan.json --target tensorrt-rtx:sm_80"):
        build(request_in("old", plan=overridden / "plan.json", targets=("tensorrt-rtx:sm_80",)))


def test_a_file_that_is_no_plan_is_refused(request_in: Callable[..., BuildRequest]) -> None:
    with pytest.raises(UsageError, match="the plan cannot be read"):
        build(request_in("none", plan=FASHION / "cnn.onnx"))
    with pytest.raises(UsageError, match=r"the plan cannot be read: .*No such file"):
        build(request_in("none", plan=FASHION / "missing.json"))
