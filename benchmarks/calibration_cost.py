"""What calibration costs over plain forward passes of ONNX Runtime, for every method, and the memory that it takes.

    python benchmarks/quantisers.py --cost                        # prints these tables
    python benchmarks/quantisers.py --cost --write                # and puts them into docs/quantisers.md

Per image: the difference between two numbers of images, so that what happens once (the session, the probes) does not count; the least of
``ROUNDS`` rounds, forward passes and calibration in turn. Images are synthetic, since only time matters. The machine must have nothing
else to do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from deploycc import registry
from deploycc.core.contract import CANONICAL
from deploycc.core.data import Dataset, open_data
from deploycc.core.formats import FP16, INT8
from deploycc.core.passes import run
from deploycc.core.shapes import profiles_for
from deploycc.export import export
from deploycc.interop import load_model
from deploycc.quant.calibrate import calibrate
from deploycc.quant.clipping import Clipping, Entropy, MinMax, Mse, Percentile
from deploycc.quant.decide import scales_of, values_of
from deploycc.quant.regions import partition
from deploycc.quant.rescale import channels_of, find_sites

NETWORKS = ("deit_tiny_patch16_224", "resnet50", "mobilenetv2_100")
METHODS: tuple[Clipping, ...] = (MinMax(), Percentile(), Mse(), Entropy())
FEW, MANY, ROUNDS, BATCH = 8, 40, 15, 8


def costs() -> Iterator[str]:
    """Yield the lines of both tables."""
    yield "| model | forward ms/image | calibration ms/image | ratio | " + " | ".join(f"{m} ms/model" for m in METHODS) + " |"
    yield "|---|---|---|---|" + "---|" * len(METHODS)
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            path = export(f"timm:{name}", Path(folder) / f"{name}.onnx")
            yield per_image(name, path)
        yield ""
        yield "| deit_tiny, `build --precision int8 --target onnxruntime` | calibration s | command s | peak MB |"
        yield "|---|---|---|---|"
        for samples in (32, 512):
            yield whole_command(Path(folder) / f"{NETWORKS[0]}.onnx", samples)


def per_image(name: str, path: Path) -> str:
    """Return the row of one network."""
    loaded = load_model(path).model
    model, _ = run(loaded, [cls() for phase in ("canonicalize", "prepare") for _, cls in registry.passes(phase)], contract=CANONICAL)
    profiles, _ = profiles_for(model.graph.inputs, [])
    data = {n: open_data(f"synthetic:{n}", model.graph.inputs, profiles, seed=0) for n in (FEW, MANY)}
    regions = partition(model, batch=BATCH)
    values, eligible = values_of(regions), [r for r in regions if INT8.name in r.formats]
    channels = channels_of(find_sites(model), values)
    reference = registry.backend("onnxruntime")

    def forward(samples: Dataset) -> None:
        execute = reference.executor(model)
        for feeds in samples.batches(BATCH):
            execute(feeds)

    plain, probed = [{n: float("inf") for n in data} for _ in range(2)]
    for _ in range(ROUNDS):
        for n, samples in data.items():
            plain[n] = min(plain[n], timed(lambda samples=samples: forward(samples)))
            start = time.perf_counter()
            seen = calibrate(model, samples, ranges=values, channels=channels, reference=reference, batch=BATCH)
            probed[n] = min(probed[n], time.perf_counter() - start)
    each = [1000 * (t[MANY] - t[FEW]) / (MANY - FEW) for t in (plain, probed)]
    methods = [timed(lambda m=m: scales_of(seen, eligible, [INT8], FP16, softmax=frozenset(), clipping=m)) for m in METHODS]
    cells = [f"{each[0]:.1f}", f"{each[1]:.1f}", f"{each[1] / each[0]:.2f}", *(f"{1000 * s:.0f}" for s in methods)]
    return f"| {name} | " + " | ".join(cells) + " |"


def timed(work: object) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


def whole_command(path: Path, samples: int) -> str:
    """Return the row of one build."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        words = [sys.executable, "-m", "deploycc.cli", "build", path, "--precision", "int8", "--data", f"synthetic:{samples}"]
        start = time.perf_counter()
        subprocess.run([*map(str, words), "--target", "onnxruntime", "--out", str(out), "--quiet"], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        report = json.loads((out / "report.json").read_text())
    return f"| {samples} images | {report['calibration']['seconds']:.1f} | {seconds:.1f} | {report['peak_rss_mb']:.0f} |"
