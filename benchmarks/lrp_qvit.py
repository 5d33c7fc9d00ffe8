"""Does LRP-QViT hold on networks trained here? The ladder of its Table 3 and its rule of bits, simulated, next to the paper's numbers.

    python benchmarks/lrp_qvit.py                     # three transformers, three draws of 32 calibration images, 2,000 test images
    python benchmarks/lrp_qvit.py --write             # the same, and the tables go into docs/lrp_qvit.md
    python benchmarks/lrp_qvit.py deit --draws 1 --images 200
    python benchmarks/lrp_qvit.py --keep figures.json # remember figures, and go on from there

Models: examples/vision_transformers (a DeiT and a Swin in miniature) and the vision transformer of examples/fashion, all trained on
Fashion-MNIST. A draw takes its 32 images from the 256 training images that ship with the examples. ``planted`` is the same model with
four channels of every normalization made 20 times larger and the weights behind them as much smaller: the same function, with the
outliers that DeiT-S is known for and networks of this size do not grow by themselves. ``reversed`` is mp4 with the order of relevance
turned round: the most relevant layers are lowered.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from deploycc.core.artefact import Artefact
from deploycc.core.data import Dataset, open_data
from deploycc.core.formats import FP32
from deploycc.core.plan import Assignment, PrecisionPlan, Region
from deploycc.core.rescaling import Rescale, Site, find_site
from deploycc.quant.paper import score_relevance
from deploycc.quant.paper_bits import Place, places_of, relevance_bits, uniform_bits
from deploycc.quant.paper_calibrate import calibrate_simulation
from deploycc.quant.paper_reparameterize import parse_reparameterization
from deploycc.quant.regions import partition
from deploycc.quant.roles import kinds_of
from deploycc.request import BuildRequest, Job, Silent, resolve
from deploycc.rewriting import canonicalize, lower, reparameterize

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "lrp_qvit.md"
BEGIN, END = "<!-- tables: python benchmarks/lrp_qvit.py --write -->", "<!-- end of the tables -->"
MODELS = {
    "deit": ROOT / "examples" / "vision_transformers" / "deit.onnx",
    "swin": ROOT / "examples" / "vision_transformers" / "swin.onnx",
    "vit": ROOT / "examples" / "fashion" / "vit.onnx",
}
FASHION = ROOT / "examples" / "fashion"
LADDER = ("layer", "channel", "repq", "crl")
# LRP-QViT, Table 3, DeiT-S on ImageNet at W4/A4; the FP32 accuracy is timm's.
PAPER = {"fp32": 79.85, "layer": 33.17, "channel": 70.28, "repq": 69.03, "crl": 70.78, "mp4": 72.43}
MIXED = ("mp4", "reversed")
CLAIMS = (("layer", "repq"), ("repq", "crl"), ("channel", "crl"), ("crl", "mp4"), ("reversed", "mp4"))
# Bits, whether outliers are planted, whether bits are mixed as well.
PARTS = {"four": (4, False, True), "three": (3, False, False), "planted": (4, True, True)}
PLANTED_CHANNELS, PLANTED_FACTOR = 4, 20.0
CHUNK = 100
Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Subject:
    """A model in canonical form, its regions, the test images and what it says of them."""

    name: str
    job: Job
    canonical: Artefact
    regions: tuple[Region, ...]
    places: Mapping[str, Place]
    images: np.ndarray
    labels: np.ndarray
    wanted: np.ndarray

    @property
    def accuracy(self) -> float:
        """Return the FP32 accuracy in percent."""
        return score(self.wanted, self.labels)


def subject(name: str, count: int, *, planted: bool = False) -> Subject:
    """Load a model and run its canonical passes."""
    request = BuildRequest(MODELS[name], "w4a4", data=str(FASHION / "vit.calib.npz"), targets=("onnxruntime",))
    job = resolve(request, Silent())
    canonical = canonicalize(job)
    if planted:
        canonical, _ = reparameterize(job, canonical, outliers(canonical.model))
    regions = partition(canonical.model)
    with np.load(FASHION / "eval.npz") as test:
        images, labels = test["image"][:count], test["labels"][:count]
    places = places_of(regions, kinds_of(canonical.model, regions))
    return Subject(name, job, canonical, regions, places, images, labels, logits(canonical.model, images))


def outliers(model: ir.Model) -> dict[str, Rescale]:
    """Return rescales that make a few channels of every normalization larger; they are drawn with a fixed seed."""
    found, rng = {}, np.random.default_rng(0)
    for node in model.graph:
        site = find_site(node)
        if node.op_type == "LayerNormalization" and isinstance(site, Site):
            scale = np.ones(site.channels)
            scale[rng.choice(site.channels, PLANTED_CHANNELS, replace=False)] = PLANTED_FACTOR
            found[node.name or ""] = Rescale(tuple(scale.tolist()), (0.0,) * site.channels)
    return found


def logits(model: ir.Model, images: np.ndarray) -> np.ndarray:
    """Return the first output for every image; one thread, so that a busy machine does not make it wait for another."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    run = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]).run
    name = model.graph.inputs[0].name
    return np.concatenate([run(None, {name: images[i : i + CHUNK]})[0] for i in range(0, len(images), CHUNK)])


