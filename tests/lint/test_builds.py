"""What deploycc builds is clean; what ONNX Runtime's quantizer writes is not, and --fix mends what it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_graphs import compute

from deploycc.interop.inspecting import read_model
from deploycc.lint.linting import Inspection, fix, lint
from deploycc.pipeline import build
from deploycc.request import BuildRequest

FASHION = Path(__file__).parent.parent.parent / "examples" / "fashion"
SAMPLES = 8


def clean(found: Inspection) -> list[str]:
    """Return errors and warnings in one line each."""
    return [f"{f.rule} {f.node}: {f.what}" for f in found.findings if f.severity != "note"]


def built(folder: Path, model: str, precision: str, target: str = "onnxruntime") -> Path:
    """Build an example on a few samples."""
    data = folder / "few.npz"
    with np.load(FASHION / f"{model}.calib.npz") as calibration:
        np.savez(data, image=calibration["image"][:SAMPLES])
    request = BuildRequest(
        FASHION / f"{model}.onnx", precision, data=str(data), targets=(target,), out=folder / "built", shapes=("image=1:4:8",)
    )
    return build(request)[1] / "model.onnx"


@pytest.mark.parametrize(
    ("model", "precision"),
    [("cnn", "int8"), ("vit", "fp8"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("cnn", "fp8"), ("vit", "int8")))],
)
def test_our_builds_are_clean(tmp_path: Path, model: str, precision: str) -> None:
    found = lint(built(tmp_path, model, precision), target="tensorrt-rtx:sm_89")
    assert clean(found) == []
    assert found.pairs > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tensorrt-rtx:sm_80", "tensorrt-rtx:sm_89", "tensorrt-rtx:sm_120"])
@pytest.mark.parametrize("model", ["cnn", "vit"])
def test_mixed_builds_are_clean(tmp_path: Path, model: str, target: str) -> None:
    assert clean(lint(built(tmp_path, model, "mixed", target), target=target)) == []


def quantized_by_onnxruntime(folder: Path, model: str, **options: Any) -> Path:
    """Return an example quantized by ONNX Runtime's quantize_static."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            with np.load(FASHION / f"{model}.calib.npz") as calibration:
                self.samples = iter([{"image": calibration["image"][i : i + 1]} for i in range(SAMPLES)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    out = folder / f"{model}.onnx"
    quantize_static(FASHION / f"{model}.onnx", out, Reader(), **options)
    return out


def rules(found: Inspection, severity: str) -> set[str]:
    """Return the rules of the findings of one severity."""
    return {f.rule for f in found.findings if f.severity == severity}


def test_the_defaults_of_onnxruntime_are_asymmetric_and_quantize_biases(tmp_path: Path) -> None:
    found = lint(quantized_by_onnxruntime(tmp_path, "vit"))
    assert found.exit_code == 1
    assert rules(found, "error") == {"R1", "R8", "R12"}
    # Everything is quantized: softmax and norms, scores, GELU, constants, outputs, joint projections.
    assert {"P3", "P12", "P15", "P16", "S9", "F5", "T3"} <= rules(found, "warning")
    head = next(f for f in found.findings if f.rule == "S1")
    assert (head.torch, head.operator) == ("head", "Gemm")


def test_symmetric_files_of_onnxruntime_are_mended(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType

    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "AddQDQPairToWeight": True, "DedicatedQDQPair": True}
    path = quantized_by_onnxruntime(
        tmp_path, "cnn", activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, per_channel=True, extra_options=options
    )
    before, out = lint(path), tmp_path / "mended.onnx"
    assert rules(before, "error") == {"R12"}
    assert {"R13"} == rules(before, "note") - {"S8", "X2"}
    after = fix(path, out)
    assert (after.exit_code, rules(lint(out), "error")) == (0, set())
    assert {"P9", "P14", "P15"} & rules(after, "warning") == set()
    assert out.stat().st_size < path.stat().st_size / 2
    image = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    one, other = compute(read_model(path), image=image), compute(read_model(out), image=image)
    assert np.array_equal(one["logits"], other["logits"])


def test_the_options_for_tensorrt_leave_no_error(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType

    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    path = quantized_by_onnxruntime(
        tmp_path, "vit", activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, per_channel=True,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"], extra_options=options,
    )  # fmt: skip
    found = lint(path)
    assert found.exit_code == 0
    # The quantizer also writes pairs at outputs: before BatchNormalization, softmax, and at the logits.
    assert {"P2", "P3", "P16", "S9", "F5"} <= rules(found, "warning")
