"""Score executors on labelled data: top-1 for class indices, mean intersection-over-union for masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from deploycc.core.backend import Executor
    from deploycc.core.data import Dataset

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The score of the FP32 original and of the built model, in percent, on the same samples."""

    metric: str
    fp32: float
    built: float
    samples: int

    @property
    def drop(self) -> float:
        """Return how many points were lost (negative: gained)."""
        return self.fp32 - self.built


def score(
    executors: Mapping[str, Executor], data: Dataset, *, batch: int, progress: Progress = lambda done, total: None
) -> tuple[str, dict[str, float]]:
    """Return the metric's name and each executor's score in percent.

    Labels of shape ``[N]`` and integer type are class indices (top-1 of the first output of shape ``[N, C]``); labels of the
    shape of the first output are masks (mean over samples of the intersection over union at 0.5).

    Raises:
        UsageError: when there are no labels, or they fit no output.
    """
    if data.labels is None:
        raise UsageError(f"{data.source} holds no labels", at="--eval", fix="add an array named 'labels'")
    totals, done, metric = dict.fromkeys(executors, 0.0), 0, ""
    for feeds in data.batches(batch):
        size = len(next(iter(feeds.values())))
        labels = data.labels[done : done + size]
        for name, run in executors.items():
            metric, points = _points(run(feeds), labels)
            totals[name] += points
        done += size
        progress(done, data.samples)
    return metric, {name: 100.0 * total / done for name, total in totals.items()}


def _points(outputs: Mapping[str, np.ndarray], labels: np.ndarray) -> tuple[str, float]:
    for value in outputs.values():
        if labels.ndim == 1 and value.ndim == 2 and value.shape[1] > 1:
            if labels.size and labels.max() >= value.shape[1]:
                raise UsageError(
                    f"the label {labels.max()} is beyond the {value.shape[1]} classes of the output",
                    at="--eval",
                    fix="count the classes from 0, in the order in which the model was trained",
                )
            return "top-1", float((value.argmax(1) == labels).sum())
        if labels.ndim > 1 and value.shape == labels.shape:
            axes = tuple(range(1, value.ndim))
            found, wanted = value > 0.5, labels > 0.5
            union = (found | wanted).sum(axes)
            return "mIoU@0.5", float(np.where(union == 0, 1.0, (found & wanted).sum(axes) / np.maximum(union, 1)).sum())
    shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in outputs.items())
    raise UsageError(
        f"labels of shape {list(labels.shape)} fit no output ({shapes})",
        at="--eval",
        fix="give class indices [N] or masks of an output's shape",
    )
