"""Top-1 and intersection over union, and labels that fit nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from small_graphs import dataset, graph, random

from deploycc.core.errors import UsageError
from deploycc.verify.accuracy import Accuracy, score

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MODEL = "(float[N,2,2] x) => (float[N,2,2] y) { y = Relu(x) }"


class Answers:
    """An executor that returns its input under other names, changed by a function."""

    def __init__(self, **outputs: object) -> None:
        self.outputs = outputs

    def __call__(self, feeds: dict[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        return {name: make(feeds["x"]) for name, make in self.outputs.items()}  # type: ignore[operator]


def test_top_1(tmp_path: Path) -> None:
    x = np.zeros((5, 2, 2), np.float32)
    x[:, 0] = [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]
    data = dataset(tmp_path, graph(MODEL), x=x, labels=np.array([0, 1, 0, 0, 0]))
    right, wrong = Answers(mask=lambda v: v, y=lambda v: v[:, 0]), Answers(y=lambda v: -v[:, 0])
    assert score({"fp32": right, "built": wrong}, data, batch=2) == ("top-1", {"fp32": 80.0, "built": 20.0})


def test_intersection_over_union(tmp_path: Path) -> None:
    x = np.float32([[[1, 1], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    labels = np.float32([[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]]).astype(bool)
    data = dataset(tmp_path, graph(MODEL), x=x, labels=labels)
    # One of two pixels, none of two, and two empty masks, which agree.
    assert score({"a": Answers(y=lambda v: v)}, data, batch=2) == ("mIoU@0.5", {"a": pytest.approx(50.0)})


def test_labels_that_fit_no_output(tmp_path: Path) -> None:
    data = dataset(tmp_path, graph(MODEL), x=random(2, 2, 2), labels=np.zeros((2, 7), bool))
    with pytest.raises(
        UsageError, match=r"labels of shape \[2, 7\] fit no output \(y \[2, 2, 2\]\)\. Where: --eval\. Fix: give class indices"
    ):
        score({"a": Answers(y=lambda v: v)}, data, batch=2)


def test_a_label_beyond_the_classes(tmp_path: Path) -> None:
    data = dataset(tmp_path, graph(MODEL), x=random(2, 2, 2), labels=np.array([0, 2]))
    with pytest.raises(UsageError, match=r"the label 2 is beyond the 2 classes of the output\. Where: --eval\. Fix: count the classes"):
        score({"a": Answers(y=lambda v: v[:, 0])}, data, batch=2)


def test_no_labels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no labels\. Where: --eval\."):
        score({}, dataset(tmp_path, graph(MODEL), x=random(2, 2, 2)), batch=2)


def test_the_drop_is_in_points() -> None:
    assert Accuracy("top-1", 92.5, 92.0, 100).drop == 0.5
    assert Accuracy("top-1", 92.0, 92.5, 100).drop == -0.5
