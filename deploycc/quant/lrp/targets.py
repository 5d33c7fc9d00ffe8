"""Where gradient and relevance start: which outputs, and which of their elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deploycc.core.errors import UsageError
from deploycc.core.graph import FLOAT_TYPES
from deploycc.quant.classes import class_axis

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.quant.lrp.tape import Cotangents


def explained_values(graph: ir.Graph) -> tuple[ir.Value, ...]:
    """Return what is explained: every floating-point output, and of a final softmax what it is computed from.

    Raises:
        UsageError: when no output is a floating-point tensor that something computes.
    """
    found: dict[ir.Value, None] = {}
    for value in graph.outputs:
        producer = value.producer()
        if value.dtype not in FLOAT_TYPES or producer is None:
            continue
        before = producer.inputs[0] if producer.op_type in {"Softmax", "LogSoftmax"} else None
        found[before or value] = None
    if found:
        return tuple(found)
    raise UsageError(
        "no output of the model is a floating-point tensor, so there is nothing to explain",
        at=f"outputs {', '.join(str(v.name) for v in graph.outputs)}",
        fix="use --sensitivity sqnr",
    )


def seeds(values: Mapping[ir.Value, Tensor], labels: np.ndarray | None, seed: Callable[[Tensor, np.ndarray | None], Tensor]) -> Cotangents:
    """Return what ``seed`` makes of each explained tensor, all outputs alike; labels belong to the first that has classes."""
    result: Cotangents = {}
    for value, y in values.items():
        owned = labels if class_axis(y.shape) is not None else None
        result[value] = seed(y, owned) / len(values)
        labels = labels if owned is None else None
    return result


def chosen(y: Tensor, labels: np.ndarray | None) -> Tensor:
    """Return weights of the shape of ``y`` that say what is explained; they sum to 1 for each sample.

    With classes: the label where one is given, else the largest, at each place (a token, a pixel), all places alike. Labels are
    class indices of shape ``[N]``, or ``[N, ...]`` with one per place. Without classes (a saliency map, a number): the places where
    the output is positive, all alike; all places where none is.
    """
    axis = class_axis(y.shape)
    if axis is None:
        lit = (y > 0).to(y.dtype).flatten(1) if y.ndim > 1 else torch.ones(len(y), 1)
        lit = torch.where(lit.sum(1, keepdim=True) > 0, lit, torch.ones_like(lit))
        return (lit / lit.sum(1, keepdim=True)).reshape(y.shape)
    classes = _labelled(y, axis, labels)
    weights = torch.zeros_like(y).scatter_(axis, classes.unsqueeze(axis), 1.0)
    return weights / (y[0].numel() // y.shape[axis])


def _labelled(y: Tensor, axis: int, labels: np.ndarray | None) -> Tensor:
    """Return the class at each place: labels where they fit the output and are among its classes, else the prediction."""
    predicted = y.argmax(axis)
    if labels is None or labels.dtype.kind not in "iu":
        return predicted
    known = torch.from_numpy(labels.astype(np.int64))
    if known.ndim == predicted.ndim + 1 and known.shape[1] == 1:
        known = known.squeeze(1)
    if known.shape != predicted.shape:
        return predicted
    return torch.where((known >= 0) & (known < y.shape[axis]), known, predicted)


def loss_gradient(y: Tensor, labels: np.ndarray | None, samples: Tensor) -> Tensor:
    """Return the gradient of the negative log-likelihood at ``y``: ``softmax(y) - onehot``; without classes, a random sign (a Gaussian)."""
    axis = class_axis(y.shape)
    if axis is None:
        return signs(y, samples)
    weights = chosen(y, labels)
    return torch.softmax(y, axis) * weights.sum(axis, keepdim=True) - weights


def curvature_probe(y: Tensor, samples: Tensor) -> Tensor:
    """Return ``u`` with ``E[u u^T]`` the Hessian of the loss at ``y``, so that ``E |J^T u|^2`` is a Gauss-Newton trace (Hutchinson).

    For the cross-entropy of a softmax: ``u = sqrt(p) v - p (sqrt(p) . v)`` with random signs ``v``, since that has the
    covariance ``diag(p) - p p^T``. Without classes the loss is the squared error, and ``u = v``.
    """
    axis, v = class_axis(y.shape), signs(y, samples)
    if axis is None:
        return v
    p = torch.softmax(y, axis)
    return p.sqrt() * v - p * (p.sqrt() * v).sum(axis, keepdim=True)


def signs(y: Tensor, samples: Tensor) -> Tensor:
    """Return random signs, each sample's from its own number in the data set, so that batches do not matter."""
    rows = []
    for number in samples.tolist():
        generator = torch.Generator().manual_seed(int(number))
        rows.append(torch.randint(0, 2, y.shape[1:], generator=generator).to(y.dtype) * 2 - 1)
    return torch.stack(rows)
