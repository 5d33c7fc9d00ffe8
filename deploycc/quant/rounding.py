"""Round weights to INT8 or FP8 so that the outputs of their layer change least, instead of each weight by itself.

Inputs are rounded one after the other, those of the largest energy first, and the error of each is made up for by the inputs not yet
rounded: the closed form of optimal brain surgery on the layer's own Gram matrix H = E[x x^T] (Frantar et al., GPTQ, arXiv 2210.17323).
The INT8 step of each output channel is searched below the largest weight for the least error under the diagonal of H.

The result is a float weight that lies on the grid which ``quantize_weight`` finds, so that insertion gives exactly these codes. What mean
error is left at the outputs of an INT8 layer is taken out of its bias (Nagel et al., arXiv 1906.04721), where it has one of its own; the
errors of FP8 have next to no mean.

Other ways that need no training gain less on real models: ``benchmarks/rounding.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.formats import INT8, Format
from deploycc.core.graph import constant
from deploycc.core.quantizers import largest_code, round_scale
from deploycc.quant.layers import Layer, Moments, codes_of, moments_of, quantized_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from deploycc.core.backend import Reference
    from deploycc.core.data import Dataset
    from deploycc.core.plan import PrecisionPlan

SAMPLES = 32
DAMPING = 0.01
SHRINKS = np.linspace(1.0, 0.7, 13)
_BLOCK = 32
_TOGETHER = 64  # groups of layers whose inputs leave the runtime in one pass
_STACK = 2**23  # numbers of the matrices of layers that are rounded together


def round_weights(
    model: ir.Model,
    plan: PrecisionPlan,
    data: Dataset,
    *,
    reference: Reference,
    batch: int = 8,
    known: dict[tuple[str, str], np.ndarray] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Return the weights and biases of the layers that ``plan`` quantizes, by initializer, with the least error at their outputs.

    Args:
        model: the graph that the plan is for, in FP32; it is not changed.
        plan: what is quantized, with the scales of the inputs.
        data: calibration data, of which at most ``SAMPLES`` are used.
        reference: executes the graph.
        batch: samples per run.
        known: what earlier calls found, by weight and format; it grows.
        progress: called with groups of layers done and in all.
    """
    known, wanted = {} if known is None else known, quantized_layers(model, plan)
    groups, done = _sharing_rows([layer for layer in wanted if layer.key not in known]), 0
    for start in range(0, len(groups), _TOGETHER):
        some = groups[start : start + _TOGETHER]
        every = moments_of(model, [g[0] for g in some], data.take(SAMPLES), reference, batch)
        for alike in _stacks(some, list(every)):
            columns = [np.concatenate([layer.columns() for layer in group], axis=1) for group, _ in alike]
            grams = np.stack([moments.gram for _, moments in alike])
            found = rounded(np.stack(columns), grams, format=alike[0][0][0].format, base=plan.base)
            for (group, moments), old, new in zip(alike, columns, found, strict=True):
                _keep(group, moments, old, new, known)
            done += len(alike)
            progress(done, len(groups))
    biases = {layer.bias.name or "": known[layer.bias_key] for layer in wanted if layer.bias is not None}
    return {layer.weight: known[layer.key] for layer in wanted} | biases


