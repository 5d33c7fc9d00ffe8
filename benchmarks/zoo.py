"""Standard networks end to end: export, engines in every format for three architectures, lint, time, memory, SQNR.

    pip install -c constraints.txt -e ".[test]"
    python benchmarks/zoo.py                                  # all five models, some 40 minutes on two cores
    python benchmarks/zoo.py deit_tiny_patch16_224 --precisions int8
    python benchmarks/zoo.py examples/fashion/vit.onnx --precisions int8,fp8,mixed      # files instead of names of timm

FP8 is built from sm_89 on. ``lint`` counts errors and warnings of ``deploycc lint`` on the built model, for each target.
Weights are random, so the SQNR compares the built model with its own FP32 original; calibration is synthetic. ``calib/fwd`` is the
time of calibration over that of plain ONNX Runtime forward passes of the same graph on the same samples, in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

MODELS = ("resnet50", "mobilenetv2_100", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny")
TARGETS = ("tensorrt-rtx:sm_80", "tensorrt-rtx:sm_89", "tensorrt-rtx:sm_120")
FORWARD = """
import sys, time
from pathlib import Path
from deploycc import registry
from deploycc.core.contract import CANONICAL
from deploycc.core.data import open_data
from deploycc.core.passes import run
from deploycc.core.shapes import profiles_for
from deploycc.interop import load_model
model = load_model(Path(sys.argv[1])).model
canonical, _ = run(model, [cls() for _, cls in registry.passes("canonicalize")], contract=CANONICAL)
profiles, _ = profiles_for(model.graph.inputs, [])
data = open_data(sys.argv[2], model.graph.inputs, profiles, seed=0)
execute = registry.backend("onnxruntime").executor(canonical)
start = time.perf_counter()
for feeds in data.batches(8):
    execute(feeds)
print(time.perf_counter() - start)
"""


def command(*words: str) -> str:
    """Run Python on ``words`` and return its output."""
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout


def targets_of(precision: str) -> tuple[str, ...]:
    """Return the targets that compute in ``precision``."""
    return TARGETS[1:] if precision == "fp8" else TARGETS


def lint(model: Path, precision: str) -> str:
    """Return the errors and warnings of the linter, over all targets."""
    counts = []
    for target in targets_of(precision):
        words = [sys.executable, "-m", "deploycc.cli", "lint", str(model), "--target", target, "--json"]
        counts.append(json.loads(subprocess.run(words, check=False, capture_output=True, text=True).stdout)["count"])
    return "/".join(str(sum(count[kind] for count in counts)) for kind in ("error", "warning"))


def build(model: Path, precision: str, data: str, out: Path) -> tuple[dict, float]:  # type: ignore[type-arg]
    """Build one model and return its report and the seconds of the whole command."""
    start = time.perf_counter()
    targets = [word for target in targets_of(precision) for word in ("--target", target)]
    command("-m", "deploycc.cli", "build", str(model), "--precision", precision, "--data", data, "--out", str(out), "--quiet", *targets)
    return json.loads((out / "report.json").read_text()), time.perf_counter() - start


def main() -> None:
    """Print one row per model and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--precisions", default="fp16,int8,mixed")
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    head = "model precision regions bits SQNR_dB estimated_latency lint MHA mismatches warnings"
    table = Table(*head.split(), *["command_s", "calibration_s", "calib/fwd", "score_s", "engines_s", "peak_MB"])
    with tempfile.TemporaryDirectory() as name:
        for model in arguments.models:
            path, data = Path(name, f"{model}.onnx"), f"synthetic:{arguments.samples}"
            if Path(model).exists():
                path, model = Path(model), Path(model).stem
            else:
                command("-m", "deploycc.cli", "export", f"timm:{model}", "--out", str(path))
            forward = float(command("-c", FORWARD, str(path), data))
            for precision in arguments.precisions.split(","):
                out = Path(name, f"{model}-{precision}")
                report, seconds = build(path, precision, data, out)
                table.add_row(model, precision, *_cells(report, seconds, forward, lint(out / "model.onnx", precision)))
                Console(width=220).print(table)


def _cells(report: dict, seconds: float, forward: float, findings: str) -> list[str]:  # type: ignore[type-arg]
    stages, calibration = report["seconds"], report["calibration"]["seconds"]
    mismatches = sum(f["verdict"] == "mismatch" for g in report["regions"] for f in g["realised"].values())
    return [
        ", ".join(f"{n} {f}" for f, n in report["plan"]["regions"].items()),
        f"{report['plan']['average_bits']:.2f}",
        f"{report['verification'][0]['sqnr_db']:.1f}",
        f"{report['plan']['estimated_latency_ratio']:.3f}",
        findings,
        "/".join(str(e["fused_attention"]) for e in report["engines"]),
        str(mismatches),
        str(len(report["warnings"])),
        f"{seconds:.0f}",
        f"{calibration:.1f}",
        f"{calibration / forward:.2f}" if calibration else "",
        f"{stages.get('score', 0.0):.0f}",
        f"{sum(v for k, v in stages.items() if k.startswith('build ')):.0f}",
        f"{report['peak_rss_mb']:.0f}",
    ]


if __name__ == "__main__":
    main()
