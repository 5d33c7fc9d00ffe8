"""How many kernels TensorRT-RTX launches per format, and behind how many convolutions of codes it runs one of its own.

    python benchmarks/kernels.py                                   # the trained examples, half a minute on two cores
    python benchmarks/kernels.py resnet50.onnx --target tensorrt-rtx:sm_120

The counts are read from the engines' own listings, so they need no GPU. They are what ``deploycc.quant.cost`` estimates by
(docs/adr/0008-conversions-cost-kernels.md). Ranges do not matter here: calibration is synthetic and short.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

FASHION = Path(__file__).parent.parent / "examples" / "fashion"
PLAIN = ("--rescale", "off", "--rounding", "nearest", "--calibration", "minmax", "--data", "synthetic:4")


def counts(model: Path, precision: str, target: str, folder: Path) -> dict[str, float]:
    """Build ``model`` and return the counts of its engine, with the estimated latency as a share of FP16's."""
    out = folder / precision
    words = ["build", str(model), "--precision", precision, "--target", target, "--out", str(out), "--quiet", *PLAIN]
    subprocess.run([sys.executable, "-m", "deploycc.cli", *words], check=True, capture_output=True)
    report = json.loads((out / "report.json").read_text())
    return {**report["engines"][0]["counts"], "estimate": report["plan"]["estimated_latency_ratio"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, default=[FASHION / "cnn.onnx", FASHION / "vit.onnx"])
    parser.add_argument("--target", default="tensorrt-rtx:sm_89")
    arguments = parser.parse_args()
    print("| model | format | kernels | convolutions of codes that write FP32 | estimated latency / fp16 |\n|---|---|---|---|---|")
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            for precision in ("fp16", "int8", "fp8"):
                found = counts(model, precision, arguments.target, Path(folder))
                convolutions = sum(int(n) for label, n in found.items() if label.startswith("conv_") and label.endswith(("int8", "fp8")))
                unfused = f"{found.get('conv_unfused', 0)} of {convolutions}"
                print(
                    f"| {model.stem.split('.')[0]} | {precision} | {found['kernels']} | {unfused} | {found['estimate']:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
