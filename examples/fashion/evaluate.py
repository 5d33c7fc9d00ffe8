"""Print the accuracy of the Fashion-MNIST models in every precision, and what their engines compute in.

    python examples/fashion/evaluate.py                 # both models, engines for sm_80, sm_89 and sm_120
    python examples/fashion/evaluate.py vit --fp32      # the FP32 accuracy of one model alone

Every row comes from one ``deploycc`` build on the full test split of 10,000 images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploycc.pipeline import build
from deploycc.request import BuildRequest

HERE = Path(__file__).parent
ENGINES = {
    "fp32": ("tensorrt-rtx:sm_80",),
    "fp16": ("tensorrt-rtx:sm_80", "tensorrt-rtx:sm_89", "tensorrt-rtx:sm_120"),
    "int8": ("tensorrt-rtx:sm_80", "tensorrt-rtx:sm_89", "tensorrt-rtx:sm_120"),
    "fp8": ("tensorrt-rtx:sm_89", "tensorrt-rtx:sm_120"),
    "mixed": ("tensorrt-rtx:sm_80", "tensorrt-rtx:sm_89", "tensorrt-rtx:sm_120"),
}


def rows(model: str, precisions: list[str], folder: Path) -> list[list[str]]:
    """Build ``model`` in each precision and return the cells of its table rows."""
    found = []
    for precision in precisions:
        request = BuildRequest(
            HERE / f"{model}.onnx",
            precision=precision,
            eval=str(HERE / "eval.npz"),
            targets=ENGINES[precision],
            out=folder / f"{model}-{precision}",
        )
        report, _ = build(request)
        score, output = report.accuracy, report.verification[0]
        engines = "; ".join(
            f"{e['target'].split(':')[1]} {e['bytes'] / 1e6:.2f} MB" + (f", {e['fused_attention']} MHA" if e["fused_attention"] else "")
            for e in report.engines
        )
        found.append(
            [
                model,
                precision,
                f"{score['fp32']:.2f}",
                f"{score['built']:.2f}",
                f"{output['sqnr_db']:.1f}",
                f"{report.plan['average_bits']:.2f}",
                ", ".join(f"{n} {f}" for f, n in report.plan["regions"].items()),
                engines,
            ]
        )
    return found


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["vit", "cnn"], help="vit, cnn")
    parser.add_argument("--fp32", action="store_true", help="only the FP32 accuracy")
    arguments = parser.parse_args()
    table = Table("model", "precision", "FP32 %", "built %", "SQNR dB", "bits/weight", "regions", "engines")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            for row in rows(model, ["fp32"] if arguments.fp32 else list(ENGINES), Path(folder)):
                table.add_row(*row)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
