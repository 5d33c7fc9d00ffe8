"""Cost of relevance: its time against a plain forward pass of the same batch, and the peak memory of a run; and its plot.

    pip install -c constraints.txt -e ".[test]"
    python benchmarks/relevance.py timm:vit_base_patch16_224 timm:deit_tiny_patch16_224 timm:resnet18 --samples 32
    python benchmarks/relevance.py examples/fashion/vit.onnx --data examples/fashion/vit.calib.npz --plot docs/relevance_vit.svg

``forward`` executes the canonical graph in torch without recording, ``sweep`` is one forward and one backward walk with gradients and
relevance; both take the same batch, in seconds of processor time, the least of three. ``peak`` is the resident memory of a process of
its own that loads the canonical graph and scores all samples; ``start`` is what it held before the first one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table

from deploycc import registry
from deploycc.backends.memory import peak_rss_mb
from deploycc.core.contract import CANONICAL
from deploycc.core.data import Dataset, open_data
from deploycc.core.passes import run
from deploycc.core.shapes import profiles_for
from deploycc.export import export
from deploycc.interop import load_model, save_model
from deploycc.quant.lrp.program import Program
from deploycc.quant.lrp.rules import propagator, ruled_functions
from deploycc.quant.lrp.scoring import batch_of
from deploycc.quant.lrp.tape import record, walk
from deploycc.quant.lrp.targets import chosen, explained_values, seeds
from deploycc.quant.regions import partition
from deploycc.quant.relevance import MEMORY, Relevance, measure_relevance

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycc.core.backend import Feeds

REPEATS = 3
COLOURS = {
    "conv": "#666666",
    "qkv": "#1b6ca8",
    "matmul1": "#6aaed6",
    "matmul2": "#9ecae1",
    "proj": "#e6872e",
    "fc1": "#2e8b57",
    "fc2": "#8fce8f",
}


def canonical(source: str, folder: Path) -> Path:
    """Write the canonical graph of an ONNX file, or of a timm model, and return its path."""
    path = export(source, folder / "model.onnx") if ":" in source else Path(source)
    passes = [cls() for phase in ("canonicalize", "prepare") for _, cls in registry.passes(phase)]
    model, _ = run(load_model(path).model, passes, contract=CANONICAL)
    (folder / "canonical").mkdir()
    save_model(model, folder / "canonical" / "model.onnx")
    return folder / "canonical" / "model.onnx"


def open_samples(model: ir.Model, spec: str) -> Dataset:
    """Return the data that ``spec`` names for ``model``."""
    profiles, _ = profiles_for(model.graph.inputs, [])
    return open_data(spec, model.graph.inputs, profiles, seed=0)


def forward(program: Program, feeds: Feeds) -> None:
    """Execute a batch without recording."""
    with torch.no_grad():
        values, _ = program.feed(feeds)
        for node in program.nodes:
            inputs = [None if v is None else program.lookup(v, values) for v in node.inputs]
            _, outputs = program.execute(node, inputs, differentiable=False)
            values.update(zip(node.outputs, outputs, strict=False))
            for value in program.last_reads.get(node, ()):
                values.pop(value, None)


def sweep(program: Program, feeds: Feeds) -> None:
    """Record a batch and walk it back with gradients and relevance."""
    tape = record(program, feeds, keep=explained_values(program.graph))
    weights = seeds(tape.kept, None, chosen)
    walk(tape, gradient=weights, relevance=weights, propagate=propagator(), visit=lambda passage: None)


def timed(work: Callable[[Program, Feeds], None], program: Program, feeds: Feeds) -> float:
    """Return the processor seconds of ``work``, the least of ``REPEATS``."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        work(program, feeds)
        found.append(time.process_time() - start)
    return min(found)


def peak(path: Path, spec: str, samples: int, memory: int) -> dict[str, float]:
    """Score ``samples`` in a process of its own and return its memory in MB, before and at its peak."""
    words = [sys.executable, __file__, str(path), "--data", spec, "--samples", str(samples), "--memory", str(memory), "--child"]
    answer: dict[str, float] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return answer


def child(path: Path, spec: str, samples: int, memory: int) -> None:
    """Print the memory of this process: the other side of ``peak``."""
    model = ir.load(path)
    before = peak_rss_mb()
    found = measure_relevance(model, partition(model), open_samples(model, spec).take(samples), memory=memory * 2**20, stable=None)
    print(json.dumps({"start": before, "peak": peak_rss_mb(), "seconds": found.seconds}))


def plot(found: Relevance, path: Path) -> None:
    """Draw the type-normalised relevance of each layer with its standard error, layers in the order of the graph."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "deploycc", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    for place, layer in enumerate(found.layers):
        relative = layer.stderr / layer.mean if layer.mean else 0.0
        axes.bar(place, layer.normalised, yerr=layer.normalised * relative, color=COLOURS.get(layer.kind, "#bbbbbb"), error_kw={"lw": 0.8})
    axes.set_xticks(range(len(found.layers)), [layer.kind for layer in found.layers], rotation=90)
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_ylabel("relevance, mean of its kind = 1")
    axes.set_title(f"{found.samples} samples, bars: standard error", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print one row per model, or the relevance of each layer when it is plotted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--memory", type=int, default=MEMORY // 2**20, help="MiB that the values of one sweep may take")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    spec = arguments.data or f"synthetic:{arguments.samples}"
    if arguments.child:
        child(Path(arguments.models[0]), spec, arguments.samples, arguments.memory)
        return
    table = Table("model", "nodes", "batch", "forward_s", "sweep_s", "sweep/forward", "start_MB", "peak_MB", "samples")
    for source in arguments.models:
        with tempfile.TemporaryDirectory() as name:
            path = canonical(source, Path(name))
            model = ir.load(path)
            if arguments.plot:
                _plotted(model, spec, arguments.plot)
                continue
            program = Program(model, atomic=ruled_functions())
            batch = min(batch_of(program, batch=None, memory=arguments.memory * 2**20), arguments.samples)
            feeds = next(iter(open_samples(model, spec).batches(batch)))
            plain, whole = (timed(work, program, feeds) for work in (forward, sweep))
            held = peak(path, spec, arguments.samples, arguments.memory)
            figures = [f"{plain:.2f}", f"{whole:.2f}", f"{whole / plain:.2f}", f"{held['start']:.0f}", f"{held['peak']:.0f}"]
            table.add_row(source, str(len(program.nodes)), str(len(next(iter(feeds.values())))), *figures, str(arguments.samples))
    if not arguments.plot:
        Console(width=160).print(table)


def _plotted(model: ir.Model, spec: str, path: Path) -> None:
    found = measure_relevance(model, partition(model), open_samples(model, spec), stable=None)
    plot(found, path)
    table = Table("region", "layer", "mean", "stderr", "Omega", "normalised")
    for layer in found.layers:
        figures = [f"{layer.mean:.2e}", f"{layer.stderr:.0e}", f"{layer.omega:.2e}", f"{layer.normalised:.2f}"]
        table.add_row(layer.region, layer.kind, *figures)
    Console(width=120).print(table)
    stability = "none" if found.stability is None else f"{found.stability:.3f}"
    print(f"{found.samples} samples, {found.seconds:.1f} s, stability {stability}; wrote {path}")


if __name__ == "__main__":
    main()
