"""Bounds: what is read, what it is written as, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycc.core.budget import Budget, parse_budget
from deploycc.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("", Budget()),
        ("sqnr>=25dB", Budget(sqnr=25)),
        ("sqnr >= 25", Budget(sqnr=25)),
        ("accuracy-drop<=0.5", Budget(accuracy_drop=0.5)),
        ("bits<=8, size<=0.5x,latency<=.7", Budget(bits=8, size=0.5, latency=0.7)),
        ("bops<=0.3x", Budget(bops=0.3)),
        ("bits<=8,", Budget(bits=8)),
    ],
)
def test_reads(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


numbers = st.none() | st.floats(0.001, 1000).map(lambda v: float(f"{v:.12g}"))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.builds(Budget, numbers, numbers, numbers, numbers, numbers))
def test_writes_what_it_reads(budget: Budget) -> None:
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["speed<=1", "sqnr<=25dB", "bits>=8", "bits<=8x", "sqnr>=25x", "bits<=8,bits<=4", "bits", "bits<=-1", "bits<8", "bits<=1e3"]
)
def test_refuses_what_is_no_bound(text: str) -> None:
    bad = text.split(",")[-1]
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert str(caught.value) == (
        f"cannot read the bound '{bad}'. Where: --budget. Fix: use sqnr>=25dB, accuracy-drop<=0.5, bits<=8, size<=0.5x, bops<=0.5x or "
        "latency<=0.7x, separated by commas, each once."
    )


def test_refuses_what_is_no_number() -> None:
    with pytest.raises(UsageError, match=r"'1\.2\.3' is not a number\. Where: --budget bits<=1\.2\.3\."):
        parse_budget("bits<=1.2.3")


def test_which_bounds_are_on_the_error() -> None:
    assert Budget(sqnr=1).bounds_error
    assert Budget(accuracy_drop=1).bounds_error
    assert not Budget(bits=1, size=1, latency=1).bounds_error
