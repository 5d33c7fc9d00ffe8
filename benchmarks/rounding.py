"""What each way of making quantized weights err less brings, none of which trains: SQNR and accuracy on held-out images, and its seconds.

    python benchmarks/rounding.py                               # the models of examples/
    python benchmarks/rounding.py --format fp8 examples/fashion/vit.onnx

Every layer is quantized; only the weights (and biases) of the dense layers and convolutions differ between the lines:

    nearest      every weight to its nearest code, the step from the largest weight of its output
    mse          the step with the least squared error of the weights
    energy       the step with the least error, each input weighted by its energy on calibration data
    + bias       nearest, and the mean error of every output taken out of its bias (bias correction)
    adaround     up or down by gradient descent on the error of the layer's outputs (Nagel et al., arXiv 2004.10568)
    gptq         one after the other, each making up for those before it (``deploycc.quant.rounding``): what a build does
    gptq + bias  the same, and the mean error taken out of the bias
    erq + gptq   first the weights that make up best for the rounding of the inputs (Zhong et al., arXiv 2407.06794), then gptq
    ... + bias   the same, and the mean error taken out of the bias
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table
from sensitivity import EVALUATION, EXTRA, MODELS, ROOT, Subject, measured, subject

from deploycc.core.formats import FORMATS, INT8, Format
from deploycc.core.plan import PrecisionPlan
from deploycc.core.quantizers import largest_code
from deploycc.quant.allocate import uniform
from deploycc.quant.layers import Layer, codes_of, quantized_layers, scaled_rows
from deploycc.quant.rounding import anchored, rounded
from passes.insert_qdq import InsertQdq
from passes.round_weights import RoundWeights

STEPS, RATE = 600, 1e-2  # of AdaRound


@dataclass
class Moments:
    """Of the inputs ``x`` of a layer and the quantized inputs ``q``: means ``[inputs]``, and second moments ``[inputs, inputs]``."""

    x: Any = 0.0
    q: Any = 0.0
    xq: Any = 0.0
    qq: Any = 0.0
    rows: int = 0


def moments_of(each: Subject, layers: list[Layer]) -> list[Moments]:
    """Return the moments of every layer over the calibration data."""
    found = [Moments() for _ in layers]
    for i, scaled in scaled_rows(each.model, layers, each.calibration.take(32), each.reference, 16):
        layer, m = layers[i], found[i]
        x = scaled.astype(np.float64) * layer.scale
        q = codes_of(scaled, layer.format).astype(np.float64) * layer.scale
        m.x, m.q, m.xq, m.qq, m.rows = m.x + x.sum(0), m.q + q.sum(0), m.xq + x.T @ q, m.qq + q.T @ q, m.rows + len(x)
    for m in found:
        m.x, m.q, m.xq, m.qq = m.x / m.rows, m.q / m.rows, m.xq / m.rows, m.qq / m.rows
    return found


def searched(weight: np.ndarray, energy: np.ndarray, format: Format, *, shrinks: np.ndarray) -> np.ndarray:
    """Return the weight on the grid per output whose step, among the largest times ``shrinks``, errs least under ``energy``."""
    largest = np.abs(weight).max(0) / largest_code(format)
    trials = [codes_of(weight / (s * largest), format) * s * largest for s in (shrinks if format == INT8 else (1.0,))]
    errors = np.stack([energy @ (t - weight) ** 2 for t in trials])
    return np.asarray(np.take_along_axis(np.stack(trials), errors.argmin(0)[None, None], 0)[0])


def adaround(weight: np.ndarray, gram: np.ndarray, format: Format) -> np.ndarray:
    """Return the weight with each element up or down, by gradient descent on ``tr(e^T gram e)`` with a growing pull to whole codes."""
    if format != INT8:
        raise ValueError("AdaRound is for grids with one step")
    step = np.abs(searched(weight, np.diag(gram), format, shrinks=np.linspace(1.0, 0.7, 13))).max(0) / largest_code(format)
    h, scaled = torch.from_numpy(gram / np.diag(gram).mean()), torch.from_numpy(weight / step)
    low = scaled.floor()
    share = (scaled - low).clamp(0.01, 0.99)
    v = torch.log((share + 0.1) / (1.1 - share)).requires_grad_()
    optimiser = torch.optim.Adam([v], lr=RATE)
    for i in range(STEPS):
        up = (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
        error = (low + up - scaled) * torch.from_numpy(step / step.mean())
        loss = torch.sum(error * (h @ error))
        if i > STEPS // 5:
            loss = loss + 0.01 * torch.sum(1 - (2 * up - 1).abs().clamp(min=1e-6) ** (20 - 18 * i / STEPS))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    top = largest_code(format)
    return anchored(np.clip((low + (v > 0)).numpy(), -top, top) * step, step, format)


def compensated(weight: np.ndarray, m: Moments) -> np.ndarray:
    """Return the weights that give the outputs of ``x`` best from ``q``: ``(E[q q^T] + d I)^-1 (E[q x^T] + d I) W``."""
    damping = np.eye(len(weight)) * 0.01 * np.diag(m.qq).mean()
    return np.linalg.solve(m.qq + damping, (m.xq.T + damping) @ weight)


def variants(format: Format, base: Format) -> dict[str, tuple[Callable[[np.ndarray, Moments], np.ndarray], bool]]:
    """Return by name what makes a quantized weight of a weight, and whether the bias is corrected as well."""

    def gptq(weight: np.ndarray, m: Moments) -> np.ndarray:
        return rounded(weight, m.qq, format=format, base=base)

    def nearest(weight: np.ndarray, m: Moments) -> np.ndarray:
        return searched(weight, np.ones(len(weight)), format, shrinks=np.ones(1))

    shrinks = np.linspace(1.0, 0.7, 13)
    found: dict[str, tuple[Callable[[np.ndarray, Moments], np.ndarray], bool]] = {
        "nearest": (nearest, False),
        "mse": (lambda w, m: searched(w, np.ones(len(w)), format, shrinks=shrinks), False),
        "energy": (lambda w, m: searched(w, np.diag(m.qq), format, shrinks=shrinks), False),
        "+ bias": (nearest, True),
        "adaround": (lambda w, m: adaround(w, m.qq, format), False),
        "gptq": (gptq, False),
        "gptq + bias": (gptq, True),
        "erq + gptq": (lambda w, m: gptq(compensated(w, m), m), False),
        "erq + gptq + bias": (lambda w, m: gptq(compensated(w, m), m), True),
    }
    return {name: one for name, one in found.items() if format == INT8 or name not in {"mse", "energy", "adaround"}}


def built(each: Subject, plan: PrecisionPlan, weights: Mapping[str, np.ndarray], shifts: Mapping[str, np.ndarray]) -> ir.Model:
    """Return the quantized model with these weights, and ``shifts [outputs]`` added to the outputs of nodes."""
    model: ir.Model = each.model.clone()
    RoundWeights(dict(weights))(model)
    InsertQdq(plan)(model)
    graph = model.graph
    for node in [n for n in graph if n.name in shifts]:
        output, shift = node.outputs[0], shifts[node.name or ""]
        broadcast = shift.reshape(-1, 1, 1) if node.op_type == "Conv" else shift
        readers = list(output.uses())
        value = ir.Value(name=f"{output.name}_shift", const_value=ir.tensor(broadcast.astype(np.float32), name=f"{output.name}_shift"))
        graph.register_initializer(value)
        add = ir.node("Add", [output, value], name=f"{node.name}_shift")
        graph.append(add)
        moved = add.outputs[0]
        moved.name, moved.type = f"{add.name}_out", output.type
        for reader, i in readers:
            reader.replace_input_with(i, moved)
    graph.sort()
    return model


def lines(each: Subject) -> list[tuple[str, float, float, float]]:
    """Return name, SQNR, accuracy and seconds of every variant."""
    analysis, format = each.analysis, each.analysis.formats[0]
    plan = PrecisionPlan(analysis.base, uniform(analysis.regions, format, analysis.base, {}), analysis.scales)
    layers = quantized_layers(each.model, plan)
    moments, found = moments_of(each, layers), []
    for name, (quantize, shifts_bias) in variants(format, analysis.base).items():
        start, weights, shifts = time.perf_counter(), {}, {}
        for layer, m in zip(layers, moments, strict=True):
            weight = layer.columns()
            weights[layer.weight] = layer.back(new := quantize(weight, m))
            if shifts_bias:
                shifts[layer.node.name or ""] = m.x @ weight - m.q @ new
        seconds = time.perf_counter() - start
        found.append((name, *measured(each, built(each, plan, weights, shifts)), seconds))
    return found


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--eval", type=Path, default=ROOT / EVALUATION)
    parser.add_argument("--format", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--held-out", type=int, default=1000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table("model", "weights", "SQNR dB", "top-1 %", "seconds")
    for path in arguments.models or [*(ROOT / m for m in MODELS), *sorted(ROOT.glob(EXTRA))]:
        each = subject(path, arguments.eval, format=FORMATS[arguments.format].name, calibration=64, held_out=arguments.held_out)
        for name, sqnr, accuracy, seconds in lines(each):
            table.add_row(each.name, name, f"{sqnr:.1f}", f"{accuracy:.2f}", f"{seconds:.1f}")
        table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
