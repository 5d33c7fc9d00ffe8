"""Canonical passes against other simplifiers: nodes, seconds, ONNX Runtime latency and error, in one run.

    pip install --no-deps onnxsim onnxslim
    python benchmarks/simplify.py                              # every network below
    python benchmarks/simplify.py timm:repvgg_a0 --rounds 20

Networks are timm definitions with random weights and randomised BatchNormalization statistics, raw-exported (``optimize=False``)
with a dynamic batch. ``nodes`` counts what remains; ``read`` and ``simplify`` are processor seconds, the least of three rounds, which
other work on the machine hardly changes; ``error`` is the largest relative difference of the outputs against the raw export; ``ms`` is
the median latency of one image in ONNX Runtime on the CPU; ``MMAC`` counts convolutions and matrix products.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from deploycc import registry
from deploycc.core.contract import CANONICAL
from deploycc.core.passes import run
from deploycc.export import declare_torchvision_operators
from deploycc.interop import load_model, to_proto
from deploycc.quant.regions import partition

NETWORKS = (
    "repvgg_a0",
    "mobileone_s0",
    "resnet34",
    "resnet50",
    "mobilenetv2_100",
    "convnext_tiny",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)


def raw_export(name: str, folder: Path) -> Path:
    """Export a timm network in training form with randomised statistics, and return the file."""
    declare_torchvision_operators()
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name.removeprefix("timm:"), pretrained=False).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = {0: torch.export.Dim("batch", min=1, max=16)}
        program = torch.onnx.export(
            network, (torch.zeros(2, 3, 224, 224),), dynamo=True, optimize=False, verbose=False, opset_version=20,
            input_names=["image"], output_names=["logits"], dynamic_shapes=(shape,),
        )  # fmt: skip
    if program is None:
        raise RuntimeError(f"{name} was not exported")
    program.save(path)
    return path


def deploycc_passes(model: ir.Model) -> ir.Model:
    """Run the canonical passes."""
    return run(model, [cls() for _, cls in registry.passes("canonicalize")], contract=CANONICAL)[0]


def onnxsim_simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run onnxsim."""
    import onnxsim

    simplified: onnx.ModelProto = onnxsim.simplify(model)[0]
    return simplified


def onnxslim_slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run onnxslim."""
    import onnxslim

    slim: onnx.ModelProto = onnxslim.slim(model)
    return slim


def onnxscript_optimize(model: ir.Model) -> ir.Model:
    """Run onnxscript's optimiser."""
    from onnxscript import optimizer

    optimizer.optimize_ir(model)
    return model


# How each tool reads a file, and what it does with it. deploycc's reading includes its admission: the checker and shape inference in a
# process of their own, one opset, inlined functions and unique names.
TOOLS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Any]]] = {
    "raw": (onnx.load, lambda model: model),
    "deploycc": (lambda path: load_model(path).model, deploycc_passes),
    "onnxsim": (onnx.load, onnxsim_simplify),
    "onnxslim": (onnx.load, onnxslim_slim),
    "onnxscript": (ir.load, onnxscript_optimize),
}


def cpu_seconds() -> float:
    """Return the processor time of this process and of its finished children."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


def timed(path: Path, tool: str, rounds: int) -> tuple[onnx.ModelProto, float, float]:
    """Return the result of a tool and the least processor seconds of reading and of simplifying over some rounds."""
    read, simplify = TOOLS[tool]
    reading, simplifying = [], []
    model: Any = None
    for _ in range(rounds):
        start = cpu_seconds()
        given = read(path)
        middle = cpu_seconds()
        model = simplify(given)
        reading.append(middle - start)
        simplifying.append(cpu_seconds() - middle)
    return (model if isinstance(model, onnx.ModelProto) else to_proto(model)), min(reading), min(simplifying)


def session(model: onnx.ModelProto, *, optimise: bool) -> onnxruntime.InferenceSession:
    """Return a session, with or without the runtime's own optimisation."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def latency(model: onnx.ModelProto, rounds: int) -> float:
    """Return the median milliseconds of one image."""
    execute, image = session(model, optimise=True), np.zeros((1, 3, 224, 224), np.float32)
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        execute.run(None, {"image": image})
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:])


def error(raw: onnx.ModelProto, model: onnx.ModelProto) -> float:
    """Return the largest relative difference over batches of one and three."""
    worst, draw = 0.0, np.random.default_rng(0)
    one, other = session(raw, optimise=False), session(model, optimise=False)
    for batch in (1, 3):
        feeds = {"image": draw.standard_normal((batch, 3, 224, 224)).astype(np.float32)}
        for expected, found in zip(one.run(None, feeds), other.run(None, feeds), strict=True):
            worst = max(worst, float(np.abs(expected - found).max() / np.abs(expected).max()))
    return worst


def main() -> None:
    """Print one row per network and tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    table = Table("network", "tool", "nodes", "read s", "simplify s", "MMAC", "ms", "error")
    with tempfile.TemporaryDirectory() as name:
        for network in arguments.networks:
            path = raw_export(network, Path(name))
            raw = onnx.load(path)
            for tool in TOOLS:
                model, reading, simplifying = timed(path, tool, 3)
                macs = sum(r.macs for r in partition(ir.from_proto(onnx.shape_inference.infer_shapes(model)))) / 1e6
                cells = [f"{macs:.0f}", f"{latency(model, arguments.rounds):.1f}", f"{error(raw, model):.1e}"]
                table.add_row(network, tool, str(len(model.graph.node)), f"{reading:.2f}", f"{simplifying:.2f}", *cells)
            table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
