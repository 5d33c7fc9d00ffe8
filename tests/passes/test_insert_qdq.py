"""Where Q/DQ pairs go, what they hold, and what the result computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from pass_graphs import described
from small_graphs import check, compute, graph, operators, random, residual, transformer, weight

from deploycc.core.contract import QUANTIZED, violations
from deploycc.core.formats import FP8, FP16, FP32, INT8, Format
from deploycc.core.graph import constant
from deploycc.core.passes import PassRecord, run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.quant.regions import partition
from passes.insert_qdq import InsertQdq

if TYPE_CHECKING:
    from deploycc.core.plan import Region

SCALE = 0.05
CODES = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


def plan_for(model: ir.Model, formats: dict[str, Format] | Format, *, base: Format = FP32, missing: tuple[str, ...] = ()) -> PrecisionPlan:
    """Return a plan that gives regions (by name, or all) a format, and every activation the scale 0.05."""
    regions = partition(model)
    chosen = {r.name: formats if isinstance(formats, Format) else formats.get(r.name, base) for r in regions}
    values = {v for r in regions for v in (*r.activations, *r.residuals)} - set(missing)
    scales = {v: {"int8": SCALE, "fp8": SCALE / 4} for v in values}
    return PrecisionPlan(base, tuple(Assignment(r, chosen[r.name], "test") for r in regions), scales)


def inserted(model: ir.Model, formats: dict[str, Format] | Format, **options: object) -> tuple[ir.Model, PassRecord]:
    """Insert pairs, and check everything that must hold of the result."""
    result, records = run(model, [InsertQdq(plan_for(model, formats, **options))], contract=QUANTIZED)  # type: ignore[arg-type]
    assert list(violations(result, QUANTIZED)) == []
    check(result)
    return result, records[0]


def simulated(values: np.ndarray, scale: np.ndarray | float, format: Format) -> np.ndarray:
    """Return ``values`` after Q and DQ, in NumPy alone."""
    steps = values.astype(np.float32) / np.float32(scale)
    low, high = {"int8": (-128, 127), "fp8": (-448, 448)}[format.name]
    codes = np.clip(np.rint(steps) if format == INT8 else steps, low, high).astype(CODES[format.name])
    return codes.astype(np.float32) * np.float32(scale)


def simulated_weight(values: np.ndarray, axis: int, format: Format) -> np.ndarray:
    limit = np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis), keepdims=True)
    return simulated(values, limit / {"int8": 127, "fp8": 448}[format.name], format)


def lines(model: ir.Model) -> list[str]:
    """Return the graph in one line per node, with the types of the constants."""
    names = {
        v: f"{v.name}:{v.dtype.name if v.dtype else ''}" if v.const_value is not None else v.name for v in model.graph.initializers.values()
    }
    text = []
    for node in model.graph:
        inputs = ", ".join(str(names.get(v, v.name if v is not None else "_")) for v in node.inputs if v is not None)
        axis = f" axis={node.attributes['axis'].value}" if "axis" in node.attributes else ""
        text.append(f"{node.outputs[0].name} = {node.op_type}({inputs}){axis}")
    return text


CONV = "(float[N,32,8,8] x) => (float[N,32,8,8] y) { c = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(c) }"


class TestBeforeAndExpected:
    def test_conv(self) -> None:
        before = graph(CONV, w=weight(32, 32, 3, 3), b=weight(32))
        after, record = inserted(before, INT8)
        assert lines(after) == [
            "w_int8_dq = DequantizeLinear(w_int8:INT8, w_int8_scale:FLOAT, w_int8_zero_point:INT8) axis=0",
            "x_int8_q = QuantizeLinear(x, x_int8_scale:FLOAT, x_int8_zero_point:INT8)",
            "x_int8_dq = DequantizeLinear(x_int8_q, x_int8_scale:FLOAT, x_int8_zero_point:INT8)",
            "c = Conv(x_int8_dq, w_int8_dq, b:FLOAT)",
            "y = Relu(c)",
        ]
        assert [(r.anchor, r.what) for r in record.rewrites] == [("n_c", "int8 operands")]
        assert "w" not in after.graph.initializers

    def test_fp8_conv(self) -> None:
        after, _ = inserted(graph(CONV, w=weight(32, 32, 3, 3), b=weight(32)), FP8)
        assert lines(after)[1] == "x_fp8_q = QuantizeLinear(x, x_fp8_scale:FLOAT, x_fp8_zero_point:FLOAT8E4M3FN)"
        assert constant(after.graph.initializers["w_fp8"]).dtype == ml_dtypes.float8_e4m3fn  # type: ignore[union-attr]

    @pytest.mark.parametrize(("op", "shape", "axis"), [("Gemm<transB=1>", (48, 32), 0), ("Gemm", (32, 48), 1), ("MatMul", (32, 48), 1)])
    def test_matrix_products(self, op: str, shape: tuple[int, int], axis: int) -> None:
        """R5: the axis of the outputs."""
        after, _ = inserted(graph(f"(float[N,32] x) => (float[N,48] y) {{ y = {op}(x, w) }}", w=weight(*shape)), INT8)
        assert lines(after)[0].endswith(f"axis={axis}")
        assert after.graph.initializers["w_int8_scale"].shape == ir.Shape([48])
        assert operators(after) == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear", op.split("<")[0]]

    def test_attention(self) -> None:
        """F1: all four operands of the core; P9 and P13: one pair for three projections."""
        before = transformer()
        after, _ = inserted(before, INT8)
        graph_nodes = {n.name: n for n in after.graph}
        for name in ("n_s0", "n_o", "n_q0", "n_k0", "n_v0", "n_y0"):
            assert [v.producer().op_type for v in graph_nodes[name].inputs] == ["DequantizeLinear"] * 2, name  # type: ignore[union-attr]
        assert len({graph_nodes[n].inputs[0] for n in ("n_q0", "n_k0", "n_v0")}) == 1
        # ln; q, k, p, v; o2
        assert operators(after).count("QuantizeLinear") == 1 + 4 + 1
        assert graph_nodes["n_p"].inputs[0].producer().op_type == "Mul"  # type: ignore[union-attr]


class TestSharing:
    TEXT = "(float[N,32,8,8] x) => (float[N,32,8,8] y) { r = Relu(x) c = Conv(r, w) d = Conv(r, u) y = Mul(c, d) }"

    def model(self) -> ir.Model:
        return graph(self.TEXT, w=weight(32, 32, 1, 1), u=weight(32, 32, 1, 1, seed=1))

    def test_one_pair_serves_all_readers_of_a_format(self) -> None:
        """P9."""
        after, _ = inserted(self.model(), INT8)
        convs = [n for n in after.graph if n.op_type == "Conv"]
        assert convs[0].inputs[0] is convs[1].inputs[0]
        assert operators(after).count("QuantizeLinear") == 1

    def test_two_formats_have_a_pair_each(self) -> None:
        after, _ = inserted(self.model(), {"n_c": INT8, "n_d": FP8})
        convs = [n for n in after.graph if n.op_type == "Conv"]
        assert [v.name for v in (convs[0].inputs[0], convs[1].inputs[0]) if v is not None] == ["r_int8_dq", "r_fp8_dq"]
        assert all(n.inputs[0] is not None and n.inputs[0].name == "r" for n in after.graph if n.op_type == "QuantizeLinear")

    def test_other_readers_keep_the_float_value(self) -> None:
        after, _ = inserted(self.model(), {"n_c": INT8})
        assert after.graph.node("n_d").inputs[0].name == "r"  # type: ignore[union-attr]

    def test_a_weight_read_along_two_axes_is_stored_twice(self) -> None:
        text = "(float[N,32] x) => (float[N,32] y) { a = MatMul(x, w) r = Relu(a) y = Gemm<transB=1>(r, w) }"
        after, _ = inserted(graph(text, w=weight(32, 32)), INT8)
        assert sorted(line.split()[-1] for line in lines(after) if line.startswith("w_int8")) == ["axis=0", "axis=1"]

    def test_names_that_the_model_has_already(self) -> None:
        text = """(float[N,32] x) => (float[N,32] y)
            { x_int8_q = Relu(x) [x_int8_QuantizeLinear] r = Neg(x_int8_q) m = MatMul(x, w) y = Add(m, r) }"""
        model = graph(text, w=weight(32, 32))
        after, _ = inserted(model, INT8)
        assert operators(after).count("QuantizeLinear") == 1


class TestResidual:
    def test_the_skip_is_quantized_and_the_branch_is_not(self) -> None:
        """P4 and P5."""
        after, _ = inserted(residual(), INT8)
        add = after.graph.node("n_a")
        assert [v.name for v in add.inputs if v is not None] == ["s_int8_dq", "c2"]

    def test_a_skip_that_is_quantized_elsewhere_shares_the_pair(self) -> None:
        text = """(float[N,32,8,8] x) => (float[N,32,8,8] y) {
            r = Relu(x) c = Conv<pads=[1,1,1,1]>(r, w) a = Add(r, c) y = Relu(a) }"""
        after, _ = inserted(graph(text, w=weight(32, 32, 3, 3)), INT8)
        assert after.graph.node("n_a").inputs[0] is after.graph.node("n_c").inputs[0]

    def test_a_float_region_leaves_the_skip_alone(self) -> None:
        after, _ = inserted(residual(), {"n_c1": INT8})
        assert [v.name for v in after.graph.node("n_a").inputs if v is not None] == ["s", "c2"]


class TestScales:
    def test_of_activations_are_scalars(self) -> None:
        """T2: with shape [1] TensorRT-RTX computes in floating point."""
        after, _ = inserted(residual(), INT8)
        quantizers = [n for n in after.graph if n.op_type == "QuantizeLinear"]
        assert quantizers
        for node in quantizers:
            assert node.inputs[1].shape == node.inputs[2].shape == ir.Shape([])  # type: ignore[union-attr]
            assert constant(node.inputs[1]) == np.float32(SCALE)

    def test_are_numbers_of_the_base_format(self) -> None:
        """R7: FP16 holds them exactly, so that the Cast that follows changes nothing."""
        after, _ = inserted(graph(CONV, w=weight(32, 32, 3, 3), b=weight(32)), INT8, base=FP16)
        scales = constant(after.graph.initializers["w_int8_scale"])
        np.testing.assert_array_equal(scales, np.asarray(scales).astype(np.float16).astype(np.float32))

    def test_a_dead_channel_has_a_positive_scale(self) -> None:
        """R2."""
        w = weight(32, 32, 3, 3)
        w[5] = 0.0
        after, _ = inserted(graph(CONV, w=w, b=weight(32)), INT8, base=FP16)
        codes, scales = (np.asarray(constant(after.graph.initializers[n])) for n in ("w_int8", "w_int8_scale"))
        assert scales[5] > 0
        assert not codes[5].any()


class TestDeclines:
    def test_a_region_without_a_scale_stays_whole(self) -> None:
        before = transformer()
        after, record = inserted(before, INT8, missing=("p",))
        assert [(d.anchor, d.code, d.reason) for d in record.declines] == [("p", "NO_SCALE", "the plan has no int8 scale for 'p'")]
        core = [v.producer().op_type for n in ("n_s0", "n_o") for v in after.graph.node(n).inputs]  # type: ignore[union-attr]
        assert "DequantizeLinear" not in core
        assert "n_q0" in {r.anchor for r in record.rewrites}

    def test_a_missing_anchor_leaves_its_region_alone(self) -> None:
        model = transformer()
        plan = plan_for(model, INT8)
        model.graph.node("n_v0").name = "renamed"
        after, records = run(model, [InsertQdq(plan)], contract=QUANTIZED)
        assert [(d.anchor, d.code) for d in records[0].declines] == [("n_v0", "NO_NODE")]
        assert after.graph.node("n_q0").inputs[0].name == "ln"  # type: ignore[union-attr]
        assert "n_s0" in {r.anchor for r in records[0].rewrites}

    def test_a_plan_without_quantized_regions_changes_nothing(self) -> None:
        before = residual()
        after, record = inserted(before, FP32)
        assert after is before
        assert (record.rewrites, record.declines) == ((), ())

    def test_a_second_time_changes_nothing(self) -> None:
        model = residual()
        plan = plan_for(model, INT8)
        once, _ = run(model, [InsertQdq(plan)], contract=QUANTIZED)
        twice, records = run(once, [InsertQdq(plan)], contract=QUANTIZED)
        assert described(once) == described(twice)
        assert records[0].rewrites == ()


@pytest.mark.parametrize("format", [INT8, FP8])
class TestNumbers:
    """Against NumPy: rounding to even, saturation at both ends, one scale per output of a weight."""

    def close(self, found: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))

    @pytest.mark.parametrize(("op", "axis"), [("Gemm<transB=1>", 0), ("Gemm", 1), ("MatMul", 1)])
    def test_products(self, format: Format, op: str, axis: int) -> None:
        w, x = weight(48, 48), random(5, 48) * 8
        w[:, 3] *= 100
        after, _ = inserted(graph(f"(float[N,48] x) => (float[N,48] y) {{ y = {op}(x, w) }}", w=w), format)
        scale = SCALE if format == INT8 else SCALE / 4
        x_q, w_q = simulated(x, scale, format), simulated_weight(w, axis, format)
        assert np.abs(x).max() > np.abs(x_q).max()
        self.close(compute(after, x=x)["y"], x_q @ (w_q.T if "transB" in op else w_q))

    def test_conv(self, format: Format) -> None:
        w, x, b = weight(32, 32, 1, 1), random(2, 32, 8, 8), weight(32)
        after, _ = inserted(graph(CONV.replace("<pads=[1,1,1,1]>", ""), w=w, b=b), format)
        x_q = simulated(x, SCALE if format == INT8 else SCALE / 4, format)
        expected = np.einsum("oc,nchw->nohw", simulated_weight(w, 0, format)[:, :, 0, 0], x_q) + b[:, None, None]
        self.close(compute(after, x=x)["y"], np.maximum(expected, 0))

    def test_attention(self, format: Format) -> None:
        inputs = "(float[N,2,16,32] q, float[N,2,32,16] k, float[N,2,16,32] v)"
        before = graph(inputs + " => (float[N,2,16,32] o) { s = MatMul(q, k) p = Softmax(s) o = MatMul(p, v) }")
        after, _ = inserted(before, format)
        scale = SCALE if format == INT8 else SCALE / 4
        q, k, v = (random(1, 2, *s, seed=i) for i, s in enumerate(((16, 32), (32, 16), (16, 32))))
        scores = simulated(q, scale, format) @ simulated(k, scale, format)
        exponents = np.exp(scores - scores.max(-1, keepdims=True))
        p = simulated(exponents / exponents.sum(-1, keepdims=True), scale, format)
        self.close(compute(after, q=q, k=k, v=v)["o"], p @ simulated(v, scale, format))


def test_the_regions_of_a_quantized_model_are_still_named() -> None:
    before = residual()
    regions: tuple[Region, ...] = partition(before)
    after, _ = inserted(before, INT8)
    assert {a for r in regions for a in r.anchors} <= {n.name for n in after.graph}
