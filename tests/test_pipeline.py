"""Whole builds of the Fashion-MNIST CNN: every precision, every file, and what happens when something goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graphs import graph, random, transformer, weight

from deploycc.core.errors import BudgetError, UsageError
from deploycc.core.plan import PrecisionPlan
from deploycc.explain import explain
from deploycc.output import digest_file, is_build
from deploycc.pipeline import GUARD_ROUNDS, build
from deploycc.request import BuildRequest

FASHION = Path(__file__).parent.parent / "examples" / "fashion"
CONVOLUTIONS = [f"node_conv2d{suffix}" for suffix in ("", *(f"_{i}" for i in range(1, 9)))]
AMPERE, ADA = "tensorrt-rtx:sm_80", "tensorrt-rtx:sm_89"
FILES = {"model.onnx", "plan.json", "scores.json", "report.json", "report.md", "report.html", "manifest.json", "engines"}
PASS_OPTIONS = {"merge": "exact", "rescale": "auto", "rounding": "auto", "reparam": None, "verify_each": False}
PASS_OPTIONS |= {"sensitivity": "auto", "relevance_fallback": None, "regions": [], "dcn": "body", "compatibility": ""}
CALIBRATED = {"int8", "fp8", "mixed"}
SAME_BYTES = ("model.onnx", "plan.json", "scores.json", "manifest.json")
# In decibels, each with a few to spare; FP16 has 11 bits of precision, BF16 has 8, and INT8 and FP8 lose more.
EXPECTED_SQNR = {"fp32": 100, "fp16": 55, "bf16": 36, "int8": 30, "fp8": 28, "mixed": 35}


class Case:
    """A folder with the model, little data, and the builds made in it so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.labelled = folder, folder / "cnn.onnx", folder / "eval.npz"
        shutil.copy(FASHION / "cnn.onnx", self.model)
        with np.load(FASHION / "cnn.calib.npz") as calibration, np.load(FASHION / "eval.npz") as labelled:
            np.savez(folder / "cnn.calib.npz", image=calibration["image"][:64])
            np.savez(self.labelled, image=labelled["image"][:512], labels=labelled["labels"][:512])
        self.done: dict[tuple[object, ...], Path] = {}

    def request(self, precision: str, *targets: str, out: str, **options: Any) -> BuildRequest:
        return BuildRequest(self.model, precision, targets=targets, out=self.folder / out, shapes=("image=1:8:16",), **options)

    def built(self, precision: str, target: str, **options: Any) -> Path:
        """Return the directory of a build, made once."""
        key = (precision, target, *sorted(options.items()))
        if key not in self.done:
            request = self.request(precision, target, out=f"build{len(self.done)}", **options)
            _, self.done[key] = build(request)
        return self.done[key]

    def report(self, precision: str, target: str, **options: Any) -> dict[str, Any]:
        """Return the report of a build."""
        return read(self.built(precision, target, **options))


