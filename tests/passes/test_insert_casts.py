"""Which nodes compute in 16 bits, where Casts go, and what stays exactly as it was."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_graphs import check, compute, graph, operators, random, residual, transformer, weight

from deploycc.core.contract import QUANTIZED, violations
from deploycc.core.formats import BF16, FP8, FP16, FP32, INT8, Format
from deploycc.core.graph import constant
from deploycc.core.passes import PassRecord, run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.quant.regions import partition
from passes.insert_casts import InsertCasts
from passes.insert_qdq import InsertQdq

HALF = ir.DataType.FLOAT16
LOWEST = np.float32(np.finfo(np.float32).min)


def cast(model: ir.Model, base: Format = FP16, islands: tuple[str, ...] = (), *, strict: bool = True) -> tuple[ir.Model, PassRecord]:
    """Insert Casts, and check everything that must hold of the result."""
    before = [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    result, records = run(model, [InsertCasts(PrecisionPlan(base, (), islands=dict.fromkeys(islands, "test")))], contract=QUANTIZED)
    assert list(violations(result, QUANTIZED)) == []
    assert [(v.name, v.dtype, str(v.shape)) for v in (*result.graph.inputs, *result.graph.outputs)] == before
    if strict:
        check(result)
    return result, records[0]


def lines(model: ir.Model) -> list[str]:
    """Return one line per node: types, names and operators."""
    return [
        f"{n.outputs[0].dtype.name} {n.outputs[0].name} = {n.op_type}({', '.join(v.name for v in n.inputs if v is not None)})"
        for n in model.graph
    ]  # type: ignore[union-attr, misc]


def test_before_and_expected() -> None:
    text = "(float[N,32,8,8] x) => (float[N,32,8,8] y) { c = Conv(x, w, b) y = Relu(c) }"
    after, record = cast(graph(text, w=weight(32, 32, 1, 1), b=weight(32)))
    assert lines(after) == [
        "FLOAT16 x_float16 = Cast(x)",
        "FLOAT16 c = Conv(x_float16, w_float16, b_float16)",
        "FLOAT16 y_fp16 = Relu(c)",
        "FLOAT y = Cast(y_fp16)",
    ]
    assert sorted(after.graph.initializers) == ["b_float16", "w_float16"]
    assert [(r.anchor, r.what, r.proof) for r in record.rewrites] == [
        ("n_c", "computes in fp16", "one rounding to fp16 per value"),
        ("n_y", "computes in fp16", "one rounding to fp16 per value"),
    ]


def test_bf16() -> None:
    after, _ = cast(graph("(float[N,32] x) => (float[N,32] y) { m = MatMul(x, w) y = Neg(m) }", opset=21, w=weight(32, 32)), BF16)
    assert constant(after.graph.initializers["w_bfloat16"]).dtype == ml_dtypes.bfloat16  # type: ignore[union-attr]
    assert after.graph.node("n_m").outputs[0].dtype == ir.DataType.BFLOAT16


def test_fp32_changes_nothing() -> None:
    before = residual()
    after, record = cast(before, FP32)
    assert after is before
    assert record.rewrites == ()


def test_fp32_of_a_model_in_fp16() -> None:
    before = graph("(float16[N,32] x) => (float16[N,32] y) { m = MatMul(x, w) y = Relu(m) }", w=weight(32, 32).astype(np.float16))
    after, _ = cast(before, FP32)
    assert after.graph.node("n_m").outputs[0].dtype == ir.DataType.FLOAT
    x = random(3, 32).astype(np.float16)
    expected = np.maximum(x.astype(np.float32) @ np.asarray(constant(before.graph.initializers["w"]), np.float32), 0)
    np.testing.assert_allclose(compute(after, x=x)["y"], expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("make", [residual, transformer])
@pytest.mark.parametrize("base", [FP16, BF16])
def test_numbers_are_those_of_16_bits(make: object, base: Format) -> None:
    model = make()  # type: ignore[operator]
    # The operator set has BF16 convolutions from version 22 on; TensorRT takes them from any.
    after, _ = cast(model, base, strict=base == FP16)
    x = random(4, *(int(d) for d in list(model.graph.inputs[0].shape)[1:]))
    plain, found = compute(model, x=x)["y"], compute(after, simulate=True, x=x)["y"]
    noise = float(np.sum((plain - found) ** 2) / np.sum(plain**2))
    step = {"fp16": 2.0**-11, "bf16": 2.0**-8}[base.name]
    assert (step / 20) ** 2 < noise < (4 * step) ** 2


class TestWithQuantizers:
    def inserted(self, format: Format) -> ir.Model:
        model = residual()
        regions = partition(model)
        scales = {v: {"int8": 0.0625, "fp8": 0.015625} for r in regions for v in (*r.activations, *r.residuals)}
        plan = PrecisionPlan(FP16, tuple(Assignment(r, format, "test") for r in regions), scales)
        return run(model, [InsertQdq(plan), InsertCasts(plan)], contract=QUANTIZED)[0]

    @pytest.mark.parametrize("format", [INT8, FP8])
    def test_scales_have_the_type_of_what_they_scale(self, format: Format) -> None:
        """R7."""
        after = self.inserted(format)
        check(after)
        for node in after.graph:
            if node.op_type == "QuantizeLinear":
                assert node.inputs[0].dtype == node.inputs[1].dtype == HALF  # type: ignore[union-attr]
            if node.op_type == "DequantizeLinear":
                assert node.inputs[1].dtype == node.outputs[0].dtype == HALF  # type: ignore[union-attr]
                assert node.inputs[1].shape == node.inputs[2].shape  # type: ignore[union-attr]

    def test_activation_scales_stay_scalars(self) -> None:
        """T2."""
        after = self.inserted(INT8)
        assert {str(n.inputs[1].shape) for n in after.graph if n.op_type == "QuantizeLinear"} == {"[]"}  # type: ignore[union-attr]

    def test_no_cast_separates_a_pair(self) -> None:
        after = self.inserted(INT8)
        for node in after.graph:
            if node.op_type == "DequantizeLinear":
                readers = {u.node.op_type for u in node.outputs[0].uses()}
                assert readers <= {"Conv", "Gemm", "Add"}


class TestSharing:
    def test_one_cast_serves_all_readers(self) -> None:
        after, _ = cast(graph("(float[N,8] x) => (float[N,8] y) { a = Relu(x) b = Neg(x) y = Add(a, b) }"))
        assert operators(after).count("Cast") == 2

    def test_names_that_the_model_has_already(self) -> None:
        text = "(float[N,8] x) => (float[N,8] y) { x_float16 = Relu(x) y_fp16 = Neg(x_float16) [y_Cast] z = Neg(y_fp16) y = Relu(z) }"
        after, _ = cast(graph(text))
        assert operators(after) == ["Cast", "Relu", "Neg", "Neg", "Relu", "Cast"]

    def test_an_output_that_is_read_inside(self) -> None:
        after, _ = cast(graph("(float[N,8] x) => (float[N,8] a, float[N,8] y) { a = Relu(x) y = Neg(a) }"))
        assert after.graph.node("n_y").inputs[0].dtype == HALF  # type: ignore[union-attr]

    def test_an_input_that_is_an_output(self) -> None:
        cast(graph("(float[N,8] x) => (float[N,8] x, float[N,8] y) { y = Relu(x) }"), strict=False)


class TestIslands:
    TEXT = "(float[N,8] x) => (float[N,8] y) { a = Relu(x) b = Neg(a) c = Mul(b, k) y = Relu(c) }"

    def test_stay_in_fp32(self) -> None:
        after, record = cast(graph(self.TEXT, k=np.float32(3.0)), islands=("n_b", "n_c"))
        assert lines(after) == [
            "FLOAT16 x_float16 = Cast(x)",
            "FLOAT16 a = Relu(x_float16)",
            "FLOAT a_float = Cast(a)",
            "FLOAT b = Neg(a_float)",
            "FLOAT c = Mul(b, k)",
            "FLOAT16 c_float16 = Cast(c)",
            "FLOAT16 y_fp16 = Relu(c_float16)",
            "FLOAT y = Cast(y_fp16)",
        ]
        assert [(r.anchor, r.what, r.proof) for r in record.rewrites] == [
            ("n_a", "computes in fp16", "one rounding to fp16 per value"),
            ("n_b", "computes in fp32", "exact"),
            ("n_y", "computes in fp16", "one rounding to fp16 per value"),
        ]

    @pytest.mark.parametrize("op", ["Exp", "Log", "Pow", "ReduceSum", "CumSum"])
    def test_ops_that_are_not_safe_in_16_bits(self, op: str) -> None:
        second = {"Pow": ", two", "CumSum": ", axis"}.get(op, "")
        text = f"(float[N,8] x) => (float y) {{ a = Relu(x) b = {op}(a{second}) y = Neg(b) }}"
        after, _ = cast(graph(text, two=np.float32(2), axis=np.int64(1)), strict=False)
        assert after.graph.node("n_b").outputs[0].dtype == ir.DataType.FLOAT

    def test_doubles_are_left_alone(self) -> None:
        after, _ = cast(graph("(double[N,8] x, float[N,8] z) => (double[N,8] y, float[N,8] w) { y = Relu(x) w = Relu(z) }"))
        assert after.graph.node("n_y").inputs[0].dtype == ir.DataType.DOUBLE  # type: ignore[union-attr]

    def test_a_cast_to_integers_sees_what_it_saw(self) -> None:
        """2049 is no FP16 number."""
        model = graph("(float[N] x) => (int64[N] y) { e = Exp(x) y = Cast<to=7>(e) }")
        after, _ = cast(model)
        x = np.log(np.float32([2049.3, 5001.6]))
        np.testing.assert_array_equal(compute(after, simulate=True, x=x)["y"], [2049, 5001])

    def test_what_makes_numbers_out_of_integers_keeps_its_type(self) -> None:
        text = "(int64[2] s, float[2,3] x) => (float[2,3] y) { c = ConstantOfShape(s) r = Relu(x) y = Add(c, r) }"
        after, _ = cast(graph(text))
        assert after.graph.node("n_c").outputs[0].dtype == ir.DataType.FLOAT


def test_resize_scales_stay_float32() -> None:
    model = graph('(float[N,3,8,8] x) => (float[N,3,16,16] y) { y = Resize<mode="linear">(x, , k) }', k=np.float32([1, 1, 2, 2]))
    after, _ = cast(model)
    node = after.graph.node("n_y")
    assert (node.inputs[0].dtype, node.inputs[2].dtype) == (HALF, ir.DataType.FLOAT)  # type: ignore[union-attr]


class TestRange:
    def test_a_weight_above_65504_keeps_its_op_in_fp32(self) -> None:
        after, record = cast(graph("(float[N,8] x) => (float[N,8] y) { a = Mul(x, k) y = Neg(a) }", k=np.float32(70000)))
        assert [(d.anchor, d.code, d.reason) for d in record.declines] == [("n_a", "RANGE", "'k' exceeds 65504, the largest FP16 number")]
        assert after.graph.node("n_a").outputs[0].dtype == ir.DataType.FLOAT
        assert after.graph.node("n_y").outputs[0].dtype == HALF

    def test_bf16_holds_it(self) -> None:
        _, record = cast(graph("(float[N,8] x) => (float[N,8] y) { a = Mul(x, k) y = Neg(a) }", k=np.float32(70000)), BF16)
        assert record.declines == ()

    @pytest.mark.parametrize("base", [FP16, BF16])
    @pytest.mark.parametrize("text", ["m = Add(x, k)", "m = Where(c, x, k)", "m = Max(x, k)", "m = Clip(x, k)"])
    def test_masks_stay_masks(self, text: str, base: Format) -> None:
        constants = {"k": LOWEST, "c": np.arange(8) < 5}
        model = graph(f"(float[N,8] x) => (float[N,8] y) {{ {text} y = Softmax(m) }}", **constants)
        after, record = cast(model, base, strict="Add" not in text)
        assert record.declines == ()
        (mask,) = [v for v in after.graph.initializers.values() if v.name and v.name.startswith("k_")]
        low = float(np.asarray(constant(mask), np.float64))
        assert np.isfinite(low)
        assert low <= -65504.0
        x = random(3, 8)
        np.testing.assert_allclose(compute(after, simulate=True, x=x)["y"], compute(model, x=x)["y"], atol=0.01)


def control_flow() -> ir.Model:
    """Return a model whose branches read a value, a constant and each other's operands from outside."""
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8]) for n in ("t", "e", "x", "y")]
    then = helper.make_graph([helper.make_node("Mul", ["h", "k"], ["t"], "then_mul")], "then", [], info[:1])
    nested = helper.make_graph(
        [helper.make_node("Neg", ["h"], ["n"], "inner_neg")], "inner", [], [helper.make_tensor_value_info("n", 1, ["N", 8])]
    )
    other_if = helper.make_node("If", ["flag"], ["e"], "inner_if", then_branch=nested, else_branch=nested)
    other = helper.make_graph([other_if], "else", [], info[1:2])
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], "relu"),
        helper.make_node("If", ["flag"], ["i"], "if", then_branch=then, else_branch=other),
        helper.make_node("Add", ["i", "h"], ["y"], "add"),
    ]
    inputs = [info[2], helper.make_tensor_value_info("flag", TensorProto.BOOL, [])]
    constants = [numpy_helper.from_array(np.float32(1e6), "k")]
    value_info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8]) for n in ("h", "i")]
    made = helper.make_graph(nodes, "g", inputs, info[3:], constants, value_info=value_info)
    return ir.serde.deserialize_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


