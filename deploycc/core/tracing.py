"""What a value of a graph becomes when some values before it are given: a part of a graph, evaluated on chosen numbers.

A layout is proved by tracing the numbers 0, 1, 2, ... through it; an affine map by tracing zeros and one generic argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from deploycc.core.elements import shape_bounds
from deploycc.core.evaluation import DETERMINISTIC, Refusal, evaluate
from deploycc.core.graph import constant

LARGEST = 2**27  # bytes of one result
Given = Mapping[ir.Value, np.ndarray]


@dataclass(slots=True)
class Trace:
    """Evaluates values of one graph from ``given`` ones and constants.

    ``sizes`` gives numbers to dynamic dimensions, for nodes that read a shape.
    """

    given: Given
    opset: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    known: dict[ir.Value, np.ndarray | None] = field(default_factory=dict)

    def of(self, value: ir.Value | None) -> np.ndarray | None:
        """Return what ``value`` becomes, or None where it depends on something else or on an operator that cannot be evaluated."""
        if value is None:
            return None
        if value in self.given:
            return self.given[value]
        if value not in self.known:
            self.known[value] = constant(value)
            node = value.producer()
            if self.known[value] is None and node is not None and node.domain in {"", "ai.onnx"}:
                self.known.update(zip(node.outputs, self._results(node), strict=False))
        return self.known[value]

    def _results(self, node: ir.Node) -> list[np.ndarray]:
        if node.op_type == "Shape":
            shape = self._shape(node)
            return [] if shape is None else [shape]
        if node.op_type not in DETERMINISTIC:
            return []
        inputs = [self.of(v) for v in node.inputs]
        if any(array is None and v is not None for array, v in zip(inputs, node.inputs, strict=True)):
            return []
        results = evaluate(node, inputs, opset=self.opset, growth_limit=LARGEST)
        return [] if isinstance(results, Refusal) else results

    def _shape(self, node: ir.Node) -> np.ndarray | None:
        source = node.inputs[0]
        array = self.of(source)
        declared = array.shape if array is not None else self.shape(source)
        return None if declared is None else np.array(declared[shape_bounds(node)], np.int64)

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Return the shape of ``value`` with the given sizes for dynamic dimensions, or None where one is not given."""
        if value is None or value.shape is None:
            return None
        found = [d if isinstance(d, int) else self.sizes.get(str(d.value)) for d in value.shape]
        return None if any(d is None for d in found) else tuple(int(d) for d in found if d is not None)


def counted(shape: tuple[int, ...]) -> np.ndarray:
    """Return 1, 2, 3, ... in ``shape``, as float32, which holds them exactly up to 2^24 elements."""
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