def score(found: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of right answers in percent."""
    return float((found.argmax(1) == labels).mean() * 100)


def simulated(of: Subject, data: Dataset, assignments: Sequence[Assignment], way: str) -> tuple[float, float]:
    """Return accuracy in percent and SQNR of the logits in dB of one simulation."""
    found = calibrate_simulation(of.canonical.model, assignments, data, reparameterization=parse_reparameterization(way))
    plan = PrecisionPlan(FP32, tuple(assignments), rescales=found.rescales, quantizers=found.quantizers)
    built, _ = lower(of.job, reparameterize(of.job, of.canonical, found.rescales)[0], plan, {})
    got = logits(built.model, of.images)
    noise = float(np.sum((got - of.wanted) ** 2, dtype=np.float64))
    return score(got, of.labels), 10 * float(np.log10(np.sum(of.wanted**2, dtype=np.float64) / noise))


def draws(of: Subject, count: int, folder: Path) -> list[Dataset]:
    """Return the calibration images in ``count`` orders; the first 32 of each set the ranges, all of them the relevance."""
    with np.load(FASHION / "vit.calib.npz") as kept:
        images = kept["image"]
    found = []
    for seed in range(count):
        path = folder / f"draw{seed}.npz"
        np.savez(path, image=images[np.random.default_rng(seed).permutation(len(images))])
        found.append(open_data(str(path), of.canonical.model.graph.inputs, [], seed=0))
    return found


def measure(of: Subject, data: Sequence[Dataset], bits: int, *, mixed: bool, show: Callable[[str], None]) -> tuple[Figures, Figures]:
    """Return accuracies and SQNRs per way, one number per draw."""
    points: Figures = {}
    decibels: Figures = {}
    uniform = uniform_bits(of.regions, of.places, bits)
    for number, draw in enumerate(data):
        plans = {way: (uniform, way) for way in LADDER}
        if mixed:
            scores = score_relevance(of.canonical.model, of.regions, of.places, draw, progress=lambda done, total: None)
            relevance = {name: by["relevance"] for name, by in scores.noise.items()}
            plans["mp4"] = (relevance_bits(of.regions, of.places, bits, relevance), "crl")
            opposite = {name: -value for name, value in relevance.items()}
            plans["reversed"] = (relevance_bits(of.regions, of.places, bits, opposite), "crl")
        for name, (assignments, way) in plans.items():
            accuracy, sqnr = simulated(of, draw, assignments, way)
            points.setdefault(name, []).append(accuracy)
            decibels.setdefault(name, []).append(sqnr)
            show(f"{of.name} {bits} bits, draw {number + 1}, {name}: {accuracy:.2f} %, {sqnr:.2f} dB")
    return points, decibels


def shown(numbers: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{fmean(numbers):.2f} ± {stdev(numbers):.2f}" if len(numbers) > 1 else f"{numbers[0]:.2f}"


def table(head: str, rows: Mapping[str, tuple[float | None, Figures]], ways: Sequence[str]) -> list[str]:
    """Return a markdown table, one row per model."""
    lines = [f"| {head} | FP32 | " + " | ".join(ways) + " |", "|---" * (len(ways) + 2) + "|"]
    for name, (exact, figures) in rows.items():
        cells = [shown(figures[way]) if way in figures else "" for way in ways]
        lines.append(f"| {name} | {'' if exact is None else f'{exact:.2f}'} | " + " | ".join(cells) + " |")
    return lines


def claims(results: Mapping[str, Sequence[Figures]]) -> list[str]:
    """Return a markdown table: each claim of the paper as a difference, in points and dB, draw by draw on the same images."""
    lines = ["| claim | paper, points | " + " | ".join(results) + " |", "|---" * (len(results) + 2) + "|"]
    for low, high in CLAIMS:
        cells = []
        for points, decibels in results.values():
            by_points, by_decibels = ([b - a for a, b in zip(figures[low], figures[high], strict=True)] for figures in (points, decibels))
            cells.append(f"{shown(by_points)}; {shown(by_decibels)} dB: {verdict(by_points, by_decibels)}")
        published = f"{PAPER[high] - PAPER[low]:+.2f}" if low in PAPER else ""
        lines.append(f"| {low} < {high} | {published} | " + " | ".join(cells) + " |")
    return lines


def verdict(points: Sequence[float], decibels: Sequence[float]) -> str:
    """Return whether a difference has one sign in every draw, by accuracy and by SQNR."""
    signs = {np.sign(v) for v in points}, {np.sign(v) for v in decibels}
    if signs == ({1.0}, {1.0}):
        return "holds"
    if signs == ({-1.0}, {-1.0}):
        return "the opposite"
    return "holds by SQNR" if signs[1] == {1.0} else "the opposite by SQNR" if signs[1] == {-1.0} else "undecided"


def complete(known: Mapping[str, Any], name: str, count: int, images: int, show: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield what is known of a model after each part that was missing."""
    figures = dict(known)
    for part, (bits, planted, mixed) in PARTS.items():
        if part not in figures:
            of = subject(name, images, planted=planted)

            def shown(text: str, part: str = part) -> None:
                show(f"{part}: {text}")

            with tempfile.TemporaryDirectory() as folder:
                figures[part] = measure(of, draws(of, count, Path(folder)), bits, mixed=mixed, show=shown)
            figures.setdefault("fp32", of.accuracy)
            yield figures


def report(results: Mapping[str, Any], size: str) -> list[str]:
    """Return the markdown of every model's figures."""
    ways = (*LADDER, *MIXED)
    paper = {"paper: DeiT-S, ImageNet": (PAPER["fp32"], {way: [PAPER[way]] for way in ways if way in PAPER})}
    points = {part: {n: (r["fp32"], r[part][0]) for n, r in results.items() if part in r} for part in PARTS}
    decibels = {n: (None, r["four"][1]) for n, r in results.items()}
    both = {n: r["four"] for n, r in results.items()} | {f"{n}, planted": r["planted"] for n, r in results.items() if "planted" in r}
    return [
        f"{size}, mean ± sd over draws.",
        "",
        "Top-1 in percent, W4/A4:",
        "",
        *table("model", paper | points["four"], ways),
        "",
        "SQNR of the logits in dB, W4/A4:",
        "",
        *table("model", decibels, ways),
        "",
        "Top-1 in percent, W3/A3, where more is at stake:",
        "",
        *table("model", points["three"], LADDER),
        "",
        f"Top-1 in percent, W4/A4, with {PLANTED_CHANNELS} planted outlier channels of factor {PLANTED_FACTOR:g} per normalization:",
        "",
        *table("model", points["planted"], ways),
        "",
        "The paper's claims, as differences at W4/A4 draw by draw; a verdict needs one sign in every draw:",
        "",
        *claims(both),
    ]


def write(lines: Sequence[str]) -> None:
    """Put the tables between their marks in the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.partition(END)[2]}")


def main() -> None:
    """Parse the command line, print the tables and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--draws", type=int, default=3, help="calibration draws")
    parser.add_argument("--images", type=int, default=2000, help="test images, from the first on")
    parser.add_argument("--keep", type=Path, metavar="JSON", help="a file that remembers figures of models measured before")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    if missing := [str(MODELS[name].relative_to(ROOT)) for name in arguments.models if not MODELS[name].exists()]:
        parser.error(f"{', '.join(missing)} is not there: python examples/vision_transformers/train_transformers.py trains it")
    size = f"{arguments.images} test images, {arguments.draws} draws of 32 calibration images"
    kept = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else {}
    results = kept.setdefault(size, {})
    for name in arguments.models:
        for figures in complete(results.get(name, {}), name, arguments.draws, arguments.images, lambda text: print(text, flush=True)):
            results[name] = figures
            if arguments.keep:
                arguments.keep.write_text(json.dumps(kept, indent=1))
    lines = report({name: results[name] for name in arguments.models}, size)
    print("\n".join(lines))
    if arguments.write:
        write(lines)


if __name__ == "__main__":
    main()
