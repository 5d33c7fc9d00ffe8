"""A plan is a file: it reads back as it was, has the same bytes every time, and refuses other files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from deploycc.core.errors import UsageError
from deploycc.core.formats import FORMATS, FP16, FP32, INT8
from deploycc.core.plan import Assignment, Crossing, PrecisionPlan, Region

if TYPE_CHECKING:
    from collections.abc import Callable

CONV = Region(
    "stem", "conv", ("conv1",), ("conv1", "relu1"), ("x",), ("w1",), formats=("int8", "fp8"), rules=("P1",), parameters=300, macs=9
)
HEAD = Region(
    "head",
    "gemm",
    ("fc",),
    ("fc",),
    ("features",),
    ("w2",),
    parameters=100,
    residuals=("skip",),
    source="model.head",
    crossings=(Crossing("features", "stem", 640, shared=True),),
)
PLAN = PrecisionPlan(
    base=FP16,
    assignments=(
        Assignment(CONV, INT8, "cheapest within the budget", ("P1",), {"int8": 0.0012345678, "fp16": 1e-7}),
        Assignment(HEAD, FP16, "no quantized format pays"),
    ),
    scales={"x": {"int8": 0.05}, "a": {"int8": 0.5, "fp8": 0.25}},
    islands={"softmax": "decision slice"},
    model="m.onnx",
)


def test_it_reads_back() -> None:
    again = PrecisionPlan.from_json(PLAN.to_json())
    assert again.to_json() == PLAN.to_json()
    assert again.assignments[1] == PLAN.assignments[1]
    assert again.assignments[0].region == CONV
    assert (again.base, again.islands, again.scales, again.model) == (PLAN.base, PLAN.islands, PLAN.scales, PLAN.model)


def test_the_order_of_mappings_does_not_matter() -> None:
    other = PrecisionPlan(PLAN.base, PLAN.assignments, dict(reversed(PLAN.scales.items())), PLAN.islands, PLAN.model)
    assert other.to_json() == PLAN.to_json()
    assert PLAN.to_json().endswith("}\n")


def test_a_node_computes_in_the_format_of_its_region() -> None:
    assert PLAN.format_of("relu1") is INT8
    assert PLAN.format_of("fc") is FP16
    assert PLAN.format_of("softmax") is FP32
    assert PLAN.format_of("elsewhere") is FP16


def test_bits_are_weighted_by_parameters() -> None:
    assert PLAN.average_bits() == pytest.approx((300 * 8 + 100 * 16) / 400)
    assert PrecisionPlan(FORMATS["bf16"], ()).average_bits() == 16
    assert PLAN.count() == {"fp16": 1, "int8": 1}


def _set(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda body: body.__setitem__(key, value)


def _crossing(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["regions"][1]["crossings"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_set("schema", "deploycc.plan/0"), "not a plan of schema"),
        (_set("base", "fp12"), "unknown format 'fp12'"),
        (lambda body: body.pop("regions"), "cannot be read: KeyError"),
        (_set("regions", [{"name": "stem"}]), "cannot be read"),
        (lambda body: body["regions"][0].__setitem__("format", "int3"), "unknown format 'int3'"),
        (_set("regions", 7), "cannot be read"),
        (_crossing("producer", "gone"), "no region is named 'gone'"),
        (_crossing("elements", "640"), "a crossing has a value, a producer, elements"),
        (_crossing("elements", -1), "a crossing has a value, a producer, elements"),
        (_crossing("shared", "false"), "a crossing has a value, a producer, elements"),
        (_crossing("value", ["features"]), "a crossing has a value, a producer, elements"),
        (_crossing("sharing", True), "cannot be read: TypeError"),
    ],
)
def test_other_files_are_refused(change: Callable[[dict[str, Any]], object], what: str) -> None:
    body = json.loads(PLAN.to_json())
    change(body)
    with pytest.raises(UsageError) as caught:
        PrecisionPlan.from_json(json.dumps(body), at="p.json")
    assert what in caught.value.what
    assert caught.value.at == "p.json"
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '"plan"'])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(UsageError, match=r"Where: plan\.json\. Fix: "):
        PrecisionPlan.from_json(text)
