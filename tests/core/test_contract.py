"""Every clause of the contracts on a graph that breaks it and one that does not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import graph

from deploycc.core.contract import (
    CANONICAL,
    LOWERED,
    QUANTIZED,
    Clause,
    activations_are_per_tensor,
    functions_are_inlined,
    nodes_have_unique_names,
    scales_are_sound,
    values_are_defined,
    violations,
)

PAIR = "(float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"


def pair(scale: object = 0.5, zero: object = 0) -> ir.Model:
    return graph(PAIR, s=np.asarray(scale, np.float32), z=np.asarray(zero, np.int8))


def broken(clause: Clause, model: ir.Model) -> list[str]:
    return list(clause(model))


def test_a_sound_graph_keeps_every_contract() -> None:
    for contract in (CANONICAL, QUANTIZED, LOWERED):
        assert list(violations(pair(), contract)) == []


def test_names_are_unique() -> None:
    model = pair()
    for node in model.graph:
        node.name = "same"
    assert broken(nodes_have_unique_names, model) == ["the node name 'same' is used 2 times"]
    model.graph[0].name = ""
    assert broken(nodes_have_unique_names, model) == ["the node name '' is used 1 times"]


def test_values_are_produced_before_they_are_read() -> None:
    model = graph("(float[N,4] x) => (float[N,4] y) { h = Relu(x) y = Neg(h) }")
    first = model.graph[0]
    model.graph.remove(first)
    model.graph.append(first)
    assert broken(values_are_defined, model) == ["'n_y' reads 'h', which nothing before it produces"]
    model.graph.outputs.append(ir.Value(name="lost"))
    assert broken(values_are_defined, model)[-1] == "the output 'lost' is never produced"


@pytest.mark.parametrize(("domain", "count"), [("custom", 1), ("deploycc", 0)])
def test_functions_are_inlined(domain: str, count: int) -> None:
    model = pair()
    value = ir.Value(name="a")
    model.functions[domain, "f", ""] = ir.Function(
        domain, "f", graph=ir.Graph([value], [value], nodes=[], opset_imports={"": 21}), attributes=[]
    )
    assert broken(functions_are_inlined, model) == [f"the function '{domain}::f' is not inlined"] * count


class TestScales:
    @pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
    def test_are_finite_and_positive(self, scale: float) -> None:
        """R2."""
        assert broken(scales_are_sound, pair(scale)) == [
            "'n_q' has a scale that is not finite and positive (R2)",
            "'n_y' has a scale that is not finite and positive (R2)",
        ]

    def test_are_constant(self) -> None:
        """R1."""
        model = graph(PAIR.replace("x)", "x, float s)", 1), z=np.int8(0))
        assert broken(scales_are_sound, model) == ["'n_q' has a computed scale (R1)", "'n_y' has a computed scale (R1)"]

    def test_zero_points_are_zero(self) -> None:
        assert broken(scales_are_sound, pair(zero=3))[0] == "'n_q' has a zero point that is not a constant zero (R1)"
        computed = graph(PAIR.replace("x)", "x, int8 z)", 1), s=np.float32(0.5))
        assert broken(scales_are_sound, computed)[0] == "'n_q' has a zero point that is not a constant zero (R1)"

    def test_zero_points_may_be_absent(self) -> None:
        model = graph("(float[N,4] x) => (uint8[N,4] q) { q = QuantizeLinear(x, s) }", s=np.float32(0.5))
        assert list(violations(model, QUANTIZED)) == []


class TestActivations:
    def test_have_one_scale(self) -> None:
        """R4."""
        found = broken(activations_are_per_tensor, pair(np.full(4, 0.5), np.zeros(4)))
        assert found == ["'n_q' quantizes an activation with 4 scales (R4)"]

    def test_have_a_scalar(self) -> None:
        """T2."""
        assert broken(activations_are_per_tensor, pair([0.5], [0])) == ["'n_q' has a scale of shape [1] instead of [] (T2)"]

    def test_weights_may_have_many(self) -> None:
        text = "(float[N,4] x) => (float[4,4] y) { q = QuantizeLinear(w, s, z) y = DequantizeLinear(q, s, z) }"
        model = graph(text, w=np.eye(4, dtype=np.float32), s=np.full(4, 0.5, np.float32), z=np.zeros(4, np.int8))
        assert broken(activations_are_per_tensor, model) == []
