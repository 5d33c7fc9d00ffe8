"""Paper mode: LRP-QViT and RepQ-ViT as published, simulated. It says what the method gives at 4 and 6 bits; nothing of it can be deployed.

Bits per layer come first (``paper_bits``), then the quantizers of activations and what is done behind each LayerNormalization
(``paper_calibrate``, ``paper_reparameterize``). The result is a PrecisionPlan that has nothing left to search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycc.core.errors import UsageError
from deploycc.core.formats import FP32, SIMULATIONS
from deploycc.core.plan import PrecisionPlan
from deploycc.quant.calibrate import Statistics
from deploycc.quant.cost import estimate_all
from deploycc.quant.decide import Analysis
from deploycc.quant.paper_bits import PROTECTED, places_of, relevance_bits, uniform_bits
from deploycc.quant.paper_calibrate import calibrate_simulation
from deploycc.quant.regions import partition
from deploycc.quant.relevance import measure_relevance
from deploycc.quant.roles import kinds_of
from deploycc.quant.sensitivity import Scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from deploycc.core.data import Dataset
    from deploycc.core.plan import Region
    from deploycc.core.target import Target
    from deploycc.quant.decide import Progress, Stage
    from deploycc.quant.paper_bits import Place
    from deploycc.quant.paper_reparameterize import Reparameterization


def analyse_simulation(
    model: ir.Model,
    *,
    digest: str,
    precision: str,
    reparameterization: Reparameterization,
    target: Target,
    data: Dataset,
    batch: int,
    stage: Stage,
    progress: Progress,
) -> Analysis:
    """Settle bits and quantizers of every layer; the plan is in ``Analysis.settled``.

    Args:
        model: the CANONICAL graph, in FP32; it is not changed.
        digest: of the artefact, for the plan.
        precision: ``w4a4``, ``w6a6``, or ``mp4``, ``mp6`` for bits by relevance.
        reparameterization: what is done behind a LayerNormalization.
        target: whose costs are estimated: those of FP32, in which all is simulated.
        data: calibration data; relevance takes all of it, ranges the first 32 samples.
        batch: samples per run.
        stage: a context manager per named stage.
        progress: called with work done and in all.

    Raises:
        UsageError: when bits are to be chosen by relevance and the graph has too few transformer blocks.
    """
    regions = partition(model)
    places, base = places_of(regions, kinds_of(model, regions)), SIMULATIONS[precision]
    analysis = Analysis(regions, FP32, (), target, batch, digest, costs=estimate_all(regions, target, batch=batch))
    if precision.startswith("mp"):
        with stage("score"):
            analysis.meaning = "positive part of gradient times relevance at the layer's input, over the mean of layers of its kind"
            analysis.scores = score_relevance(model, regions, places, data, progress=progress)
        assignments = relevance_bits(regions, places, base, {name: by["relevance"] for name, by in analysis.noise.items()})
    else:
        assignments = uniform_bits(regions, places, base)
    with stage("calibrate"):
        found = calibrate_simulation(model, assignments, data, reparameterization=reparameterization, batch=batch, progress=progress)
    analysis.statistics = Statistics({}, found.samples, found.seconds)
    analysis.rescales = found.rescales
    analysis.settled = PrecisionPlan(FP32, assignments, model=digest, rescales=found.rescales, quantizers=found.quantizers)
    return analysis


def score_relevance(
    model: ir.Model, regions: Sequence[Region], places: Mapping[str, Place], data: Dataset, *, progress: Progress
) -> Scores:
    """Return the relevance of every region, normalised within its kind, as scores of the format ``relevance``.

    Raises:
        UsageError: when there are no more blocks than the rule protects.
    """
    blocks = len({place.block for place in places.values() if place.block is not None})
    if blocks <= PROTECTED:
        raise UsageError(
            f"the rule protects the first {PROTECTED} transformer blocks, and the graph has {blocks}",
            at="--precision mp4 or mp6",
            fix="use --precision w4a4 or w6a6, which need no blocks",
        )
    found = measure_relevance(model, regions, data, progress=progress)
    noise = {r.name: {"relevance": found.of(r.name)} for r in regions}
    return Scores("relevance", found.samples, found.seconds, noise, agreement=found.agreement)
