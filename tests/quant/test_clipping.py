"""Limits of ranges: by hand where that is possible, by brute force over every bin and code where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from deploycc.core.errors import UsageError
from deploycc.core.formats import FP8, INT8
from deploycc.quant.clipping import CODES, TRIALS, Entropy, MinMax, Mse, Percentile, clip_limit, divergences, parse_clipping, squared_errors
from deploycc.quant.observers import BINS, Observer

KINDS = ("normal", "outlier", "uniform", "relu", "laplace")
EVERY = (MinMax(), Percentile(), Percentile(99.0), Entropy(), Mse())


def drawn(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    values = {
        "normal": rng.standard_normal(20000),
        "outlier": np.append(rng.standard_normal(20000), [40.0]),
        "uniform": rng.uniform(-1, 1, 20000),
        "relu": np.maximum(rng.standard_normal(20000), 0),
        "laplace": rng.laplace(size=20000),
    }[kind]
    return np.asarray(values, np.float32)


def observed(values: np.ndarray) -> Observer:
    observer = Observer()
    observer.extend(float(values.min()), float(values.max()))
    observer.histogram.add(np.abs(values))
    return observer


def squared_error(values: np.ndarray, limit: float) -> float:
    step = limit / CODES
    codes = np.clip(np.rint(values.astype(np.float64) / step), -CODES, CODES)
    return float(((codes * step - values) ** 2).sum())


def divergence(counts: np.ndarray, size: int) -> float:
    """Return KL(P, Q) by the definition, one bin after another."""
    p = counts[:size].astype(float)
    p[-1] += counts[size:].sum()
    code = ((2 * np.arange(size) + 1) * CODES + size) // (2 * size)
    q = np.zeros(size)
    for level in range(CODES + 1):
        filled = (code == level) & (p > 0)
        if filled.any():
            q[filled] = counts[:size][code == level].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    if (q[p > 0] == 0).any():
        return np.inf
    return float(sum(p[b] * np.log(p[b] / q[b]) for b in range(size) if p[b] > 0))


@pytest.mark.parametrize("kind", KINDS)
def test_mse_clips_where_brute_force_does(kind: str) -> None:
    """The histogram knows values to half a bin, so the error of its choice is compared, not the choice."""
    values = drawn(kind)
    limit = clip_limit(observed(values), INT8)
    trials = np.abs(values).max() * np.linspace(1.0, 0.2, TRIALS)
    best = min(squared_error(values, float(t)) for t in trials)
    assert squared_error(values, limit) <= best * 1.001
    assert limit == pytest.approx(np.abs(values).max(), rel=0.02) if kind == "uniform" else limit < np.abs(values).max()


def test_squared_errors_are_those_of_the_middles_of_bins() -> None:
    counts = observed(drawn("laplace")).histogram.counts
    middles, limits = np.repeat(np.arange(BINS) + 0.5, counts), np.array([200.0, 777.5, 2048.0, 3999.0])
    expected = [squared_error(middles, float(limit)) for limit in limits]
    np.testing.assert_allclose(squared_errors(counts, limits), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_those_of_the_definition(kind: str) -> None:
    counts = observed(drawn(kind)).histogram.counts
    sizes = np.array([128, 129, 200, 255, 500, 1000, 2047, 3000, 4096])
    np.testing.assert_allclose(divergences(counts.astype(float), sizes), [divergence(counts, int(s)) for s in sizes], rtol=1e-8, atol=1e-12)


def test_a_distribution_that_int8_represents_has_no_divergence() -> None:
    """Two bins per code with equal counts are what spreading a code's count over its bins gives back."""
    counts = np.zeros(BINS)
    counts[: 2 * CODES] = 10.0
    assert divergences(counts, np.array([2 * CODES]))[0] == pytest.approx(0.0, abs=1e-12)
    # Half of it clipped: P = (1, ..., 1, 1 + 127) / 254 over 127 bins of one code each, and Q is even.
    halved = divergences(counts, np.array([CODES]))[0]
    p = np.append(np.full(CODES - 1, 1.0), 1.0 + CODES) / (2 * CODES)
    assert halved == pytest.approx(float((p * np.log(p * CODES)).sum()))