class TestControlFlow:
    def test_bodies_read_what_they_read_before(self) -> None:
        model = control_flow()
        after, record = cast(model)
        assert ("if", "SUBGRAPH") in [(d.anchor, d.code) for d in record.declines]
        assert after.graph.node("if").outputs[0].dtype == ir.DataType.FLOAT
        assert after.graph.node("add").outputs[0].dtype == HALF
        x = np.abs(np.rint(random(2, 8) * 4))
        for flag in (True, False):
            found = compute(after, simulate=True, x=x, flag=np.array(flag))["y"]
            expected = compute(model, x=x, flag=np.array(flag))["y"]
            np.testing.assert_array_equal(found[np.abs(expected) < 2000], expected[np.abs(expected) < 2000])

    def test_bodies_in_fp16_stay_in_fp16(self) -> None:
        half = helper.make_tensor_value_info("t", TensorProto.FLOAT16, ["N", 8])
        then = helper.make_graph([helper.make_node("Neg", ["h"], ["t"], "neg")], "then", [], [half])
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 8]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ]
        nodes = [
            helper.make_node("Relu", ["x"], ["h"], "relu"),
            helper.make_node("If", ["flag"], ["y"], "if", then_branch=then, else_branch=then),
        ]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["N", 8])]
        info = [helper.make_tensor_value_info("h", TensorProto.FLOAT16, ["N", 8])]
        made = helper.make_model(
            helper.make_graph(nodes, "g", inputs, outputs, value_info=info), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
        )
        cast(ir.serde.deserialize_model(made), FP32)
        cast(ir.serde.deserialize_model(made), FP16)
