"""Targets are written as they are read."""

from __future__ import annotations

import pytest

from deploycc.core.errors import UsageError
from deploycc.core.target import Target, parse_target


@pytest.mark.parametrize("text", ["tensorrt", "tensorrt:sm_90", "tensorrt-rtx:sm_80+sm_89", "onnxruntime"])
def test_a_target_reads_back(text: str) -> None:
    assert str(parse_target(text)) == text


def test_architectures_are_sorted_and_unique() -> None:
    target = parse_target("tensorrt-rtx:sm_120,sm_89+sm_89")
    assert target == Target("tensorrt-rtx", ("sm_89", "sm_120"))
    assert target.compute_capabilities == (89, 120)
    assert target.slug == "tensorrt-rtx-sm_89+sm_120"


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("openvino", "unknown target 'openvino'", "tensorrt, tensorrt-rtx, onnxruntime"),
        ("", "unknown target ''", "tensorrt-rtx:sm_89"),
        ("tensorrt-rtx:sm_90", "does not build for 'sm_90'", "sm_75, sm_80"),
        ("tensorrt:90", "does not build for '90'", "sm_90"),
        ("tensorrt:", "does not build for ''", "sm_90"),
        ("tensorrt-rtx:sm_80+", "does not build for ''", "sm_80"),
        ("onnxruntime:sm_90", "does not build for 'sm_90'", "it runs on the CPU"),
    ],
)
def test_refusals(text: str, what: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert what in caught.value.what
    assert "--target" in caught.value.at
    assert fix in caught.value.fix
