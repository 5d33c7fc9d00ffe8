"""Latency of engines on the GPU of this machine, and their distance from ONNX Runtime: one command, one table.

    python benchmarks/latency.py                              # the models of examples/fashion
    python benchmarks/latency.py --timm resnet50 deit_tiny_patch16_224 --batch 8

Every model is built in every precision that the GPU computes natively, with TensorRT where it imports, else with TensorRT-RTX.
A row gives the median and the 95th percentile of a run (copies to and from the host included), the SQNR of the engine's outputs
against the FP32 original in ONNX Runtime, and the speed relative to FP16. Random weights (timm) tell latency, not accuracy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deploycc import registry
from deploycc.backends.layers import module_of
from deploycc.backends.tensorrt import present_arch
from deploycc.core import child
from deploycc.core.data import open_data
from deploycc.core.errors import DeployccError
from deploycc.core.formats import FORMATS
from deploycc.core.shapes import profiles_for
from deploycc.core.target import Target, parse_target
from deploycc.interop import load_model
from deploycc.pipeline import build
from deploycc.request import BuildRequest
from deploycc.serve.golden import sqnr_db

FASHION = Path(__file__).parents[1] / "examples" / "fashion"
PRECISIONS = ("fp16", "int8", "fp8", "mixed")


def local_target() -> str:
    """Return the target of this machine's GPU; ends the program where there is none."""
    arch = present_arch()
    if arch is None:
        print("no GPU with a driver was found: latency is measured on a GPU only (deploycc profile --estimate needs none)", file=sys.stderr)
        sys.exit(4)
    backend = "tensorrt" if registry.backend("tensorrt").doctor().get("available") else "tensorrt-rtx"
    return str(parse_target(f"{backend}:sm_{arch}"))


def precisions_of(target: str) -> list[str]:
    """Return the precisions that ``target`` computes natively."""
    parsed: Target = parse_target(target)
    native = registry.backend(parsed.backend).formats(parsed)
    return [p for p in PRECISIONS if p == "mixed" or FORMATS[p] in native]


def export_timm(name: str, folder: Path, batch: int) -> Path:
    """Return the path of a timm model exported with random weights."""
    from deploycc.export import export

    return export(f"timm:{name}", folder / f"{name}.onnx", shapes=(f"image={batch}x3x224x224",))


def measure(model: Path, precision: str, target: str, batch: int, runs: int, folder: Path) -> dict[str, Any]:
    """Build, run and compare one engine."""
    out = folder / f"{model.stem}-{precision}"
    inputs = load_model(model).model.graph.inputs
    is_dynamic = any(not isinstance(d, int) for v in inputs for d in (v.shape or ()))
    shapes = tuple(f"{v.name}={batch}:{batch}:{batch}" for v in inputs) if is_dynamic else ()
    report, _ = build(BuildRequest(model, precision=precision, targets=(target,), shapes=shapes, out=out))
    profiles, _ = profiles_for(inputs, shapes)
    feeds = next(open_data(f"synthetic:{batch}", inputs, profiles, seed=0).batches(batch))
    original = registry.backend("onnxruntime").executor(load_model(model).model)(feeds)
    np.savez(folder / "feeds.npz", **dict[str, Any](feeds))
    engine = out / report.engines[0]["path"]
    paths = {"engine": str(engine), "feeds": str(folder / "feeds.npz"), "outputs": str(folder / "outputs.npz")}
    answer = child.call("deploycc.backends.layers:run_in_child", {"module": module_of(engine), "runs": runs, **paths}, timeout=600)
    with np.load(folder / "outputs.npz") as outputs:
        worst = min(sqnr_db(value, outputs[name]) for name, value in original.items())
    times = np.array(answer["milliseconds"])
    figures = {"median": float(np.median(times)), "p95": float(np.quantile(times, 0.95)), "sqnr": worst}
    return {**figures, "device": answer["device"], "bytes": report.engines[0]["bytes"], "bits": report.plan["average_bits"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", nargs="*", default=[], metavar="NAME", help="timm models with random weights, besides the examples")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    target = local_target()
    table = Table("model", "precision", "median ms", "95 % ms", "vs FP16", "SQNR dB", "bits/weight", "engine MB")
    device = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [FASHION / "cnn.onnx", FASHION / "vit.onnx", *(export_timm(n, folder, given.batch) for n in given.timm)]
        for model in models:
            base = 0.0
            for precision in precisions_of(target):
                try:
                    found = measure(model, precision, target, given.batch, given.runs, folder)
                except (DeployccError, child.ChildError) as error:
                    table.add_row(model.stem, precision, "failed", *([""] * 4), str(error).split(". ")[0][:60])
                    continue
                device, base = found["device"], found["median"] if precision == "fp16" else base
                speed = f"{base / found['median']:.2f}x" if base else ""
                cells = (f"{found['median']:.3f}", f"{found['p95']:.3f}", speed, f"{found['sqnr']:.1f}", f"{found['bits']:.1f}")
                table.add_row(model.stem, precision, *cells, f"{found['bytes'] / 1e6:.2f}")
    table.title = f"{target} on {device}, batch {given.batch}, {given.runs} runs"
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
