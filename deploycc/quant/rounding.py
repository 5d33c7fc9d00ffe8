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
from deploycc.quant.layers import Layer, codes_of, moments_of, quantized_layers

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
    groups = _sharing_rows([layer for layer in wanted if layer.key not in known])
    for start in range(0, len(groups), _TOGETHER):
        some = groups[start : start + _TOGETHER]
        for i, (group, moments) in enumerate(
            zip(some, moments_of(model, [g[0] for g in some], data.take(SAMPLES), reference, batch), strict=True)
        ):
            columns = [layer.columns() for layer in group]
            found = rounded(np.concatenate(columns, axis=1), moments.gram, format=group[0].format, base=plan.base)
            parts = np.split(found, np.cumsum([c.shape[1] for c in columns])[:-1], axis=1)
            for layer, old, new in zip(group, columns, parts, strict=True):
                known[layer.key] = layer.back(new)
                if layer.bias is not None:
                    known[layer.bias_key] = _corrected(layer.bias, moments.mean @ old - moments.quantized @ new)
            progress(start + i + 1, len(groups))
    biases = {layer.bias.name or "": known[layer.bias_key] for layer in wanted if layer.bias is not None}
    return {layer.weight: known[layer.key] for layer in wanted} | biases


def _sharing_rows(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return layers in groups that multiply the same rows, such as the projections to query, key and value."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        windows = layer.weight if layer.node.op_type == "Conv" else ""
        groups.setdefault((layer.source, layer.format.name, windows), []).append(layer)
    return list(groups.values())


def rounded(weight: np.ndarray, gram: np.ndarray, *, format: Format, base: Format) -> np.ndarray:
    """Return ``weight [inputs, outputs]`` on a grid per output, with the least ``sum e^T gram e`` that one sweep finds.

    Args:
        weight: float64.
        gram: ``[inputs, inputs]``, positive semidefinite.
        format: INT8 or FP8, whose codes make the grid.
        base: the floating-point format in which scales are stored.
    """
    energy = np.diag(gram)
    step = _steps(weight, energy, format, base)
    order = np.argsort(-energy, kind="stable")
    upper = inverse_factor(gram[np.ix_(order, order)] + np.diag(np.full(len(gram), DAMPING * max(float(energy.mean()), 1e-30))))
    left = weight[order] / step  # what is still to be rounded, in codes
    codes = np.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = np.empty((stop - start, weight.shape[1]))
        for i in range(start, stop):
            left[i] -= upper[start:i, i] @ errors[: i - start]  # what this block's errors leave to this input
            codes[i] = codes_of(left[i], format)
            np.subtract(left[i], codes[i], out=errors[i - start])
            errors[i - start] /= upper[i, i]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    back = np.empty_like(codes)
    back[order] = codes * step
    return anchored(back, step, format)


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
