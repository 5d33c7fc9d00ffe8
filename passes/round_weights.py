"""Replace weights by ones that lie on the grid of their format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import constant
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite


@dataclass(frozen=True, slots=True)
class RoundWeights:
    """Replace weights by ones that lie on the grid of their format, chosen for the least error at the output of their layer.

    Why: rounded one by one, the errors of the weights of correlated inputs add up; rounded together, they make up for each other. The
    engine has the same kernels and the same size.

    Before / After:
        ``MatMul(x, w)`` / ``MatMul(x, w')``, where ``insert-qdq`` finds exactly the codes of ``w'``

    Declines when:
        NO_WEIGHT: the graph has no such weight, or one of another shape.

    Options:
        weights: the new values, by initializer.

    See: GPTQ, arXiv 2210.17323; ``deploycc.quant.rounding``.
    """

    weights: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    phase: ClassVar[Phase] = "quantize"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        for name, weight in self.weights.items():
            value = model.graph.initializers.get(name)
            old = constant(value)
            if value is None or old is None or old.shape != weight.shape:
                declines.append(Decline(name, "NO_WEIGHT", f"the graph has no weight '{name}' of shape {weight.shape}"))
                continue
            change = float(np.linalg.norm((weight - old).astype(np.float64)) / max(float(np.linalg.norm(old.astype(np.float64))), 1e-30))
            value.const_value = ir.tensor(weight.astype(old.dtype), name=name)
            rewrites.append(Rewrite(name, "rounded for the output of its layer", f"|w' - w| = {change:.3g} |w|"))
        return PassResult(tuple(rewrites), tuple(declines))