def _sharing_rows(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return layers in groups that multiply the same rows, such as the projections to query, key and value."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        windows = layer.weight if layer.node.op_type == "Conv" else ""
        groups.setdefault((layer.source, layer.format.name, windows), []).append(layer)
    return list(groups.values())


def _stacks(groups: Sequence[list[Layer]], every: Sequence[Moments]) -> list[list[tuple[list[Layer], Moments]]]:
    """Return groups with their moments, together those of one size and format, as many as fit ``_STACK`` numbers."""
    alike: dict[object, list[tuple[list[Layer], Moments]]] = {}
    for group, moments in zip(groups, every, strict=True):
        size = len(moments.gram)
        outputs = sum(layer.outputs for layer in group)
        alike.setdefault((size, outputs, group[0].format.name), []).append((group, moments))
    found = []
    for (size, outputs, _), stack in alike.items():  # type: ignore[misc]
        fit = max(1, _STACK // (size * max(size, outputs)))
        found += [stack[i : i + fit] for i in range(0, len(stack), fit)]
    return found


def _keep(group: Sequence[Layer], moments: Moments, old: np.ndarray, new: np.ndarray, known: dict[tuple[str, str], np.ndarray]) -> None:
    """Put the rounded weights of a group, side by side in ``new``, and its biases into ``known``."""
    borders = np.cumsum([layer.outputs for layer in group])[:-1]
    for layer, before, after in zip(group, np.split(old, borders, axis=1), np.split(new, borders, axis=1), strict=True):
        known[layer.key] = layer.back(after)
        if layer.bias is not None:
            known[layer.bias_key] = _corrected(layer.bias, moments.mean @ before - moments.quantized @ after)


def rounded(weight: np.ndarray, gram: np.ndarray, *, format: Format, base: Format) -> np.ndarray:
    """Return ``weight`` on a grid per output, with the least ``sum e^T gram e`` that one sweep finds; layers of one size go together.

    Args:
        weight: float64 ``[layers, inputs, outputs]``, or of one layer ``[inputs, outputs]``.
        gram: ``[layers, inputs, inputs]`` or ``[inputs, inputs]``, positive semidefinite.
        format: INT8 or FP8, whose codes make the grid.
        base: the floating-point format in which scales are stored.
    """
    if weight.ndim == 2:
        return np.asarray(rounded(weight[None], gram[None], format=format, base=base)[0])
    energy = np.diagonal(gram, axis1=1, axis2=2)
    step = np.stack([_steps(w, e, format, base) for w, e in zip(weight, energy, strict=True)])
    order = np.argsort(-energy, axis=1, kind="stable")
    upper = np.stack([_spread(g, o) for g, o in zip(gram, order, strict=True)])
    left = np.take_along_axis(weight, order[:, :, None], axis=1) / step[:, None]  # what is still to be rounded, in codes
    codes = np.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        errors = np.empty((len(left), stop - start, left.shape[2]))
        within = np.ascontiguousarray(upper[:, start:stop, start:stop].swapaxes(1, 2))
        for i in range(stop - start):
            now = left[:, start + i]
            if i:
                now -= (within[:, i : i + 1, :i] @ errors[:, :i])[:, 0]  # what this block's errors leave to this input
            codes[:, start + i] = codes_of(now, format)
            np.subtract(now, codes[:, start + i], out=errors[:, i])
            errors[:, i] /= within[:, i, i, None]
        left[:, stop:] -= upper[:, start:stop, stop:].swapaxes(1, 2) @ errors
    back = np.empty_like(codes)
    np.put_along_axis(back, order[:, :, None], codes * step[:, None], axis=1)
    return np.stack([anchored(b, s, format) for b, s in zip(back, step, strict=True)])


def _spread(gram: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return how the errors of inputs in ``order`` spread, after damping."""
    damping = DAMPING * max(float(np.trace(gram)) / len(gram), 1e-30)
    return inverse_factor(gram[np.ix_(order, order)] + np.diag(np.full(len(gram), damping)))


def inverse_factor(matrix: np.ndarray) -> np.ndarray:
    """Return the upper ``U`` with ``U^T U = matrix^-1``: row by row, how an error spreads to what is still to be rounded.

    With rows and columns in reverse, ``matrix = M M^T``, and ``U`` is the inverse of ``M`` turned back: no full inverse is needed.
    """
    from scipy.linalg import cholesky
    from scipy.linalg.lapack import dtrtri

    lower = cholesky(matrix[::-1, ::-1], lower=True, check_finite=False)
    inverse, _ = dtrtri(lower, lower=1)
    return np.ascontiguousarray(inverse[::-1, ::-1])


def _steps(weight: np.ndarray, energy: np.ndarray, format: Format, base: Format) -> np.ndarray:
    """Return the step per output whose rounding to nearest has the least error, each input weighted by its energy.

    The step of FP8 floats, so its scale is that of the largest weight.
    """
    largest = np.abs(weight).max(axis=0)
    if format != INT8:
        return round_scale(largest / largest_code(format), base).astype(np.float64)
    # Which of the steps is best does not hang on the last digits: single precision is twice as fast.
    narrow, weights = weight.astype(np.float32), energy.astype(np.float32)
    best, least = np.ones(weight.shape[1]), np.full(weight.shape[1], np.inf)
    for shrink in SHRINKS:
        step = round_scale(shrink * largest / largest_code(INT8), base).astype(np.float64)
        scaled = narrow / step.astype(np.float32)
        scaled -= codes_of(scaled, format)
        error = step**2 * (weights @ np.square(scaled, out=scaled))
        better = error < least
        best, least = np.where(better, step, best), np.where(better, error, least)
    return best


def anchored(weight: np.ndarray, step: np.ndarray, format: Format) -> np.ndarray:
    """Let the largest weight of every output have the largest code, from which insertion derives the step."""
    top = largest_code(format) * step
    at = np.abs(weight).argmax(axis=0)
    outputs = np.arange(weight.shape[1])
    weight[at, outputs] = np.where(weight[at, outputs] < 0, -top, top)
    return weight


def _corrected(bias: ir.Value, shift: np.ndarray) -> np.ndarray:
    old = constant(bias)
    if old is None:
        raise TypeError(f"the bias '{bias.name}' is computed")
    return np.asarray(old + shift, old.dtype)
