"""Print what ``deploycc lint`` finds in the output of other quantizers, as the page docs/lint_of_others.md.

    python benchmarks/lint_quantizers.py

Each quantizer that is installed quantizes the two examples with its defaults on the same 32 images; ONNX Runtime also with the
options that TensorRT needs. They are no dependencies of deploycc: install those that are wanted beside it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.lint.linting import Inspection, fix, lint
from deploycc.pipeline import build
from deploycc.request import BuildRequest

FASHION = Path(__file__).parent.parent / "examples" / "fashion"
SAMPLES = 32
INTRODUCTION = """# What the lint finds in files of other quantizers

Both examples, quantized to INT8 on the same {samples} images; this page is made by `python benchmarks/lint_quantizers.py`. A rule
stands with the number of its findings; [lint.md](lint.md) says what each rule asks. The last two columns say what is left after
`--fix`. Where a quantizer fails on the exported model, it gets the one that the exact passes of
`deploycc build --precision fp32` leave ("folded").
"""


def images(model: str) -> np.ndarray:
    """Return calibration images ``[32, 1, 28, 28]``."""
    with np.load(FASHION / f"{model}.calib.npz") as data:
        return np.asarray(data["image"][:SAMPLES])


def by_onnxruntime(source: Path, model: str, out: Path, **options: Any) -> None:
    """Quantize by ``onnxruntime.quantization.quantize_static``."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = iter([{"image": image[None]} for image in images(model)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    quantize_static(source, out, Reader(), **options)


def by_onnxruntime_for_tensorrt(source: Path, model: str, out: Path) -> None:
    """Quantize with the options that TensorRT needs: symmetric INT8, per channel, convolutions and products only, no biases."""
    from onnxruntime.quantization import QuantType

    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    by_onnxruntime(
        source, model, out, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, per_channel=True,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"], extra_options=options,
    )  # fmt: skip


def by_nncf(source: Path, model: str, out: Path) -> None:
    """Quantize by ``nncf.quantize``."""
    import nncf
    import onnx

    data = nncf.Dataset(images(model), lambda image: {"image": image[None]})
    onnx.save(nncf.quantize(onnx.load(source), data, subset_size=SAMPLES), out)


def by_modelopt(source: Path, model: str, out: Path) -> None:
    """Quantize by ``modelopt.onnx.quantization.quantize``; it would overwrite its input, so it gets a copy."""
    from modelopt.onnx.quantization import quantize

    copy = out.with_name("input.onnx")
    copy.write_bytes(source.read_bytes())
    quantize(onnx_path=str(copy), quantize_mode="int8", calibration_data={"image": images(model)}, calibration_method="max",
             calibration_eps=["cpu"], output_path=str(out), log_level="ERROR")  # fmt: skip


def by_quark(source: Path, model: str, out: Path) -> None:
    """Quantize by Quark's default INT8 configuration."""
    from onnxruntime.quantization import CalibrationDataReader
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config.config import Config
    from quark.onnx.quantization.config.custom_config import get_default_config

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = iter([{"image": image[None]} for image in images(model)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    config = Config(global_quant_config=get_default_config("XINT8"))
    ModelQuantizer(config).quantize_model(str(source), str(out), Reader())


QUANTIZERS: dict[str, tuple[str, Callable[[Path, str, Path], None]]] = {
    "ONNX Runtime, defaults": ("onnxruntime", by_onnxruntime),
    "ONNX Runtime, for TensorRT": ("onnxruntime", by_onnxruntime_for_tensorrt),
    "NNCF, defaults": ("nncf", by_nncf),
    "ModelOpt, INT8 max": ("nvidia-modelopt", by_modelopt),
    "Quark, XINT8": ("amd-quark", by_quark),
}


def counted(found: Inspection, severity: str) -> str:
    """Return the rules of one severity with the number of findings, the most frequent first."""
    rules = Counter(f.rule for f in found.findings if f.severity == severity)
    return ", ".join(f"{rule} {count}" for rule, count in rules.most_common()) or "none"


def folded(model: str, folder: Path) -> Path:
    """Return the model as the exact passes leave it, for quantizers that fail on what the exporter writes."""
    request = BuildRequest(FASHION / f"{model}.onnx", "fp32", targets=("onnxruntime",), out=folder / "folded", shapes=("image=1:8:8",))
    return build(request)[1] / "model.onnx"


def _attempt(quantizer: Callable[[Path, str, Path], None], source: Path, model: str, out: Path) -> str:
    """Quantize quietly; return the name of the error, or an empty string."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantizer(source, model, out)
    except Exception as error:
        return type(error).__name__
    return ""


def row(name: str, package: str, quantizer: Callable[[Path, str, Path], None], model: str, folder: Path) -> str:
    """Quantize one example and return its row."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"| {name} | {model} | not installed | | | |"
    out, mended = folder / "quantized.onnx", folder / "mended.onnx"
    label, failure = model, _attempt(quantizer, FASHION / f"{model}.onnx", model, out)
    if failure:
        label, failure = f"{model}, folded", _attempt(quantizer, folded(model, folder), model, out)
    if failure:
        return f"| {name} {found} | {model} | fails: {failure} | | | |"
    before, after = lint(out), fix(out, mended)
    left = f"{counted(after, 'error')} | {after.count()['warning']}"
    return f"| {name} {found} | {label} | {counted(before, 'error')} | {counted(before, 'warning')} | {left} |"


def main() -> None:
    """Print the page."""
    logging.disable(logging.CRITICAL)
    print(INTRODUCTION.format(samples=SAMPLES))
    print("| quantizer | model | errors | warnings | errors after `--fix` | warnings after `--fix` |\n|---|---|---|---|---|---|")
    for name, (package, quantizer) in QUANTIZERS.items():
        for model in ("cnn", "vit"):
            with tempfile.TemporaryDirectory() as folder:
                print(row(name, package, quantizer, model, Path(folder)), flush=True)
    print(f"\nPython {sys.version.split()[0]}. Quantizers that fail on a model say so.")


if __name__ == "__main__":
    main()
