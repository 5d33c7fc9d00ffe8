from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from pass_graphs import apply, codes, graph, operators

from deploycc.quant.regions import partition
from passes.decompose_attention import DecomposeAttention

DECOMPOSE = DecomposeAttention()
FOUR = "float[N,2,5,8] q, float[N,2,5,8] k, float[N,2,5,8] v"
THREE = "float[N,5,16] q, float[N,5,16] k, float[N,5,16] v"
CASES = {
    "four dimensions": (FOUR, "float[N,2,5,8] y", "y = Attention(q, k, v)"),
    "scale": (FOUR, "float[N,2,5,8] y", "y = Attention<scale=0.5>(q, k, v)"),
    "mask": (f"{FOUR}, float[5,5] m", "float[N,2,5,8] y", "y = Attention(q, k, v, m)"),
    "boolean mask": (f"{FOUR}, bool[5,5] m", "float[N,2,5,8] y", "y = Attention(q, k, v, m)"),
    "three dimensions": (THREE, "float[N,5,16] y", "y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)"),
}


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_decomposition_computes_the_same(case: str) -> None:
    inputs, output, node = CASES[case]
    before = graph(f"({inputs}) => ({output}) {{ {node} }}", opset=23)
    after = apply(before, DECOMPOSE)
    assert "Attention" not in operators(after)
    assert operators(after).count("MatMul") == 2
    draw = np.random.default_rng(0)
    feeds = {}
    for value in before.graph.inputs:
        shape = [3 if not isinstance(d, int) else d for d in value.shape]
        random = draw.standard_normal(shape).astype(np.float32)
        feeds[value.name] = np.tril(np.ones(shape, bool)) if value.dtype == ir.DataType.BOOL else random
    np.testing.assert_allclose(outputs(after, feeds), outputs(before, feeds), rtol=0, atol=64 * 2.0**-24)


@pytest.mark.parametrize("case", ["four dimensions", "three dimensions"])
def test_the_result_is_an_attention_region(case: str) -> None:
    inputs, output, node = CASES[case]
    regions = partition(apply(graph(f"({inputs}) => ({output}) {{ {node} }}", opset=23), DECOMPOSE))
    assert [r.kind for r in regions] == ["attention"]


@pytest.mark.parametrize(
    ("inputs", "node", "code"),
    [
        (FOUR, "y = Attention<softcap=2.0>(q, k, v)", "FORM"),
        (FOUR, "y = Attention<is_causal=1>(q, k, v)", "FORM"),
        ("float[N,4,5,8] q, float[N,2,5,8] k, float[N,2,5,8] v", "y = Attention(q, k, v)", "GROUPED"),
        ("float[N,2,5,D] q, float[N,2,5,D] k, float[N,2,5,D] v", "y = Attention(q, k, v)", "SHAPE"),
    ],
)
def test_declines(inputs: str, node: str, code: str) -> None:
    assert codes(graph(f"({inputs}) => (float[N,H,5,E] y) {{ {node} }}", opset=23), DECOMPOSE) == [code]
