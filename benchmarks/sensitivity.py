"""Which way of scoring regions predicts the measured loss, what it costs, and what plans it leads to: one table per model.

    python benchmarks/sensitivity.py                                   # the models of examples/, some minutes on two cores
    python benchmarks/sensitivity.py examples/fashion/vit.onnx --write docs/sensitivity.md

Truth is brute force on held-out test images: every region is quantized alone, and the change of the class probabilities (Kullback-Leibler
divergence) and of the outputs (noise to signal) is measured. Each way of scoring sees calibration images only. ``rank`` is Spearman's
coefficient between its scores and the truth. Then every way chooses plans of equal average bits, and of equal estimated latency, by the
same integer program; the built models run on the held-out images. ``random`` draws scores (mean and standard deviation of five draws).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from scipy.stats import spearmanr

from deploycc import registry
from deploycc.core.budget import Budget
from deploycc.core.contract import CANONICAL
from deploycc.core.data import Dataset, open_data
from deploycc.core.formats import FORMATS, FP16
from deploycc.core.passes import run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.shapes import profiles_for
from deploycc.core.target import parse_target
from deploycc.interop import load_model
from deploycc.quant.allocate import allocate, uniform
from deploycc.quant.decide import Analysis, analyse
from deploycc.quant.methods import Question, method_named, method_names
from deploycc.quant.sensitivity import DIVERGENCE, measure_noise
from passes.insert_qdq import InsertQdq

ROOT = Path(__file__).parent.parent
MODELS = ("examples/fashion/vit.onnx", "examples/fashion/cnn.onnx")
EXTRA = "examples/vision_transformers/*.onnx"
EVALUATION = "examples/fashion/eval.npz"
DRAWS = 5
Noise = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Subject:
    """A canonical model with its calibration and held-out data, analysed but not yet scored."""

    name: str
    model: Any
    calibration: Dataset
    held_out: Dataset
    analysis: Analysis
    reference: Any


def subject(path: Path, evaluation: Path, *, format: str, calibration: int, held_out: int) -> Subject:
    """Load, canonicalize and calibrate a model."""
    loaded = load_model(path).model
    passes = [cls() for phase in ("canonicalize", "prepare") for _, cls in registry.passes(phase)]
    model, _ = run(loaded, passes, contract=CANONICAL)
    profiles, _ = profiles_for(model.graph.inputs, [])
    beside = path.with_suffix(".calib.npz")
    beside = beside if beside.exists() else next(iter(sorted(path.parent.glob("*.calib.npz"))), ROOT / "examples/fashion/vit.calib.npz")
    data = open_data(str(beside), model.graph.inputs, profiles, seed=0).take(calibration)
    test = open_data(str(evaluation), model.graph.inputs, profiles, seed=0).take(held_out)
    reference = registry.backend("onnxruntime")
    analysis = analyse(
        model, digest="", base=FP16, formats=[FORMATS[format]], choose=False, target=parse_target("tensorrt:sm_89"), data=data,
        reference=reference, batch=16, stage=lambda name: nullcontext(), progress=lambda done, total: None,
    )  # fmt: skip
    return Subject(path.stem, model, data, test, analysis, reference)


def truths(each: Subject) -> dict[str, Noise]:
    """Return the measured loss of every region alone on held-out data: divergence of probabilities, and noise at the outputs."""
    found = {}
    for name, metric in (("KL", DIVERGENCE), ("noise", None)):
        scores = measure_noise(
            each.model, each.analysis.regions, each.analysis.formats, each.analysis.scales, each.held_out,
            reference=each.reference, batch=32, metric=metric,
        )  # fmt: skip
        found[name] = scores.noise
    return found


def scored(each: Subject, name: str, samples: int) -> tuple[Noise, float]:
    """Return the scores of one way of scoring on calibration data, and its wall seconds."""
    start = time.perf_counter()
    question = Question(
        each.model, each.analysis.regions, each.analysis.formats, each.analysis.scales, each.calibration.take(samples), each.reference, 16
    )
    return method_named(name).score(question).noise, time.perf_counter() - start


def flat(noise: Noise, regions: Iterable[str], format: str) -> list[float]:
    """Return the figures of the regions that allow the format."""
    return [noise[r][format] for r in regions if format in noise[r]]


def random_noise(each: Subject, seed: int) -> Noise:
    """Return scores drawn from a log-uniform distribution."""
    draw = np.random.default_rng(seed)
    return {
        r.name: {f.name: float(10 ** draw.uniform(-6, -2)) for f in each.analysis.formats if f.name in r.formats}
        for r in each.analysis.regions
    }


def planned(each: Subject, noise: Noise, budget: Budget) -> tuple[Assignment, ...]:
    """Return the plan of least scored noise within a budget."""
    analysis = each.analysis
    return allocate(analysis.regions, analysis.formats, analysis.base, noise=noise, latency=analysis.costs, budget=budget, noise_bound=None)


def judged(each: Subject, assignments: tuple[Assignment, ...]) -> tuple[float, float]:
    """Return the SQNR in dB and the top-1 accuracy in percent of a plan on held-out data."""
    used = {(v, a.format.name) for a in assignments for v in (*a.region.activations, *a.region.residuals) if a.format.is_quantized}
    scales = {v: {f: s for f, s in by.items() if (v, f) in used} for v, by in each.analysis.scales.items()}
    built = each.model.clone()
    InsertQdq(PrecisionPlan(each.analysis.base, assignments, {v: by for v, by in scales.items() if by}))(built)
    return measured(each, built)


def measured(each: Subject, built: ir.Model) -> tuple[float, float]:
    """Return the SQNR in dB and the top-1 accuracy in percent of a built model on held-out data."""
    execute, original = each.reference.executor(built), each.reference.executor(each.model)
    noise = power = right = 0.0
    labels, at = each.held_out.labels, 0
    for feeds in each.held_out.batches(64):
        expected, found = next(iter(original(feeds).values())), next(iter(execute(feeds).values()))
        noise += float(np.sum((found - expected) ** 2))
        power += float(np.sum(expected**2))
        if labels is not None:
            right += float(np.sum(found.argmax(1) == labels[at : at + len(found)]))
        at += len(found)
    return 10 * np.log10(power / max(noise, 1e-30)), 100 * right / at


def rows(each: Subject, samples: int) -> tuple[list[list[str]], list[list[str]]]:
    """Return the table of ranks and the table of plans of one model."""
    format = each.analysis.formats[0].name
    names = [r.name for r in each.analysis.regions]
    truth = truths(each)
    ranks, plans = [], []
    budgets = {
        "9 bits": Budget(bits=9.0, latency=1.0),
        "10 bits": Budget(bits=10.0, latency=1.0),
        "12 bits": Budget(bits=12.0, latency=1.0),
    }
    budgets |= {"half the gain": Budget(bits=16.0, latency=half_way(each))}
    candidates: dict[str, list[Noise]] = {}
    for name in method_names():
        noise, seconds = scored(each, name, samples)
        found = flat(noise, names, format)
        cells = [f"{spearmanr(found, flat(t, names, format)).statistic:.3f}" for t in truth.values()]
        ranks.append([each.name, name, *cells, f"{seconds:.2f}"])
        candidates[name] = [noise]
    candidates["random"] = [random_noise(each, seed) for seed in range(DRAWS)]
    drawn = [[spearmanr(flat(n, names, format), flat(t, names, format)).statistic for n in candidates["random"]] for t in truth.values()]
    ranks.append([each.name, "random", *(f"{statistics.mean(d):.3f} ± {statistics.stdev(d):.3f}" for d in drawn), "0.00"])
    candidates["truth (noise)"] = [truth["noise"]]
    for name, noises in candidates.items():
        cells = []
        for budget in budgets.values():
            results = [judged(each, planned(each, noise, budget)) for noise in noises]
            cells.append(shown([r[0] for r in results]) + " / " + shown([r[1] for r in results], digits=2))
        plans.append([each.name, name, *cells])
    whole = judged(each, uniform(each.analysis.regions, each.analysis.formats[0], each.analysis.base, {}))
    plans.append([each.name, f"uniform {format}", f"{whole[0]:.1f} / {whole[1]:.2f}", *[""] * (len(budgets) - 1)])
    return ranks, plans


def shown(values: Sequence[float], *, digits: int = 1) -> str:
    """Return a figure, with the standard deviation of several draws."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def half_way(each: Subject) -> float:
    """Return half way from the fastest plan to the base format, as a share of the latter's estimated latency."""
    costs, analysis = each.analysis.costs, each.analysis
    base = sum(costs[r.name][analysis.base.name] for r in analysis.regions)
    fastest = sum(min(costs[r.name][f] for f in (analysis.base.name, *r.formats) if f in costs[r.name]) for r in analysis.regions)
    return (base + fastest) / 2 / base


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body))


