"""Print what ``deploycc lint`` finds in the output of other quantizers, as the page docs/lint_of_others.md.

    python benchmarks/lint_quantizers.py

Each quantizer that is installed quantizes the two examples with its defaults on the same 32 images; ONNX Runtime also with the
options that TensorRT needs. They are no dependencies of deploycc; the first lines of benchmarks/quantisers.py install them, and for Quark:

    pip install --no-deps amd-quark && pip install -c constraints.txt evaluate joblib onnxslim pandas plotly sentencepiece zstandard
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from quantisers import by_modelopt, by_nncf, by_onnxruntime, quiet, reader

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


def by_onnxruntime_for_tensorrt(source: Path, samples: np.ndarray, out: Path) -> None:
    """Quantize with the options that TensorRT needs: symmetric INT8, per channel, convolutions and products only, no biases."""
    from onnxruntime.quantization import QuantType

    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    by_onnxruntime(
        source, samples, out, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, per_channel=True,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"], extra_options=options,
    )  # fmt: skip


def by_modelopt_max(source: Path, samples: np.ndarray, out: Path) -> None:
    """Quantize by ModelOpt with the ranges' maxima."""
    by_modelopt(source, samples, out, calibration_method="max")


def by_quark(source: Path, samples: np.ndarray, out: Path) -> None:
    """Quantize by Quark's default INT8 configuration."""
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config.config import Config
    from quark.onnx.quantization.config.custom_config import get_default_config

    config = Config(global_quant_config=get_default_config("XINT8"))
    ModelQuantizer(config).quantize_model(str(source), str(out), reader(source, samples))


Quantizer = Callable[[Path, np.ndarray, Path], None]
QUANTIZERS: dict[str, tuple[str, Quantizer]] = {
    "ONNX Runtime, defaults": ("onnxruntime", by_onnxruntime),
    "ONNX Runtime, for TensorRT": ("onnxruntime", by_onnxruntime_for_tensorrt),
    "NNCF, defaults": ("nncf", by_nncf),
    "ModelOpt, INT8 max": ("nvidia-modelopt", by_modelopt_max),
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


def attempt(quantizer: Quantizer, source: Path, model: str, out: Path) -> str:
    """Quantize in a process of its own, since quantizers change what others import; return the name of the error, or nothing."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(quantize, quantizer, source, model, out).result()
        except Exception as error:
            return type(error).__name__
    return ""


def quantize(quantizer: Quantizer, source: Path, model: str, out: Path) -> None:
    """Quantize quietly: the other side of ``attempt``."""
    with quiet():
        quantizer(source, images(model), out)


def row(name: str, package: str, quantizer: Quantizer, model: str, folder: Path) -> str:
    """Quantize one example and return its row."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"| {name} | {model} | not installed | | | |"
    out, mended = folder / "quantized.onnx", folder / "mended.onnx"
    label, failure = model, attempt(quantizer, FASHION / f"{model}.onnx", model, out)
    if failure:
        label, failure = f"{model}, folded", attempt(quantizer, folded(model, folder), model, out)
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
