"""Whether a plan from a file fits a model, and what is said when it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_graphs import residual, transformer

from deploycc.core.errors import UsageError
from deploycc.core.formats import BF16, FP8, FP16, FP32, INT8
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.quant.reapply import check_fit
from deploycc.quant.regions import partition

MODEL = residual()
REGIONS = partition(MODEL)


def plan(**changes: object) -> PrecisionPlan:
    """Return a plan of the residual network: everything that allows it in INT8."""
    scales = {v: {"int8": 0.05} for r in REGIONS for v in (*r.activations, *r.residuals)}
    chosen = tuple(Assignment(r, INT8 if "int8" in r.formats else FP16, "test") for r in REGIONS)
    return replace(PrecisionPlan(FP16, chosen, scales, {}, "digest"), **changes)  # type: ignore[arg-type]


def with_format(format: object) -> PrecisionPlan:
    """Return the plan with another format in its first region."""
    first, *rest = plan().assignments
    return plan(assignments=(replace(first, format=format), *rest))


def test_a_plan_of_the_same_model_fits() -> None:
    check_fit(plan(), MODEL, digest="digest", at="plan.json")
    check_fit(plan(model=""), MODEL, digest="another", at="plan.json")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plan(model="old"), "the same regions and other weights or constants"),
        (plan(assignments=plan().assignments[1:]), rf"1 regions of the model are missing in the plan \({REGIONS[0].name}\)"),
        (
            plan(assignments=(replace(plan().assignments[0], region=replace(REGIONS[0], activations=("other",))), *plan().assignments[1:])),
            "has other activations",
        ),
        (with_format(BF16), "is planned in bf16, the plan's base is fp16"),
        (plan(scales={}), "the plan has no int8 scale for"),
    ],
)
def test_what_differs_is_said(wrong: PrecisionPlan, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_fit(wrong, MODEL, digest="digest", at="plan.json")


def test_a_format_that_the_rules_exclude_is_named_with_the_rule() -> None:
    first, *rest = plan().assignments
    excluded = replace(first, region=replace(first.region, formats=("int8",), rules=("S3",)), format=FP8)
    with pytest.raises(UsageError, match=r"fp8 is not allowed in '.*' by S3. Where: plan.json. Fix: use one of int8, fp16"):
        check_fit(plan(assignments=(excluded, *rest)), MODEL, digest="digest", at="plan.json")


def test_fp32_needs_its_islands() -> None:
    wrong = with_format(FP32)
    with pytest.raises(UsageError, match="is planned in fp32"):
        check_fit(wrong, MODEL, digest="digest", at="plan.json")
    check_fit(replace(wrong, islands=dict.fromkeys(REGIONS[0].nodes, "test")), MODEL, digest="digest", at="plan.json")


def test_a_plan_of_another_model() -> None:
    with pytest.raises(UsageError, match=r"\d+ regions of the plan are missing in the model .* and \d+ regions of the model are missing"):
        check_fit(plan(), transformer(), digest="digest", at="plan.json")
