"""What rescaling normalizations and rounding weights together bring, alone and both: SQNR and accuracy of INT8 on held-out data.

    python benchmarks/int8.py                                                   # the models of examples/
    python benchmarks/int8.py --planted      # the transformers with the outliers that benchmarks/lrp_qvit.py plants
    python benchmarks/int8.py model.onnx --data calib.npz --eval test.npz --precisions int8 fp8 mixed

SQNR is that of 128 held-out samples against the FP32 original, accuracy that of ``--images`` labelled ones. Seconds are those of the two
steps, rescaling and rounding, in the build.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import lrp_qvit
import numpy as np
from rich.console import Console
from rich.table import Table

from deploycc.interop import save_model

ROOT = Path(__file__).parent.parent
EVALUATION = ROOT / "examples/fashion/eval.npz"


def calibration_of(model: Path) -> Path:
    """Return the data beside a model, or that of the example whose images the models of examples/ share."""
    beside = model.with_suffix(".calib.npz")
    return beside if beside.exists() else ROOT / "examples/fashion/vit.calib.npz"


def planted(folder: Path) -> list[Path]:
    """Write the transformers of examples/ with outlier channels behind every normalization, the same functions; return the files."""
    found = []
    for name in lrp_qvit.MODELS:
        found.append(folder / f"{name}-planted.onnx")
        save_model(lrp_qvit.subject(name, 1, planted=True).canonical.model, found[-1])
    return found


def fewer(path: Path, images: int, folder: Path) -> Path:
    """Write the first images and labels of a file to another."""
    with np.load(path) as arrays:
        np.savez(folder / "eval.npz", **{name: arrays[name][:images] for name in arrays.files})
    return folder / "eval.npz"


def main() -> None:
    """Build each variant and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--eval", type=Path, default=EVALUATION)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--precisions", nargs="+", default=["int8", "fp8"])
    parser.add_argument("--target", default="tensorrt-rtx:sm_89")
    arguments = parser.parse_args()
    shipped = [
        ROOT / "examples/fashion/vit.onnx",
        ROOT / "examples/fashion/cnn.onnx",
        *sorted(ROOT.glob("examples/vision_transformers/*.onnx")),
    ]
    table = Table("model", "precision", "rescale", "rounding", "SQNR dB", "FP32 %", "built %", "rescale s", "quantize s")
    with tempfile.TemporaryDirectory() as name:
        labelled = fewer(arguments.eval, arguments.images, Path(name))
        for model in arguments.models or (planted(Path(name)) if arguments.planted else shipped):
            for precision, rescale, rounding in itertools.product(arguments.precisions, ("off", "auto"), ("nearest", "auto")):
                if precision == "fp8" and rescale == "auto":
                    continue  # FP8 has a floating step, and nothing is rescaled for it.
                out = Path(name) / "out"
                command = [
                    sys.executable,
                    "-m",
                    "deploycc.cli",
                    "build",
                    str(model),
                    "--precision",
                    precision,
                    "--quiet",
                    "--out",
                    str(out),
                ]
                command += ["--data", str(arguments.data or calibration_of(model)), "--eval", str(labelled), "--target", arguments.target]
                subprocess.run([*command, "--rescale", rescale, "--rounding", rounding], check=True, stderr=subprocess.DEVNULL)
                r = json.loads((out / "report.json").read_text())
                figures = [f"{r['verification'][0]['sqnr_db']:.1f}", f"{r['accuracy']['fp32']:.2f}", f"{r['accuracy']['built']:.2f}"]
                times = [f"{r['seconds'].get(stage, 0.0):.1f}" for stage in ("rescale", "quantize")]
                table.add_row(model.stem, precision, rescale, rounding, *figures, *times)
            table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
