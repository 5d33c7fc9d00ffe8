"""Histograms grow exactly, and the clipping limit is the best of those tried."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deploycc.core.formats import FP8, INT8
from deploycc.quant.observers import BINS, Histogram, Observer, clip_limit

law = settings(max_examples=50, deadline=None, derandomize=True, database=None)
magnitudes = arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 2.0**40, width=32))


def counted(batches: list[np.ndarray]) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    return one.exponent == other.exponent and bool(np.array_equal(one.counts, other.counts))


@law
@given(magnitudes, st.randoms(use_true_random=False))
def test_neither_order_nor_batches_matter(values: np.ndarray, rng: object) -> None:
    shuffled = values.copy()
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    whole = counted([values])
    assert same(whole, counted([v[None] for v in shuffled]))
    assert same(whole, counted(np.array_split(shuffled, 3)))


@law
@given(magnitudes)
def test_counts_are_those_of_numpy(values: np.ndarray) -> None:
    histogram = counted([v[None] for v in values])
    top = 2.0**histogram.exponent
    assert values.max() < top
    assert histogram.exponent == -24 or values.max() >= top / 2
    expected, _ = np.histogram(values.astype(np.float64), bins=BINS, range=(0.0, top))
    np.testing.assert_array_equal(histogram.counts, expected)


def test_a_large_jump_keeps_every_count() -> None:
    histogram = counted([np.float32([1e-7, 2e-7, 0.0]), np.float32([3e38])])
    assert histogram.exponent == 128
    assert histogram.counts[0] == 3
    assert histogram.counts.sum() == 4


def test_an_empty_batch_changes_nothing() -> None:
    assert same(counted([np.zeros(0, np.float32)]), Histogram())


def test_the_limit_is_the_largest_magnitude() -> None:
    observer = Observer()
    assert observer.limit == 0.0
    observer.extend(-3.0, 1.0)
    observer.extend(-1.0, 2.0)
    assert (observer.low, observer.high, observer.limit) == (-3.0, 2.0, 3.0)


def observed(values: np.ndarray) -> Observer:
    observer = Observer()
    observer.extend(float(values.min()), float(values.max()))
    observer.histogram.add(np.abs(values))
    return observer


def squared_error(values: np.ndarray, limit: float) -> float:
    step = limit / 127
    codes = np.clip(np.rint(values.astype(np.float64) / step), -127, 127)
    return float(((codes * step - values) ** 2).sum())


@pytest.mark.parametrize("kind", ["normal", "outlier", "uniform"])
def test_int8_clips_where_brute_force_does(kind: str) -> None:
    """The histogram knows values to half a bin, so the error of its choice is compared, not the choice."""
    rng = np.random.default_rng(3)
    values = {
        "normal": rng.standard_normal(20000),
        "outlier": np.append(rng.standard_normal(20000), [40.0]),
        "uniform": rng.uniform(-1, 1, 20000),
    }[kind].astype(np.float32)
    limit = clip_limit(observed(values), INT8)
    trials = np.abs(values).max() * np.linspace(1.0, 0.2, 80)
    best = min(squared_error(values, float(t)) for t in trials)
    assert squared_error(values, limit) <= best * 1.001
    assert limit == pytest.approx(np.abs(values).max(), rel=0.02) if kind == "uniform" else limit < np.abs(values).max()


def test_fp8_keeps_the_maximum() -> None:
    values = np.append(np.random.default_rng(3).standard_normal(1000), [40.0]).astype(np.float32)
    assert clip_limit(observed(values), FP8) == 40.0


def test_nothing_sampled_keeps_the_maximum() -> None:
    observer = Observer()
    observer.extend(-2.0, 5.0)
    assert clip_limit(observer, INT8) == 5.0
    assert clip_limit(Observer(), INT8) == 0.0
