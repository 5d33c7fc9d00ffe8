"""The search for the regions that cause a loss, on losses that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycc.verify.culprits import SUSPECTS, most_runs, search


class Known:
    """A loss of known shares, and how often it was measured."""

    def __init__(self, shares: dict[str, float], rest: float = 0.1) -> None:
        self.shares, self.rest, self.runs = shares, rest, 0

    def __call__(self, restored: Sequence[str]) -> float:
        self.runs += 1
        return self.rest + sum(share for name, share in self.shares.items() if name not in restored)


def names(count: int) -> list[str]:
    """Return names of regions."""
    return [f"r{i}" for i in range(count)]


@given(count=st.integers(2, 200), data=st.data())
def test_planted_culprits_are_found_in_few_runs(count: int, data: st.DataObject) -> None:
    planted = data.draw(st.lists(st.sampled_from(names(count)), min_size=1, max_size=min(3, count), unique=True))
    shares = dict.fromkeys(names(count), 1e-4) | {name: 1.0 + i for i, name in enumerate(planted)}
    loss = Known(shares)
    found = search(names(count), loss, limit=most_runs(count) * len(planted))
    assert {s.name for s in found.suspects} == set(planted)
    assert [s.share for s in found.suspects] == sorted((s.share for s in found.suspects), reverse=True)
    assert found.explained > 0.9
    assert found.runs == loss.runs <= 3 + SUSPECTS + len(planted) * (math.ceil(math.log2(count)) + 1)


def test_one_culprit_takes_about_log2_runs() -> None:
    loss = Known(dict.fromkeys(names(64), 0.0) | {"r37": 1.0})
    found = search(names(64), loss, limit=100)
    assert [(s.name, s.share) for s in found.suspects] == [("r37", pytest.approx(1.0))]
    assert loss.runs <= 2 + 6 + 1


@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=60), limit=st.integers(8, 40))
def test_the_limit_holds_and_every_figure_is_measured(shares: list[float], limit: int) -> None:
    loss = Known(dict(zip(names(len(shares)), shares, strict=True)))
    ticks: list[tuple[int, int]] = []
    found = search(names(len(shares)), loss, limit=limit, tick=lambda done, total: ticks.append((done, total)))
    assert found.runs == loss.runs <= limit + 1
    assert ticks[-1][0] == loss.runs
    for suspect in found.suspects:
        assert suspect.loss == pytest.approx(Known(loss.shares)([suspect.name]))
    assert found.together == pytest.approx(Known(loss.shares)([s.name for s in found.suspects]))


def test_a_loss_that_is_spread_has_no_large_share() -> None:
    found = search(names(40), Known(dict.fromkeys(names(40), 1.0)), limit=most_runs(40))
    assert all(s.share < 0.1 for s in found.suspects)


def test_a_loss_that_lies_elsewhere_has_no_gap() -> None:
    found = search(names(8), Known(dict.fromkeys(names(8), 0.0), rest=5.0), limit=20)
    assert (found.gap, found.suspects, found.runs) == (0.0, (), 2)
