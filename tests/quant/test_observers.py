"""Histograms grow exactly."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deploycc.quant.observers import BINS, Histogram, Observer

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
