"""Raw ranges as a file: what was saved comes back, other keys and damaged files do not, and a second build runs no data for ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploycc.core.errors import UsageError
from deploycc.core.rescaling import Rescale
from deploycc.pipeline import build
from deploycc.quant import decide
from deploycc.quant.calibrate import Statistics
from deploycc.quant.observers import Observer
from deploycc.quant.ranges import RANGES, load_ranges, save_ranges
from deploycc.request import BuildRequest

if TYPE_CHECKING:
    from collections.abc import Callable

FASHION = Path(__file__).parent.parent.parent / "examples" / "fashion"
RESCALES = {"ln": Rescale((0.5, 1.0), (0.0, -2.0), 1.5, 3.25)}


def statistics() -> Statistics:
    observers = {name: Observer() for name in ("a", "b/c")}
    for scale, observer in enumerate(observers.values(), 1):
        values = np.random.default_rng(scale).standard_normal(1000).astype(np.float32) * scale
        observer.extend(float(values.min()), float(values.max()))
        observer.histogram.add(np.abs(values))
    return Statistics(observers, 7, 1.5)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    seen, path = statistics(), tmp_path / RANGES
    save_ranges(path, seen, RESCALES, key="k")
    found = load_ranges(path, key="k")
    assert found is not None
    known, rescales = found
    assert (list(known.observers), known.samples, known.cached, rescales) == (["a", "b/c"], 7, True, RESCALES)
    for name, observer in seen.observers.items():
        other = known.observers[name]
        assert (other.low, other.high, other.histogram.exponent) == (observer.low, observer.high, observer.histogram.exponent)
        np.testing.assert_array_equal(other.histogram.counts, observer.histogram.counts)
    save_ranges(tmp_path / "again.npz", known, rescales, key="k")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_other_damaged_or_missing_ranges_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / RANGES
    assert load_ranges(path, key="k") is None
    save_ranges(path, statistics(), {}, key="k")
    assert load_ranges(path, key="other") is None
    path.write_bytes(path.read_bytes()[:-200])
    assert load_ranges(path, key="k") is None
    np.savez(path, names=np.zeros(3))
    assert load_ranges(path, key="k") is None


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BuildRequest]:
    """Return a function that makes requests for the CNN on some samples, into one directory."""
    folder = tmp_path_factory.mktemp("ranges")

    def make(samples: int = 8, **options: object) -> BuildRequest:
        with np.load(FASHION / "cnn.calib.npz") as calibration:
            np.savez(folder / f"{samples}.npz", image=calibration["image"][:samples])
        default = {"precision": "int8", "data": str(folder / f"{samples}.npz"), "targets": ("onnxruntime",), "shapes": ("image=1:4:8",),
                   "rounding": "nearest", "rescale": "off", "out": folder / "out"}  # fmt: skip
        return BuildRequest(FASHION / "cnn.onnx", **{**default, **options})  # type: ignore[arg-type]

    return make


def test_neither_another_way_nor_another_format_needs_a_second_pass(
    request_of: Callable[..., BuildRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    calibrate = decide.calibrate

    def counted(*arguments: object, **options: object) -> Statistics:
        passes.append(1)
        return calibrate(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(decide, "calibrate", counted)
    scales, files = {}, set()
    for way in ("mse", "percentile:99", "minmax"):
        report, directory = build(request_of(calibration=way))
        plan, manifest = (json.loads((directory / name).read_text()) for name in ("plan.json", "manifest.json"))
        scales[way] = {value: by["int8"] for value, by in plan["scales"].items()}
        files.add((directory / RANGES).read_bytes())
        assert (report.calibration["method"], report.calibration["cached"]) == (way, way != "mse")
        assert manifest["options"]["calibration"] == plan["calibration"] == way
    assert build(request_of(precision="fp8"))[0].calibration["cached"] is True
    assert len(passes) == len(files) == 1
    assert all(scales["percentile:99"][v] < s and scales["mse"][v] <= s for v, s in scales["minmax"].items())
    with pytest.raises(UsageError, match=r"the plan holds every scale already\. Where: --calibration mse"):
        build(request_of(precision="fp16", plan=directory / "plan.json", calibration="mse"))
    assert build(request_of(samples=4))[0].calibration["cached"] is False


def test_the_configuration_names_the_way(request_of: Callable[..., BuildRequest], tmp_path: Path) -> None:
    config = tmp_path / "deploycc.toml"
    config.write_text('[calibration]\nmethod = "percentile:99.5"\n')
    assert build(request_of(config=config))[0].request["calibration"] == "percentile:99.5"
    for wrong in ('[calibration]\nway = "mse"\n', "[calibration]\nmethod = 3\n"):
        config.write_text(wrong)
        with pytest.raises(UsageError, match=r"has a section \[calibration\] without a method alone\. Where: --config"):
            build(request_of(config=config))
    config.write_text('[calibration]\nmethod = "max"\n')
    with pytest.raises(UsageError, match=r"unknown way of calibration 'max'\. Where: --config .*deploycc.toml"):
        build(request_of(config=config))


def test_a_simulation_takes_no_way(request_of: Callable[..., BuildRequest]) -> None:
    with pytest.raises(UsageError, match=r"a simulation fits every quantizer itself\. Where: --calibration mse"):
        build(request_of(precision="w4a4", calibration="mse", rounding="auto"))
