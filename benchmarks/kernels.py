"""How many kernels TensorRT-RTX launches per format, and how many the cost model expects.

    python benchmarks/kernels.py                                        # the trained examples, a minute on two cores
    python benchmarks/kernels.py resnet50.onnx --target tensorrt-rtx:sm_120

The counts are read from the engines' own listings, so they need no GPU. Expected are those of FP16, one behind each product of codes, and
one for each conversion between regions: what ``deploycc.quant.cost`` says (docs/adr/0008-conversions-cost-kernels.md). Calibration is
synthetic and short, since ranges do not matter here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FASHION = Path(__file__).parent.parent / "examples" / "fashion"
PLAIN = ("--rescale", "off", "--rounding", "nearest", "--calibration", "minmax", "--data", "synthetic:4")
CODES = ("int8", "fp8")


def built(model: Path, precision: str, target: str, folder: Path) -> dict[str, Any]:
    """Build ``model`` and return the report."""
    out = folder / precision
    words = ["build", str(model), "--precision", precision, "--target", target, "--out", str(out), "--quiet", *PLAIN]
    subprocess.run([sys.executable, "-m", "deploycc.cli", *words], check=True, capture_output=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def extra(report: dict[str, Any]) -> int:
    """Return the kernels that the cost model expects beyond those of FP16."""
    behind = sum(1 for r in report["regions"] if r["format"] in CODES and r["kind"] != "attention")
    return behind + len(report["plan"]["conversions"])


def row(model: Path, report: dict[str, Any], floats: int) -> str:
    """Return the line of one build."""
    counts, plan = report["engines"][0]["counts"], report["plan"]
    convolutions = sum(int(n) for label, n in counts.items() if label.removeprefix("de") in ("conv_int8", "conv_fp8"))
    expected, unfused = floats + extra(report), f"{counts.get('conv_unfused', 0)} of {convolutions}"
    name, precision = model.stem.split(".")[0], report["request"]["precision"]
    return f"| {name} | {precision} | {counts['kernels']} | {expected} | {unfused} | {plan['estimated_latency_ratio']:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, default=[FASHION / "cnn.onnx", FASHION / "vit.onnx"])
    parser.add_argument("--precisions", default=",".join(CODES), help="formats beside fp16; mixed takes longer, since regions are scored")
    parser.add_argument("--target", default="tensorrt-rtx:sm_89")
    arguments = parser.parse_args()
    print("| model | format | kernels | expected | convolutions of codes that write FP32 | estimated latency / fp16 |")
    print("|---|---|---|---|---|---|")
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            floats = 0
            for precision in ("fp16", *arguments.precisions.split(",")):
                report = built(model, precision, arguments.target, Path(folder))
                floats = floats or report["engines"][0]["counts"]["kernels"]
                print(row(model, report, floats), flush=True)


if __name__ == "__main__":
    main()
