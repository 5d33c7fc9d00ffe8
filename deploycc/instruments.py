"""Instruments for the pass runner: write every graph down, and compare every graph with the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploycc.core.backend import Executor, Reference
from deploycc.core.errors import BackendError
from deploycc.core.passes import Pass
from deploycc.interop import save_model

Feeds = Mapping[str, np.ndarray]
Outputs = Mapping[str, np.ndarray]


def pass_name(each: Pass) -> str:
    """Return the name of a pass as its entry point spells it: ``FoldBatchnorm`` as ``fold-batchnorm``."""
    name = type(each).__name__
    return "".join(f"-{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


@dataclass
class Dump:
    """Write the graph after each pass that changed it: ``DIR/03-fold-batchnorm.onnx``."""

    folder: Path
    count: int = 0

    def after(self, each: Pass, before: ir.Model, result: ir.Model) -> str:
        """Write one graph; never objects."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.count == 0:
            save_model(before, self.folder / "00-imported.onnx")
        self.count += 1
        save_model(result, self.folder / f"{self.count:02}-{pass_name(each)}.onnx")
        return ""


@dataclass
class VerifyEach:
    """Compare outputs before and after each pass on given and random inputs, border rows included.

    The bound follows from the arithmetic: a pass may reorder sums, and each of the ``n`` nodes on the way rounds once, so the
    error may grow to ``slack * sqrt(n) * eps`` of the largest output, slack = 256 for the length of the sums inside one node;
    eps = 2^-24, or that of the narrowest type in which the graph computes.
    """

    reference: Reference
    feeds: Sequence[Feeds]
    slack: float = 256.0
    worst: dict[str, float] = field(default_factory=dict)

    def after(self, each: Pass, before: ir.Model, result: ir.Model) -> str:
        """Return the first output that moved by more than rounding explains, or why the graph no longer runs."""
        bound = self.slack * float(np.sqrt(before.graph.num_nodes())) * _rounding(before)
        one = self.reference.executor(before)
        try:
            other = self.reference.executor(result)
            return next(filter(None, (self.compare(pass_name(each), one(f), other(f), f, bound) for f in self.feeds)), "")
        except BackendError as error:
            return f"NUMERIC: the graph no longer runs: {error.what}"

    def compare(self, name: str, expected: Outputs, found: Outputs, feeds: Feeds, bound: float) -> str:
        """Return the first output of one batch that moved by more than ``bound``."""
        for output, value in expected.items():
            error = _relative_error(value, found[output])
            self.worst[name] = max(self.worst.get(name, 0.0), error)
            if not error <= bound:
                shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in feeds.items())
                return f"NUMERIC: the output '{output}' moves by {error:.3g} of its range (bound {bound:.3g}) on {shapes}"
        return ""


def _rounding(model: ir.Model) -> float:
    """Return half the distance of 1 to the next number of the narrowest floating-point type that a node computes."""
    units = {ir.DataType.BFLOAT16: 2.0**-9, ir.DataType.FLOAT16: 2.0**-12}
    return max((units.get(v.dtype, 2.0**-24) for n in model.graph for v in n.outputs if v.dtype is not None), default=2.0**-24)


def executable(executor: Executor, feeds: Sequence[Feeds]) -> list[Feeds]:
    """Return those feeds that a model computes: not every odd size fits a network."""
    found = []
    for each in feeds:
        try:
            executor(each)
        except BackendError:
            continue
        found.append(each)
    return found


def _relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if not np.issubdtype(expected.dtype, np.floating):
        return 0.0 if np.array_equal(expected, found) else float("inf")
    same = np.array_equal(np.isfinite(expected), np.isfinite(found))
    if not same:
        return float("inf")
    finite = np.isfinite(expected)
    if not finite.any():
        return 0.0
    error = np.abs(expected[finite].astype(np.float64) - found[finite]).max()
    return float(error / max(float(np.abs(expected[finite]).max()), 1e-30))


def random_feeds(inputs: Sequence[ir.Value], shapes: Sequence[Mapping[str, tuple[int, ...]]], *, seed: int) -> list[Feeds]:
    """Return one set of random inputs per mapping of shapes: normal numbers, small integers, or booleans."""
    draw = np.random.default_rng(seed)
    found: list[Feeds] = []
    for by_name in shapes:
        feeds = {}
        for value in inputs:
            shape, dtype = by_name[value.name or ""], value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
            if np.issubdtype(dtype, np.floating):
                feeds[value.name or ""] = draw.standard_normal(shape).astype(dtype)
            else:
                feeds[value.name or ""] = draw.integers(0, 2, shape).astype(dtype)
        found.append(feeds)
    return found
