"""Formats in blocks take part where they are asked for: scored, chosen region by region, and left out of ``mixed`` otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from small_graphs import dataset, graph, random, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.capability import formats_of_precision, formats_on_request
from deploycc.core.contract import QUANTIZED
from deploycc.core.errors import UsageError
from deploycc.core.formats import FP8, FP16, FP32, INT4, INT8, MXFP8, NVFP4, Format
from deploycc.core.passes import run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.target import Target
from deploycc.quant.allocate import uniform
from deploycc.quant.calibrate import calibrate
from deploycc.quant.decide import scales_of
from deploycc.quant.methods import Question, method_named
from deploycc.quant.overrides import Override
from deploycc.quant.regions import partition
from passes.insert_qdq import InsertQdq

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

BLACKWELL = (Target("tensorrt-rtx", ("sm_120",)),)
BLOCKED = (INT4, NVFP4, MXFP8)


def chain() -> ir.Model:
    text = "(float[N,64] x) => (float[N,64] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
    return graph(text, opset=20, w=weight(64, 96, seed=1), v=weight(96, 64, seed=2))


def question(folder: Path, model: ir.Model) -> Question:
    data, regions = dataset(folder, model, x=random(8, 64)), partition(model)
    seen = calibrate(model, data, ranges=[v for r in regions for v in r.activations], reference=OnnxRuntime())
    scales = scales_of(seen, regions, BLOCKED, FP32, softmax=frozenset())
    return Question(model, regions, BLOCKED, scales, data, OnnxRuntime(), batch=4)


def test_only_nvfp4_has_a_calibrated_scale(tmp_path: Path) -> None:
    assert {name for by in question(tmp_path, chain()).scales.values() for name in by} == {"nvfp4"}


def test_a_score_is_the_noise_of_what_would_be_inserted(tmp_path: Path) -> None:
    asked = question(tmp_path, chain())
    scores = method_named("sqnr").score(asked).noise
    for format in BLOCKED:
        for region in asked.regions:
            plan = PrecisionPlan(FP32, (Assignment(region, format, "test"),), asked.scales)
            lowered, _ = run(asked.model, [InsertQdq(plan)], contract=QUANTIZED)
            error = size = 0.0
            for feeds in asked.data.batches(4):
                exact, got = (OnnxRuntime().executor(m, simulate=True)(feeds)["y"] for m in (asked.model, lowered))
                error, size = error + float(((got - exact) ** 2).sum()), size + float((exact**2).sum())
            assert scores[region.name][format.name] == pytest.approx(error / size, rel=1e-3)


@pytest.mark.parametrize("name", ["lrp", "hybrid"])
def test_methods_by_gradient_score_them_as_well(tmp_path: Path, name: str) -> None:
    scores = method_named(name).score(question(tmp_path, chain())).noise
    assert all(by["mxfp8"] < by["nvfp4"] for by in scores.values())
    assert all(np.isfinite(v) and v > 0 for by in scores.values() for v in by.values())


def test_mixed_chooses_from_them_on_request_only() -> None:
    assert formats_of_precision("mixed", BLACKWELL) == (FP16, (INT8, FP8))
    asked = (Override("blocks.*.fc1", NVFP4), Override("head", INT4))
    assert formats_on_request(asked, (INT8, FP8), BLACKWELL) == (INT4, NVFP4)


@pytest.mark.parametrize("format", [INT4, NVFP4])
def test_a_precision_offers_its_format_alone(format: Format) -> None:
    assert formats_of_precision(format.name, BLACKWELL) == (FP16, (format,))


@pytest.mark.parametrize(
    ("precision", "target", "words"),
    [
        ("nvfp4", Target("tensorrt-rtx", ("sm_89",)), "sm_89 has no NVFP4 units; use --precision int8 or a target of sm_120, sm_121"),
        ("int4", Target("tensorrt-rtx", ("sm_75",)), "use --precision fp16 or a target of sm_80, sm_86, sm_89, sm_120, sm_121"),
        ("mxfp8", BLACKWELL[0], "sm_120 computes in fp16 x fp8 where MXFP8 is asked for; use --precision int8"),
        ("nvfp4", Target("onnxruntime"), "ONNX Runtime does not have the operators in which nvfp4 is written"),
        ("mxfp8", Target("tensorrt", ("sm_90",)), "sm_90 has no MXFP8 units; use --precision int8 or a target of sm_100 or later"),
    ],
)
def test_a_target_that_lacks_it_is_refused_and_others_are_named(precision: str, target: Target, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        formats_of_precision(precision, (target,))
    assert words in str(caught.value)


def test_the_reason_for_leaving_a_convolution_out_is_that_of_blocks() -> None:
    text = "(float[N,64,9,9] x) => (float y) { y = Conv(x, w) }"
    (conv,) = partition(graph(text, w=weight(64, 64, 3, 3)))
    (assignment,) = uniform([replace(conv, rules=("S3",))], NVFP4, FP16, {})
    assert (assignment.format, assignment.reason) == (FP16, "nvfp4 is excluded here by R6")
    assert INT8.name in conv.formats
