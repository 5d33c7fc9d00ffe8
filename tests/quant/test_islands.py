"""What stays in FP32: numbers on their way to a decision, and numbers that FP16 cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from small_graphs import dataset, graph, random, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.quant.islands import decision_islands, islands_of
from deploycc.quant.regions import partition

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir


def islands(model: ir.Model) -> dict[str, str]:
    return decision_islands(model, partition(model))


def test_what_lies_between_a_weighted_op_and_an_index() -> None:
    model = graph(
        """(float[N,32] x) => (int64[N,1] y, float[N,32] z)
        { m = MatMul(x, w) s = Sigmoid(m) t = Mul(m, k) u = Tanh(t) y = ArgMax<axis=1>(u) z = Relu(t) }""",
        w=weight(32, 32),
        k=np.float32(2.0),
    )
    found = islands(model)
    assert set(found) == {"n_u", "n_t"}
    assert set(found.values()) == {"D1: reaches the decision 'n_y' (ArgMax)"}


def test_a_cast_to_integers_decides() -> None:
    """It truncates; 5000.5 pixels would be 5000 in FP32 and 5000 or 5004 in FP16."""
    model = graph(
        "(float[N,32] x) => (int64[N,32] y, float16[N,32] z) { t = Mul(x, k) y = Cast<to=7>(t) u = Neg(x) z = Cast<to=10>(u) }",
        k=np.float32(2.0),
    )
    assert islands(model) == {"n_t": "D1: reaches the decision 'n_y' (Cast)"}


def test_integers_are_no_islands() -> None:
    assert islands(graph("(int64[N] x, float[N] z) => (bool[N] y, float[N] a) { t = Neg(x) y = Greater(t, x) a = Neg(z) }")) == {}


def test_values_near_the_largest_fp16_number(tmp_path: Path) -> None:
    model = graph(
        "(float[N,8] x) => (float[N,8] y) { a = Mul(x, big) b = Mul(a, small) c = Neg(b) y = Relu(c) }",
        big=np.float32(30000),
        small=np.float32(1e-4),
    )
    x = np.clip(random(4, 8), -3, 3)
    x[0, 0] = 2.0
    found = islands_of(model, dataset(tmp_path, model, x=x), reference=OnnxRuntime(), batch=2)
    reached = f"{np.abs(x).max() * 30000:.3g}"
    assert found == {"n_a": f"N1: reaches {reached}, FP16 ends at 65504"}
