"""Bundles: what they hold, what they refuse, and that they are the same for the same build."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_graphs import graph, random, weight
from typer.testing import CliRunner

from deploycc.cli import app
from deploycc.core.errors import UsageError
from deploycc.interop import save_model
from deploycc.pipeline import build
from deploycc.request import BuildRequest
from deploycc.serve.bundle import Bundled, BundleRequest, bundle
from deploycc.serve.golden import FP32_UNIT, limits, rounding_limit_db, sqnr_db


@pytest.fixture(scope="module")
def bundled(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundled:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "classes.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    return bundle(BundleRequest(built, out=folder / "net.bundle", labels=folder / "classes.txt"))


class TestContents:
    def test_every_file_is_listed_with_its_hash(self, bundled: Bundled) -> None:
        listed = bundled.manifest["files"]
        found = {p.relative_to(bundled.directory).as_posix() for p in bundled.directory.rglob("*") if p.is_file()} - {"bundle.json"}
        assert found == set(listed)
        for name, record in listed.items():
            data = (bundled.directory / name).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (record["sha256"], record["bytes"])

    def test_variants_say_what_they_require(self, bundled: Bundled) -> None:
        engine, model, portable = bundled.manifest["variants"]
        assert (engine["kind"], model["kind"], portable["kind"]) == ("tensorrt-rtx", "onnx", "onnx-fp32")
        assert engine["requires"]["archs"] == ["sm_89"]
        assert engine["requires"]["version"].count(".") == 3
        assert engine["requires"]["compatible"] == []

    def test_the_interface_is_that_of_the_model_and_its_profiles(self, bundled: Bundled) -> None:
        (spec,) = bundled.manifest["inputs"]
        assert (spec["datatype"], spec["shape"], spec["minimum"], spec["maximum"]) == ("FP32", [-1, 16, 6, 6], [1, 16, 6, 6], [4, 16, 6, 6])
        assert bundled.manifest["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 5]}]
        assert bundled.manifest["batch"] == {"minimum": 1, "optimum": 2, "maximum": 4}

    def test_golden_inputs_are_calibration_samples(self, bundled: Bundled, built: Path) -> None:
        x = np.load(bundled.directory / bundled.manifest["golden"]["inputs"]["x"])
        np.testing.assert_array_equal(x, np.load(built.parent / "net.calib.npz")["x"][:4])
        assert bundled.manifest["golden"]["source"] == "net.calib.npz"

    def test_golden_limits_follow_from_the_build(self, bundled: Bundled, built: Path) -> None:
        (row,) = json.loads((built / "report.json").read_text())["verification"]
        (golden,) = bundled.manifest["variants"][1]["golden"]
        assert golden["minimum_sqnr_db"] == pytest.approx(row["sqnr_db"] - 6, abs=0.01)

    def test_labels_are_kept(self, bundled: Bundled) -> None:
        assert (bundled.directory / bundled.manifest["labels"]).read_text().split() == ["ant", "bee", "cat", "dog", "eel"]

    def test_the_same_build_gives_the_same_bytes(self, bundled: Bundled, built: Path, tmp_path: Path) -> None:
        labels = bundled.directory / "labels.txt"
        again = bundle(BundleRequest(built, out=tmp_path / "again.bundle", labels=labels))
        assert (again.directory / "bundle.json").read_bytes() == (bundled.directory / "bundle.json").read_bytes()

    def test_a_plugin_library_is_packed_and_required_by_engines(self, built: Path, tmp_path: Path) -> None:
        (tmp_path / "libp.so").write_bytes(b"\x7fELF")
        found = bundle(BundleRequest(built, out=tmp_path / "b", plugins=(tmp_path / "libp.so",)))
        assert found.manifest["variants"][0]["requires"]["plugins"] == ["plugins/libp.so"]
        assert "plugins/libp.so" in found.manifest["files"]

    def test_the_library_and_the_modes_of_the_build_are_required_without_being_named_again(self, copied: Path, tmp_path: Path) -> None:
        library = tmp_path / "libd.so"
        library.write_bytes(b"\x7fELF")
        manifest = json.loads((copied / "manifest.json").read_text())
        manifest["inputs"]["dcn"] = hashlib.sha256(library.read_bytes()).hexdigest()
        manifest["options"] |= {"dcn": str(library), "compatibility": "version"}
        (copied / "manifest.json").write_text(json.dumps(manifest))
        requires = bundle(BundleRequest(copied, out=tmp_path / "b")).manifest["variants"][0]["requires"]
        assert (requires["plugins"], requires["compatible"]) == (["plugins/libd.so"], ["version"])
        library.write_bytes(b"other")
        with pytest.raises(UsageError, match="is missing or has changed"):
            bundle(BundleRequest(copied, out=tmp_path / "b"))

    @pytest.mark.parametrize("change", [{"target": "tensorrt"}, {"version": ""}])
    def test_an_engine_of_which_nothing_is_known_is_refused(self, copied: Path, tmp_path: Path, change: dict[str, str]) -> None:
        report = json.loads((copied / "report.json").read_text())
        report["engines"][0] |= change
        (copied / "report.json").write_text(json.dumps(report))
        with pytest.raises(UsageError, match="does not say which GPU and which version"):
            bundle(BundleRequest(copied, out=tmp_path / "b"))

    def test_without_the_data_of_the_build_golden_inputs_are_synthetic(self, copied: Path, tmp_path: Path) -> None:
        manifest = json.loads((copied / "manifest.json").read_text())
        manifest["paths"] = {"model": "gone.onnx", "data": None, "eval": None}
        (copied / "manifest.json").write_text(json.dumps(manifest))
        assert bundle(BundleRequest(copied, out=tmp_path / "b")).manifest["golden"]["source"] == "synthetic"

    def test_requests_are_not_joined_when_samples_depend_on_each_other(self, tmp_path: Path) -> None:
        text = "(float[N,4] x) => (float[N,4] y) { m = ReduceMean<keepdims=1>(x, a) s = Sub(x, m) y = MatMul(s, w) }"
        save_model(graph(text, opset=20, a=np.array([0]), w=weight(4, 4)), tmp_path / "mix.onnx")
        np.savez(tmp_path / "mix.calib.npz", x=random(16, 4))
        made = build(
            BuildRequest(tmp_path / "mix.onnx", precision="fp32", targets=("onnxruntime",), shapes=("x=1:2:4",), out=tmp_path / "m")
        )
        found = bundle(BundleRequest(made[1]))
        assert found.manifest["batch"] is None
        assert found.notes == ["requests are not joined into batches: output 'y' of a sample depends on the other samples of its batch"]


class TestRefusals:
    def test_what_is_no_build(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is no build directory"):
            bundle(BundleRequest(tmp_path))

    def test_a_build_whose_files_have_changed(self, copied: Path) -> None:
        engine = next((copied / "engines").glob("*.engine"))
        engine.write_bytes(engine.read_bytes()[:-1] + b"x")
        with pytest.raises(UsageError, match=r"has changed since the build"):
            bundle(BundleRequest(copied))
        engine.unlink()
        with pytest.raises(UsageError, match=r"\.engine is missing"):
            bundle(BundleRequest(copied))

    def test_a_place_that_holds_something_else(self, built: Path, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("dear")
        with pytest.raises(UsageError, match="is not empty"):
            bundle(BundleRequest(built, out=tmp_path))
        assert (tmp_path / "letter.txt").read_text() == "dear"

    def test_labels_and_plugins_that_are_not_there(self, built: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="the labels cannot be read"):
            bundle(BundleRequest(built, out=tmp_path / "b", labels=tmp_path / "no.txt"))
        with pytest.raises(UsageError, match=r"plugin library .* does not exist"):
            bundle(BundleRequest(built, out=tmp_path / "b", plugins=(tmp_path / "no.so",)))
        assert not (tmp_path / "b").exists()

    def test_an_interrupted_bundle_leaves_the_old_one(self, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = bundle(BundleRequest(built, out=tmp_path / "b"))
        before = (first.directory / "bundle.json").read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space"):
            bundle(BundleRequest(built, out=tmp_path / "b"))
        assert (tmp_path / "b" / "bundle.json").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["b"]


class TestLimits:
    def test_rounding_in_another_order_bounds_the_limit(self) -> None:
        found = limits({"exact": 200.0, "noisy": 30.0}, nodes=100, unit=FP32_UNIT)
        assert found == {"exact": round(rounding_limit_db(100, FP32_UNIT), 2), "noisy": 24.0}
        assert rounding_limit_db(100, FP32_UNIT) == pytest.approx(144.49 - 20 - 18.06, abs=0.1)

    def test_sqnr_of_numbers_that_are_not_finite_or_of_another_shape(self) -> None:
        one = np.ones(2, np.float32)
        assert sqnr_db(one, one) == 200.0
        assert sqnr_db(one, np.array([1, np.nan], np.float32)) == -200.0
        assert sqnr_db(one, np.ones((1, 2), np.float32)) == -200.0
        assert sqnr_db(one, one * 1.1) == pytest.approx(20, abs=0.01)


def test_the_command_says_what_it_wrote(built: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bundle", str(built), "--out", str(tmp_path / "b"), "--triton", str(tmp_path / "repo")])
    assert result.exit_code == 0, result.output
    assert "model.onnx, portable.onnx" in result.output
    assert "Triton has no backend for TensorRT-RTX engines" in result.output
    assert (tmp_path / "repo" / "net_onnx" / "1" / "model.onnx").is_file()
