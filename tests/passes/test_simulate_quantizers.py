"""Where simulated quantizers go, what they compute in ONNX Runtime, and when a region is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import check, compute, graph, operators, random, transformer, weight

from deploycc.core.contract import LOWERED
from deploycc.core.formats import FP32, INT8, SIMULATED
from deploycc.core.passes import PassRecord, run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.simulation import Logarithmic, Quantizer, Uniform, fit_uniform
from deploycc.quant.regions import partition
from passes.simulate_quantizers import SimulateQuantizers

W4A4, W3A3 = SIMULATED["w4a4"], SIMULATED["w3a3"]
PRODUCT = "(float[N,8] x) => (float[N,6] y) { y = MatMul(x, w) }"
TENSOR = Uniform(4, (0.25,), (7,))


def simulated(
    model: ir.Model, quantizers: dict[str, dict[str, Quantizer]], formats: dict[str, str] | None = None
) -> tuple[ir.Model, PassRecord]:
    """Simulate every region in 4 bits, or as ``formats`` says."""
    chosen = formats or {}
    assignments = tuple(Assignment(r, SIMULATED[chosen.get(r.name, "w4a4")], "test") for r in partition(model))
    plan = PrecisionPlan(FP32, assignments, quantizers=quantizers)
    result, (record,) = run(model, [SimulateQuantizers(plan)], contract=LOWERED)
    check(result)
    return result, record


def test_before_and_expected() -> None:
    w = weight(8, 6)
    after, record = simulated(graph(PRODUCT, w=w), {"x": {"w4a4": TENSOR}})
    assert operators(after) == ["Div", "Round", "Add", "Clip", "Sub", "Mul", "MatMul"]
    constants = {name: v.const_value.numpy() for name, v in after.graph.initializers.items()}
    numbers = {name: float(array) for name, array in constants.items() if name.startswith("x_")}
    assert numbers == {"x_w4a4_scale": 0.25, "x_w4a4_zero": 7, "x_w4a4_bottom": 0, "x_w4a4_top": 15}
    assert np.array_equal(constants["w_w4a4"], fit_uniform(w, 4, axis=1).apply(w, axis=1))
    assert all(len(np.unique(column)) <= 16 for column in constants["w_w4a4"].T)
    assert "w" not in constants
    assert [(r.anchor, r.what) for r in record.rewrites] == [("n_y", "w4a4 operands, simulated")]


@pytest.mark.parametrize("quantizer", [TENSOR, Uniform(4, tuple(np.linspace(0.05, 0.5, 8).tolist()), tuple(range(4, 12)))])
def test_it_computes_what_the_quantizer_says(quantizer: Uniform) -> None:
    w, x = weight(8, 6), random(40, 8)
    after, _ = simulated(graph(PRODUCT, w=w), {"x": {"w4a4": quantizer}})
    wanted = quantizer.apply(x).astype(np.float64) @ fit_uniform(w, 4, axis=1).apply(w, axis=1)
    # Eight products and sums in float32, each rounded.
    bound = 16 * np.finfo(np.float32).eps * np.abs(wanted).max()
    assert np.abs(compute(after, x=x)["y"] - wanted).max() <= bound
    assert np.abs(wanted - x @ w).max() > 100 * bound


def test_the_logarithm() -> None:
    text = "(float[N,8] x, float[8,4] v) => (float[N,4] y) { p = Softmax<axis=-1>(x) y = MatMul(p, v) }"
    model = graph(text)
    region = partition(graph(PRODUCT, w=weight(8, 6)))[0]
    core = Assignment(type(region)("core", "attention", ("n_y",), ("n_y",), ()), W4A4, "test")
    quantizers: dict[str, dict[str, Quantizer]] = {"p": {"w4a4": Logarithmic(4, 0.7)}, "v": {"w4a4": TENSOR}}
    after, _ = run(model, [SimulateQuantizers(PrecisionPlan(FP32, (core,), quantizers=quantizers))], contract=LOWERED)
    check(after)
    x, v = 6 * random(30, 8), random(8, 4, seed=3)
    p = np.exp(x - x.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).astype(np.float32)
    codes = Logarithmic(4, 0.7).codes(p)
    assert codes.max() == 16  # Some are small enough to become zero.
    wanted = Logarithmic(4, 0.7).apply(p) @ TENSOR.apply(v)
    assert compute(after, x=x, v=v)["y"] == pytest.approx(wanted, abs=1e-5)


def test_attention_has_four_quantized_operands_and_projections_share_one() -> None:
    model = transformer()
    values = {v for r in partition(model) for v in r.activations}
    quantizers: dict[str, dict[str, Quantizer]] = {v: {"w4a4": Logarithmic(4, 1.0) if v == "p" else TENSOR} for v in values}
    after, record = simulated(model, quantizers)
    nodes = {n.name: n for n in after.graph}
    assert len({nodes[n].inputs[0] for n in ("n_q0", "n_k0", "n_v0")}) == 1
    assert nodes["n_q0"].inputs[0].producer().op_type == "Mul"
    assert [v.producer().op_type for n in ("n_s0", "n_o") for v in nodes[n].inputs] == ["Mul", "Mul", "Where", "Mul"]
    assert operators(after).count("Clip") == 1 + 4 + 1
    assert {r.anchor for r in record.rewrites} == {"n_q0", "n_k0", "n_v0", "n_s0", "n_o", "n_y0"}


def test_two_formats_of_one_value_have_a_chain_each() -> None:
    text = "(float[N,8,4,4] x) => (float[N,6,4,4] y) { a = Conv(x, w) b = Conv(x, u) y = Mul(a, b) }"
    model = graph(text, w=weight(6, 8, 1, 1), u=weight(6, 8, 1, 1, seed=2))
    quantizers: dict[str, dict[str, Quantizer]] = {"x": {"w4a4": TENSOR, "w3a3": Uniform(3, (0.5,), (3,))}}
    after, _ = simulated(model, quantizers, {"n_b": "w3a3"})
    assert operators(after).count("Clip") == 2
    assert {"w_w4a4", "u_w3a3"} <= set(after.graph.initializers)


def test_other_formats_are_left_to_other_passes() -> None:
    model = graph(PRODUCT, w=weight(8, 6))
    plan = PrecisionPlan(FP32, tuple(Assignment(r, INT8, "test") for r in partition(model)))
    result, (record,) = run(model, [SimulateQuantizers(plan)], contract=LOWERED)
    assert result is model
    assert not record.rewrites


class TestDeclines:
    def test_no_quantizer(self) -> None:
        after, record = simulated(transformer(), {"ln": {"w4a4": TENSOR}})
        assert {(d.anchor, d.code) for d in record.declines} == {(v, "NO_QUANTIZER") for v in ("q", "k", "p", "v", "o2")}
        assert {r.anchor for r in record.rewrites} == {"n_q0", "n_k0", "n_v0"}
        assert operators(after).count("Clip") == 1

    def test_no_node(self) -> None:
        model = graph(PRODUCT, w=weight(8, 6))
        (region,) = partition(model)
        plan = PrecisionPlan(FP32, (Assignment(type(region)("gone", "linear", ("gone",), ("gone",), ()), W4A4, "test"),))
        result, (record,) = run(model, [SimulateQuantizers(plan)], contract=LOWERED)
        assert [(d.anchor, d.code) for d in record.declines] == [("gone", "NO_NODE")]
        assert result is model


def test_it_does_nothing_twice() -> None:
    plan_quantizers: dict[str, dict[str, Quantizer]] = {"x": {"w4a4": TENSOR}}
    once, _ = simulated(graph(PRODUCT, w=weight(8, 6)), plan_quantizers)
    _, record = simulated(once, plan_quantizers)
    assert [d.code for d in record.declines] == ["NO_QUANTIZER"]
    assert not record.rewrites