PLANS = """Every cell: SQNR in dB / top-1 in percent on the held-out images. Latency is that of the regions alone on tensorrt:sm_89, without
conversions between them."""


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--eval", type=Path, default=ROOT / EVALUATION)
    parser.add_argument("--format", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--samples", type=int, default=32, help="calibration images for scoring")
    parser.add_argument("--held-out", type=int, default=1000, help="test images for truth and plans")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write a page instead of printing")
    arguments = parser.parse_args()
    paths = arguments.models or [*(ROOT / m for m in MODELS), *sorted(ROOT.glob(EXTRA))]
    ranks: list[list[str]] = []
    plans: list[list[str]] = []
    for path in paths:
        each = subject(path, arguments.eval, format=arguments.format, calibration=64, held_out=arguments.held_out)
        some, more = rows(each, arguments.samples)
        ranks, plans = ranks + some, plans + more
    text = [
        markdown(["model", "scored by", "rank against KL", "rank against noise", "seconds"], ranks),
        markdown(["model", "scored by", "9 bits", "10 bits", "12 bits", "half the gain in latency"], plans),
    ]
    if arguments.write is None:
        print("\n\n".join(text))
        return
    command = f"python benchmarks/sensitivity.py --format {arguments.format} --samples {arguments.samples} --held-out {arguments.held_out}"
    head = ["# Which score predicts the loss", (__doc__ or "").split("\n\n")[2].replace("\n", " "), f"Made by `{command} --write PAGE`."]
    notes = ["## Ranks", text[0], "## Plans", PLANS, text[1]]
    arguments.write.write_text("\n\n".join([*head, *notes]) + "\n")


if __name__ == "__main__":
    main()