def read(directory: Path, name: str = "report.json") -> Any:
    return json.loads((directory / name).read_text())


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return the folder in which all builds of this file are made."""
    return Case(tmp_path_factory.mktemp("fashion"))


BUILDS = [("fp32", AMPERE), ("fp16", AMPERE), ("bf16", AMPERE), ("int8", AMPERE), ("fp8", ADA), ("mixed", ADA), ("int8", "onnxruntime")]


@pytest.mark.parametrize(("precision", "target"), BUILDS)
class TestEveryPrecision:
    def test_the_files(self, case: Case, precision: str, target: str) -> None:
        directory = case.built(precision, target)
        assert {p.name for p in directory.iterdir()} == FILES | ({"ranges.npz"} if precision in CALIBRATED else set())
        suffix = ".onnx" if target == "onnxruntime" else ".engine"
        engine = directory / "engines" / f"{target.replace(':', '-')}{suffix}"
        assert {p.name for p in (directory / "engines").iterdir()} == {engine.name, "SHA256SUMS"}
        assert (directory / "engines" / "SHA256SUMS").read_text() == f"{digest_file(engine)}  {engine.name}\n"
        onnx.checker.check_model(str(directory / "model.onnx"), full_check=True)
        assert [p for p in case.folder.iterdir() if p.name.startswith(".")] == []

    def test_the_report(self, case: Case, precision: str, target: str) -> None:
        report = case.report(precision, target)
        assert report["schema"] == "deploycc.report/1"
        assert report["model"]["path"] == "cnn.onnx"
        assert report["model"]["sha256"] == digest_file(case.model)
        assert report["model"]["outputs"] == ["logits"]
        asked = {"precision": precision, "targets": [target], "calibration": "auto" if precision in CALIBRATED else None}
        assert report["request"] == {**asked, "budget": "", "seed": 0, "strict": False, **PASS_OPTIONS}
        names = [p["spec"].split("(")[0] for p in report["passes"]]
        assert names[-5:] == ["RoundWeights", "SimulateQuantizers", "InsertQdq", "InsertCasts", "FuseDcnv3Quantizers"]
        assert {"spec", "seconds", "nodes_before", "nodes_after", "rewrites", "declines"} <= set(report["passes"][0])
        assert report["plan"]["weight_parameters"] > 300_000
        (row,) = report["verification"]
        assert (row["output"], row["samples"], row["finite"]) == ("logits", 64, True)
        assert row["agreement"] >= 0.95
        (engine,) = report["engines"]
        path = case.built(precision, target) / engine["path"]
        assert (engine["target"], engine["bytes"], engine["sha256"]) == (target, path.stat().st_size, digest_file(path))
        assert engine["build_seconds"] > 0
        needs_data = precision in {"int8", "fp8", "mixed"}
        assert (report["calibration"]["samples"], report["calibration"]["synthetic"]) == (64 * needs_data, False)
        assert bool(report["scores"]) == (precision == "mixed")
        assert set(report["seconds"]) >= {"load", "canonicalize", "quantize", "verify", f"build {target}"}
        assert report["peak_rss_mb"] > 50
        slower = [w for w in report["warnings"] if "times the latency of fp16: behind every convolution and product of codes" in w]
        assert len(slower) == (needs_data and target.startswith("tensorrt-rtx")) == (report["plan"]["estimated_latency_ratio"] > 1.02)
        assert report["warnings"] == slower
        assert report["failures"] == []
        assert len(report["guard"]) == 1

    def test_the_numbers_are_close(self, case: Case, precision: str, target: str) -> None:
        assert case.report(precision, target)["verification"][0]["sqnr_db"] > EXPECTED_SQNR[precision]

    def test_the_engine_computes_what_the_plan_says(self, case: Case, precision: str, target: str) -> None:
        verdicts = {r["name"]: r["realised"][target]["verdict"] for r in case.report(precision, target)["regions"]}
        if precision == "bf16":
            # TensorRT-RTX has no BF16 convolution of a single channel; the listing does not say what it computes instead.
            assert verdicts.pop("node_conv2d") == "unknown"
        assert set(verdicts.values()) == ({"unknown"} if target == "onnxruntime" else {"ok"}), verdicts


def test_int8_makes_every_convolution_int8(case: Case) -> None:
    """Nine convolutions; the classifier has ten outputs and stays in FP16 (S1)."""
    report = case.report("int8", AMPERE)
    counts = report["engines"][0]["counts"]
    assert counts["conv_int8"] == 9
    assert [name for name in counts if name.startswith("conv_")] == ["conv_int8", "conv_unfused"]
    assert counts["fc_fp16"] == 1
    regions = {r["name"]: r for r in report["regions"]}
    assert [n for n, r in regions.items() if r["format"] == "int8"] == CONVOLUTIONS
    assert {regions[n]["realised"][AMPERE]["types"] for n in CONVOLUTIONS} == {"int8 x int8"}
    assert regions["node_linear"]["reason"] == "int8 is excluded here by S1"


def test_fp8_makes_convolutions_fp8(case: Case) -> None:
    """The first convolution has one input channel and stays in FP16 (S3)."""
    counts = case.report("fp8", ADA)["engines"][0]["counts"]
    assert (counts["conv_fp8"], counts["conv_fp16"]) == (8, 1)


@pytest.mark.parametrize(("precision", "target"), [("int8", AMPERE), ("fp8", ADA)])
def test_attention_is_realised_with_every_operand(tmp_path: Path, precision: str, target: str) -> None:
    """F1: both products of the core, and the projections that read one value."""
    onnx.save(ir.serde.serialize_model(transformer()), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=random(8, 16, 64))
    report, _ = build(BuildRequest(tmp_path / "m.onnx", precision, targets=(target,), out=tmp_path / "out", shapes=("x=1:4:8",)))
    rows = {r["kind"]: r for r in report.regions}
    assert rows["attention"]["format"] == precision
    assert {r["name"]: r["realised"][target]["verdict"] for r in report.regions} == dict.fromkeys((r["name"] for r in report.regions), "ok")
    assert report.verification[0]["sqnr_db"] > 25


@pytest.mark.parametrize(("precision", "target"), [("int8", AMPERE), ("mixed", ADA), ("fp8", "onnxruntime")])
def test_models_that_come_in_fp16(tmp_path: Path, precision: str, target: str) -> None:
    text = "(float16[N,32] x) => (float16[N,16] y) { h = MatMul(x, w) a = Add(h, b) r = Relu(a) e = Exp(r) y = MatMul(e, u) }"
    constants = {"w": weight(32, 48), "b": weight(48), "u": weight(48, 16) / 8}
    onnx.save(ir.serde.serialize_model(graph(text, **{k: v.astype(np.float16) for k, v in constants.items()})), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=random(16, 32).astype(np.float16))
    report, directory = build(BuildRequest(tmp_path / "m.onnx", precision, targets=(target,), out=tmp_path / "out", shapes=("x=1:16:32",)))
    onnx.checker.check_model(str(directory / "model.onnx"), full_check=True)
    assert report.verification[0]["sqnr_db"] > 25
    assert {r["realised"][target]["verdict"] for r in report.regions} <= {"ok", "unknown"}
    assert sum(r["format"] in {"int8", "fp8"} for r in report.regions) == 2


def test_mixed_meets_the_default_bits(case: Case) -> None:
    report = case.report("mixed", ADA)
    assert 8 <= report["plan"]["average_bits"] <= 10
    assert len(report["plan"]["regions"]) > 1
    scores = read(case.built("mixed", ADA), "scores.json")
    assert set(scores["regions"]["node_conv2d_1"]) == {"int8", "fp8"}
    assert all(0 < v < 0.01 for by in scores["regions"].values() for v in by.values())


def test_the_plan_reads_back(case: Case) -> None:
    directory = case.built("mixed", ADA)
    text = (directory / "plan.json").read_text()
    plan = PrecisionPlan.from_json(text)
    assert plan.to_json() == text
    assert {a.region.name: a.format.name for a in plan.assignments} == {r["name"]: r["format"] for r in read(directory)["regions"]}


def test_the_built_onnx_is_the_engine_of_onnxruntime(case: Case) -> None:
    directory = case.built("int8", "onnxruntime")
    assert (directory / "engines" / "onnxruntime.onnx").read_bytes() == (directory / "model.onnx").read_bytes()


def test_accuracy_is_measured_on_labels(case: Case) -> None:
    report = case.report("int8", "onnxruntime", eval=str(case.labelled))
    accuracy = report["accuracy"]
    assert (accuracy["metric"], accuracy["samples"]) == ("top-1", 512)
    assert accuracy["fp32"] > 88
    assert accuracy["drop"] == pytest.approx(accuracy["fp32"] - accuracy["built"])
    assert abs(accuracy["drop"]) < 3
    assert report["verification"][0]["samples"] == 128


def test_same_inputs_same_bytes(case: Case) -> None:
    first = case.built("mixed", ADA)
    _, second = build(case.request("mixed", ADA, out="again"))
    for name in SAME_BYTES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    manifest = read(second, "manifest.json")
    assert manifest["outputs"] == {name: digest_file(second / name) for name in SAME_BYTES[:3]}
    assert manifest["inputs"]["model"] == digest_file(case.model)


def test_behind_convolutions_of_codes_run_kernels_of_their_own(case: Case) -> None:
    """What deploycc.quant.cost says of TensorRT-RTX; where this fails, a newer one may fuse, and the estimate should say so."""
    codes, floats = (case.report(precision, AMPERE)["engines"][0]["counts"] for precision in ("int8", "fp16"))
    assert codes["conv_unfused"] == codes["conv_int8"] == 9
    assert "conv_unfused" not in floats
    assert codes["kernels"] > floats["kernels"]


class TestBudgets:
    def test_the_guard_tightens_until_the_bound_holds(self, case: Case) -> None:
        """Noise of single regions adds up only roughly, so the first plan may miss what the sum promised."""
        bound = 44
        report = case.report("mixed", "onnxruntime", budget=f"sqnr>={bound}dB", rounding="nearest", data=str(FASHION / "cnn.calib.npz"))
        rounds = report["guard"]
        assert 2 <= len(rounds) <= GUARD_ROUNDS
        assert [r["round"] for r in rounds] == list(range(1, len(rounds) + 1))
        for each in rounds[:-1]:
            assert each["missed"] == [f"SQNR is {each['sqnr_db']:.1f} dB, the budget asks for {bound} dB"]
        assert rounds[-1]["missed"] == []
        assert rounds[-1]["sqnr_db"] == report["verification"][0]["sqnr_db"] >= bound
        assert rounds[-1]["sqnr_db"] > rounds[0]["sqnr_db"]
        assert report["plan"]["regions"] == rounds[-1]["regions"]

    def test_a_bound_that_holds_needs_one_round(self, case: Case) -> None:
        report = case.report("mixed", "onnxruntime", budget="sqnr>=20dB,bits<=33")
        assert len(report["guard"]) == 1
        assert report["request"]["budget"] == "sqnr>=20dB,bits<=33"

    def test_a_missed_bound_keeps_the_directory(self, case: Case) -> None:
        request = case.request("int8", "onnxruntime", out="missed", budget="sqnr>=80dB")
        with pytest.raises(
            BudgetError, match=r"SQNR is \d+\.\d dB, the budget asks for 80 dB\. Where: --budget sqnr>=80dB\. Fix: .*missed/report\.md"
        ) as caught:
            build(request)
        assert caught.value.exit_code == 5
        assert is_build(case.folder / "missed")
        assert len(read(case.folder / "missed")["guard"]) == 1

    def test_bounds_that_fight_keep_the_last_round(self, case: Case) -> None:
        """The plan of the first round misses, and no tighter one has so few bits; what was built counts."""
        with pytest.raises(BudgetError, match=r"^SQNR is \d+\.\d dB, the budget asks for 35\.5 dB"):
            build(case.request("mixed", "onnxruntime", out="fight", budget="sqnr>=35.5dB,bits<=8.2", rounding="nearest"))
        report = read(case.folder / "fight")
        assert len(report["guard"]) == 1
        assert report["plan"]["average_bits"] <= 8.2

    def test_what_no_plan_can_meet_writes_nothing(self, case: Case) -> None:
        with pytest.raises(BudgetError, match=r"no plan reaches .* the least possible is"):
            build(case.request("mixed", "onnxruntime", out="impossible", budget="bits<=4"))
        assert not (case.folder / "impossible").exists()
        assert [p for p in case.folder.iterdir() if p.name.startswith(".")] == []

    def test_accuracy_may_be_bounded(self, case: Case) -> None:
        report = case.report("mixed", "onnxruntime", eval=str(case.labelled), budget="accuracy-drop<=5")
        assert report["accuracy"]["drop"] <= 5
        assert report["guard"][-1]["missed"] == []


class TestRefusals:
    def test_a_format_that_the_target_lacks_comes_first(self, case: Case) -> None:
        """X4: before the model is even read."""
        request = BuildRequest(Path("nowhere.onnx"), "fp8", targets=(AMPERE,), out=case.folder / "refused")
        with pytest.raises(UsageError, match=r"sm_80 has no FP8 units.* Where: --precision fp8 --target tensorrt-rtx:sm_80\.") as caught:
            build(request)
        assert caught.value.exit_code == 2
        assert not (case.folder / "refused").exists()

    @pytest.mark.parametrize("data", [None, "synthetic:8"])
    def test_strict_wants_real_data(self, case: Case, tmp_path: Path, data: str | None) -> None:
        shutil.copy(case.model, tmp_path / "m.onnx")
        request = BuildRequest(tmp_path / "m.onnx", "int8", data=data, targets=("onnxruntime",), strict=True, out=tmp_path / "out")
        with pytest.raises(
            UsageError, match=r"there is no calibration data\. Where: --strict\. Fix: give --data, or put m\.calib\.npz beside the model\."
        ):
            build(request)
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    def test_without_strict_synthetic_data_is_a_warning(self, case: Case, tmp_path: Path) -> None:
        shutil.copy(case.model, tmp_path / "m.onnx")
        report, _ = build(
            BuildRequest(tmp_path / "m.onnx", "int8", targets=("onnxruntime",), out=tmp_path / "out", shapes=("image=1:8:16",))
        )
        assert report.calibration["synthetic"]
        assert any("no calibration data: ranges come from 32 synthetic samples" in text for text in report.warnings)

    def test_a_directory_that_is_not_ours(self, case: Case, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(UsageError, match="is not empty and not a build directory"):
            build(BuildRequest(case.model, targets=("onnxruntime",), out=tmp_path))

    def test_a_model_that_overflows_fp16_everywhere(self, tmp_path: Path) -> None:
        """FP32 islands hold what is too large; where the output itself is, there is nothing to do."""
        text = (
            '<ir_version: 9, opset_import: ["": 20]> g (float[N,4] x) => (float[N,4] y) <float k = {300.0}> { a = Mul(x, k) y = Mul(a, a) }'
        )
        onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
        np.savez(tmp_path / "m.calib.npz", x=np.random.default_rng(0).uniform(1, 4, (8, 4)).astype(np.float32))
        report, _ = build(
            BuildRequest(tmp_path / "m.onnx", targets=("onnxruntime",), out=tmp_path / "out", precision="fp16", shapes=("x=1:4:8",))
        )
        assert report.verification[0]["finite"]
        assert report.plan["fp32_islands"] > 0


def test_an_old_build_is_replaced(case: Case) -> None:
    request = case.request("fp32", "onnxruntime", out="twice")
    build(request)
    before = (case.folder / "twice" / "model.onnx").stat().st_ino
    build(case.request("int8", "onnxruntime", out="twice"))
    assert (case.folder / "twice" / "model.onnx").stat().st_ino != before
    assert read(case.folder / "twice")["request"]["precision"] == "int8"
    assert [p for p in case.folder.iterdir() if p.name.startswith(".")] == []


def test_several_targets_share_a_model(case: Case) -> None:
    report, directory = build(case.request("fp16", AMPERE, "onnxruntime", out="several"))
    assert [e["target"] for e in report.engines] == [AMPERE, "onnxruntime"]
    assert set(report.regions[0]["realised"]) == {AMPERE, "onnxruntime"}
    assert len((directory / "engines" / "SHA256SUMS").read_text().splitlines()) == 2


class TestExplain:
    def test_everything(self, case: Case) -> None:
        lines = explain(case.built("int8", AMPERE), None).splitlines()
        assert len(lines) == 10
        assert lines[0] == "int8  conv           stem.0: --precision int8"

    @pytest.mark.parametrize("name", ["node_conv2d_2", "node_add_45", "stages.0.conv2"])
    def test_a_node_and_a_module(self, case: Case, name: str) -> None:
        text = explain(case.built("int8", AMPERE), name)
        assert "node_conv2d_2 (conv) computes in int8" in text
        assert "PyTorch: stages.0.conv2" in text
        assert "rule X3: One format per fusable region." in text
        assert f"{AMPERE}: int8 x int8 (ok)" in text

    def test_a_module_with_modules_inside(self, case: Case) -> None:
        text = explain(case.built("int8", AMPERE), "stages.1")
        assert [line.split()[0] for line in text.splitlines() if "computes in" in line] == [
            "node_conv2d_3",
            "node_conv2d_4",
            "node_conv2d_5",
        ]

    def test_what_each_format_would_cost(self, case: Case) -> None:
        assert "int8 alone: SQNR" in explain(case.built("mixed", ADA), "stages.0.conv1")

    def test_a_node_that_only_a_pass_knows(self, case: Case) -> None:
        report = case.report("int8", AMPERE)
        regions = {n for r in report["regions"] for n in r["nodes"]}
        anchor = next(r["anchor"] for p in report["passes"] for r in p["rewrites"] if r["anchor"] not in regions)
        assert "computes in" not in explain(case.built("int8", AMPERE), anchor)

    def test_an_unknown_name(self, case: Case) -> None:
        with pytest.raises(
            UsageError,
            match=r"no region or pass record mentions 'conv99'\. .*Fix: run `deploycc explain .*the first are stem\.0, stages\.0\.conv1",
        ):
            explain(case.built("int8", AMPERE), "conv99")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "deploycc.cli", *map(str, arguments)]


def test_a_format_that_no_region_takes_is_told(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    report, _ = build(BuildRequest(tmp_path / "m.onnx", precision="int8", targets=("onnxruntime",), out=tmp_path / "out"))
    assert "--precision int8 quantized nothing: every region computes in fp32; report.md names the rules" in report.warnings


class TestCommandLine:
    def test_quiet_and_exit_codes(self, case: Case) -> None:
        """One process that succeeds in silence, and one that misses its budget."""
        common = ("build", case.model, "--precision", "int8", "--target", "onnxruntime", "--shape", "image=1:8:16", "--quiet")
        done = subprocess.run(command(*common, "--out", case.folder / "quiet"), capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert is_build(case.folder / "quiet")
        missed = command(*common, "--out", case.folder / "quiet", "--budget", "sqnr>=90dB")
        done = subprocess.run(missed, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 5
        assert done.stderr.startswith("error: SQNR is")
        assert is_build(case.folder / "quiet")

    def test_an_interrupted_build_leaves_the_old_one(self, case: Case) -> None:
        out = case.folder / "interrupted"
        shutil.copytree(case.built("int8", AMPERE), out)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        options = {"--precision": "mixed", "--target": ADA, "--shape": "image=1:8:16", "--out": out, "--eval": case.labelled}
        arguments = ("build", case.model, *(part for pair in options.items() for part in pair))
        # A test run in the background of a shell ignores SIGINT, and its children with it; a user's terminal does not.
        process = subprocess.Popen(
            command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 100
            while not list(case.folder.glob(".interrupted.*")):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert errors.rstrip().endswith("interrupted: nothing was written")
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        assert list(case.folder.glob(".interrupted.*")) == []


class TestImages:
    """A directory of images, read as ``--config`` says."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        from PIL import Image

        with np.load(FASHION / "eval.npz") as data:
            for number, (image, label) in enumerate(zip(data["image"][:32], data["labels"][:32], strict=True)):
                place = tmp_path / "images" / str(label)
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.rint(image[0] * 255).astype(np.uint8)).save(place / f"{number:03}.png")
        return tmp_path / "images"

    def test_images_calibrate_and_evaluate(self, folder: Path, tmp_path: Path) -> None:
        config = tmp_path / "deploycc.toml"
        config.write_text('[preprocessing]\nsize = [28, 28]\nchannels = "L"\nscale = 0.00392156862745098\nmean = [0.0]\nstd = [1.0]\n')
        request = BuildRequest(
            FASHION / "cnn.onnx",
            precision="int8",
            data=str(folder),
            eval=str(folder),
            config=config,
            targets=("onnxruntime",),
            out=tmp_path / "out",
        )
        report, _ = build(request)
        assert report.calibration["samples"] == 32
        assert report.accuracy["fp32"] > 80

    def test_an_unknown_section_is_refused(self, folder: Path, tmp_path: Path) -> None:
        config = tmp_path / "deploycc.toml"
        config.write_text("[quantization]\nbits = 3\n")
        with pytest.raises(UsageError, match="'quantization', which nothing reads"):
            build(
                BuildRequest(
                    FASHION / "cnn.onnx", precision="int8", data=str(folder), config=config, targets=("onnxruntime",), out=tmp_path / "out"
                )
            )
