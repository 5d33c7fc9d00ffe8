"""What was asked against what the engine's listing shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploycc.core.backend import Engine, Realised
from deploycc.core.formats import BF16, FP8, FP16, FP32, INT8, Format
from deploycc.core.plan import Assignment, PrecisionPlan, Region
from deploycc.core.target import parse_target
from deploycc.verify.audit import audit, region_rows, warnings_of


def region(*anchors: str, kind: str = "conv") -> Region:
    return Region(anchors[0], kind, anchors, (*anchors, "relu"), ("x",), parameters=9, macs=7, source="stages.0")


def engine(**operands: tuple[str, ...]) -> Engine:
    return Engine(
        parse_target("tensorrt-rtx:sm_89"), Path("e.engine"), 1, 0.1, realised=Realised(operands, source="listing" if operands else "")
    )


def verdict(format: Format, *anchors: str, **operands: tuple[str, ...]) -> str:
    (finding,) = audit(PrecisionPlan(FP16, (Assignment(region(*anchors), format, "r"),)), engine(**operands))
    return finding.verdict


@pytest.mark.parametrize(("format", "shown"), [(INT8, "int8"), (FP8, "fp8"), (FP16, "fp16"), (BF16, "bf16"), (FP32, "fp32")])
def test_each_format_has_its_word(format: Format, shown: str) -> None:
    assert verdict(format, "c", c=(shown, shown)) == "ok"
    for other in (INT8, FP8, FP16, BF16, FP32):
        assert verdict(other, "c", c=(shown, shown)) == ("ok" if other == format else "mismatch")


def test_one_float_operand_is_a_mismatch() -> None:
    assert verdict(INT8, "c", c=("int8", "fp16")) == "mismatch"
    assert verdict(FP8, "s", "o", s=("fp8", "fp8", "fp16"), o=("fp8", "fp8", "fp8")) == "mismatch"
    assert verdict(FP8, "s", "o", s=("fp8", "fp8", "fp8"), o=("fp8", "fp8", "fp8")) == "ok"


def test_one_float_anchor_is_a_mismatch() -> None:
    assert verdict(INT8, "q", "k", "v", q=("int8", "int8"), k=("fp16", "fp16"), v=("int8", "int8")) == "mismatch"


def test_nothing_visible_is_unknown() -> None:
    assert verdict(INT8, "c") == "unknown"
    assert verdict(INT8, "c", other=("int8", "int8")) == "unknown"
    assert verdict(INT8, "c", c=()) == "mismatch"


def test_warnings_are_about_quantized_regions() -> None:
    plan = PrecisionPlan(FP16, (Assignment(region("a"), INT8, "r"), Assignment(region("b"), FP16, "r"), Assignment(region("c"), INT8, "r")))
    built = engine(a=("fp16", "fp16"), b=("fp32", "fp32"))
    assert warnings_of(audit(plan, built), built) == [
        "tensorrt-rtx:sm_89: the plan asks for int8 in 'a', the engine's listing shows fp16 x fp16"
    ]


def test_rows_for_the_report() -> None:
    plan = PrecisionPlan(FP16, (Assignment(region("a"), INT8, "because", ("X3",), {"int8": 0.5}),))
    (row,) = region_rows(plan, {"t1": audit(plan, engine(a=("int8", "int8"))), "t2": audit(plan, engine())})
    assert row == {
        "name": "a",
        "source": "stages.0",
        "kind": "conv",
        "format": "int8",
        "reason": "because",
        "rules": ["X3"],
        "noise": {"int8": 0.5},
        "parameters": 9,
        "macs": 7,
        "nodes": ["a", "relu"],
        "realised": {"t1": {"types": "int8 x int8", "verdict": "ok"}, "t2": {"types": "", "verdict": "unknown"}},
    }