def test_entropy_takes_the_limit_of_least_divergence() -> None:
    observer = observed(drawn("outlier"))
    counts = observer.histogram.counts.astype(float)
    counts[0] = min(counts[0], counts[1])
    every = divergences(counts, np.arange(128, BINS + 1))
    chosen = round(Entropy().limit(observer) / observer.histogram.width)
    assert every[chosen - 128] <= np.nanmin(every) * 1.05
    assert 2.5 < Entropy().limit(observer) < 8.0


def test_zeros_do_not_draw_entropy_to_a_smaller_range() -> None:
    """They are exact at any scale."""
    values = np.abs(drawn("normal"))
    sparse = np.append(values, np.zeros(60000, np.float32))
    assert Entropy().limit(observed(sparse)) == Entropy().limit(observed(values))


def test_percentiles_by_hand() -> None:
    """100 values in the middles of 100 bins: the k-th percentile is the upper border of the k-th bin."""
    observer = observed(np.array([1.0], np.float32))
    observer.histogram.counts[:] = 0
    observer.histogram.counts[:100] = 1
    width = observer.histogram.width
    assert Percentile(50).limit(observer) == pytest.approx(50 * width)
    assert Percentile(99.5).limit(observer) == pytest.approx(99.5 * width)
    assert Percentile(100).limit(observer) == 1.0
    assert Percentile(1e-9).limit(observer) > 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_numpy(kind: str, percent: float) -> None:
    values = drawn(kind)
    observer = observed(values)
    expected = np.percentile(np.abs(values), percent)
    assert Percentile(percent).limit(observer) == pytest.approx(expected, abs=1.5 * observer.histogram.width, rel=5e-3)


@pytest.mark.parametrize("using", EVERY, ids=str)
def test_no_limit_exceeds_the_maximum(using: MinMax) -> None:
    for kind in KINDS:
        values = drawn(kind)
        assert 0.0 < using.limit(observed(values)) <= np.abs(values).max()
    assert MinMax().limit(observed(drawn("outlier"))) == 40.0


@pytest.mark.parametrize("using", EVERY, ids=str)
def test_nothing_sampled_keeps_the_maximum(using: MinMax) -> None:
    observer = Observer()
    assert using.limit(observer) == 0.0
    observer.extend(-2.0, 5.0)
    assert using.limit(observer) == 5.0
    observer.histogram.add(np.zeros(9, np.float32))
    assert 0.0 < using.limit(observer) <= 5.0


@pytest.mark.parametrize("using", EVERY, ids=str)
def test_fp8_keeps_the_maximum(using: MinMax) -> None:
    assert clip_limit(observed(drawn("outlier")), FP8, using) == 40.0


def test_names_are_read_and_written() -> None:
    for text in ("minmax", "entropy", "mse", "percentile:99.9"):
        assert str(parse_clipping(text, at="--calibration")) == text
    assert parse_clipping("percentile", at="--calibration") == Percentile(99.99)
    assert parse_clipping("auto", at="--calibration") is None


@pytest.mark.parametrize("text", ["max", "", "mse:3", "minmax:1"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match=rf"unknown way of calibration '{text}'\. Where: --calibration\. Fix: use one of auto, mse, minmax, "
    ):
        parse_clipping(text, at="--calibration")


@pytest.mark.parametrize("number", ["0", "-1", "100.1", "nan", "x", ""])
def test_percentiles_lie_between_0_and_100(number: str) -> None:
    with pytest.raises(UsageError, match=rf"'{number}' is no percentile\. Where: --calibration\. Fix: write percentile:P with P above 0"):
        parse_clipping(f"percentile:{number}", at="--calibration")
