"""The formulas of a comparison on arrays made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from small_graphs import dataset, graph, random

from deploycc.verify.numerics import PERFECT_DB, Comparison, compare

if TYPE_CHECKING:
    from pathlib import Path

Arrays = dict[str, np.ndarray]


@dataclass
class Replay:
    """An executor that answers each batch with the rows of prepared outputs."""

    outputs: Arrays
    done: int = 0

    def __call__(self, feeds: Arrays, outputs: Sequence[str] | None = None) -> Arrays:
        size = len(feeds["x"])
        self.done += size
        return {k: v[self.done - size : self.done] for k, v in self.outputs.items()}


Compare = Callable[..., Comparison]


@pytest.fixture
def compared(tmp_path: Path) -> Compare:
    """Return a function that compares two arrays of results, batch by batch."""

    def compare_here(reference: object, built: object, *, batch: int = 2) -> Comparison:
        a, b = np.asarray(reference), np.asarray(built)
        data = dataset(tmp_path, graph("(float[N,1] x) => (float[N,1] y) { y = Relu(x) }"), x=random(len(a), 1))
        (result,) = compare(Replay({"y": a}), Replay({"y": b}), data, batch=batch)
        return result

    return compare_here


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_formulas(compared: Compare, batch: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((5, 3, 4)).astype(np.float32)
    b = a + (rng.standard_normal(a.shape) * 0.01).astype(np.float32)
    result = compared(a, b, batch=batch)
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert result.sqnr_db == pytest.approx(10 * math.log10((x**2).sum() / ((x - y) ** 2).sum()))
    assert result.cosine == pytest.approx((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))
    assert result.max_abs == np.abs(x - y).max()
    assert (result.output, result.agreement, result.finite, result.samples) == ("y", None, True, 5)


def test_equal_outputs_are_perfect(compared: Compare) -> None:
    a = np.ones((3, 4), np.float32)
    assert compared(a, a) == Comparison("y", PERFECT_DB, 1.0, 0.0, 1.0, True, 3)
    assert compared(a * 0, a * 0).sqnr_db == PERFECT_DB


def test_noise_without_a_signal(compared: Compare) -> None:
    result = compared(np.zeros((2, 1, 4)), np.ones((2, 1, 4)))
    assert (result.sqnr_db, result.cosine) == (-PERFECT_DB, 0.0)


class TestAgreement:
    def test_of_classes(self, compared: Compare) -> None:
        a = np.float32([[0, 2, 1], [5, 1, 0], [1, 2, 9], [3, 2, 1]])
        b = np.float32([[0, 9, 1], [1, 5, 0], [1, 2, 3], [3, 2, 1]])
        assert compared(a, b).agreement == 0.75

    def test_of_maps(self, compared: Compare) -> None:
        a = np.float32([[[0.1, 0.9]], [[0.6, 0.4]]])
        b = np.float32([[[0.2, 0.6]], [[0.4, 0.45]]])
        assert compared(a, b).agreement == 0.75

    def test_of_one_column(self, compared: Compare) -> None:
        """A single score per sample has no argmax; in 0..1 its side of one half counts."""
        assert compared(np.float32([[0.2], [0.7]]), np.float32([[0.3], [0.4]])).agreement == 0.5

    def test_is_none_when_a_later_batch_leaves_the_interval(self, compared: Compare) -> None:
        a = np.float32([[[0.1]], [[0.2]], [[7.0]], [[0.3]]])
        assert compared(a, a, batch=1).agreement is None
        assert compared(a[::-1], a[::-1], batch=1).agreement is None


class TestNotFinite:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_in_the_built_model(self, compared: Compare, bad: float) -> None:
        result = compared(np.ones((2, 1, 2)), np.array([[[1.0, bad]], [[1.0, 1.0]]]))
        assert not result.finite
        assert math.isfinite(result.sqnr_db)
        assert result.max_abs == 1.0

    def test_where_the_original_is_not_finite_either(self, compared: Compare) -> None:
        """A model may answer -inf on purpose; what TensorRT answers there says nothing about precision."""
        a = np.array([[[1.0, -np.inf]], [[np.nan, 2.0]]])
        result = compared(a, np.array([[[1.0, -65504.0]], [[np.nan, 2.0]]]))
        assert result.finite
        assert result.sqnr_db == PERFECT_DB


def test_results_of_another_number_are_all_noise(compared: Compare) -> None:
    result = compared(np.ones((2, 1, 3)), np.ones((2, 1, 4)))
    assert result.sqnr_db == pytest.approx(10 * math.log10(6 / 14))
    assert result.agreement is None


def test_outputs_keep_their_order_and_progress_is_told(tmp_path: Path) -> None:
    model = graph("(float[N,1] x) => (float[N,1] y) { y = Relu(x) }")
    outputs = {"b": random(5, 2), "a": random(5, 2), "flag": np.ones((5, 1), bool)}
    steps: list[tuple[int, int]] = []
    data = dataset(tmp_path, model, x=random(5, 1))
    found = compare(Replay(outputs), Replay(outputs), data, batch=2, progress=lambda done, total: steps.append((done, total)))
    assert [c.output for c in found] == ["b", "a"]
    assert steps == [(2, 5), (4, 5), (5, 5)]
