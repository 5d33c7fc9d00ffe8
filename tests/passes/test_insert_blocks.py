"""Formats in blocks as they are inserted: what stands in the graph, what it computes, and what a real builder makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from small_graphs import graph, operators, weight

from deploycc import registry
from deploycc.core.backend import BuildOptions
from deploycc.core.blocks import quantize_blocks
from deploycc.core.contract import LOWERED, QUANTIZED, violations
from deploycc.core.formats import BF16, FP8, FP16, FP32, INT4, INT8, MXFP8, NVFP4, Format
from deploycc.core.graph import opset
from deploycc.core.passes import PassRecord, run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.target import Target
from deploycc.interop import save_model
from deploycc.quant.lrp.local import fake_quantized
from deploycc.quant.regions import partition
from deploycc.verify.audit import audit
from passes.insert_casts import InsertCasts
from passes.insert_qdq import InsertQdq

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from deploycc.core.backend import Engine

MLP = "(float[2,50,192] x) => (float[2,50,96] y) { h = MatMul(x, w) g = Gelu(h) y = MatMul(g, v) }"
LIMIT = 4.0


def mlp() -> ir.Model:
    return graph(MLP, opset=20, w=weight(192, 384), v=weight(384, 96))


def planned(model: ir.Model, format: Format, base: Format = FP32) -> PrecisionPlan:
    regions = [replace(r, formats=(format.name,)) for r in partition(model)]
    scale = {} if format.reach is None else {format.name: LIMIT / format.reach}
    values = [v for r in regions for v in r.activations]
    return PrecisionPlan(base, tuple(Assignment(r, format, "test") for r in regions), dict.fromkeys(values, scale))


def inserted(model: ir.Model, format: Format) -> tuple[ir.Model, PassRecord]:
    result, records = run(model, [InsertQdq(planned(model, format))], contract=QUANTIZED)
    assert list(violations(result, QUANTIZED)) == []
    return result, records[0]


def built(model: ir.Model, plan: PrecisionPlan, arch: str, folder: Path) -> Engine:
    lowered, _ = run(model, [InsertQdq(plan), InsertCasts(plan)], contract=LOWERED)
    save_model(lowered, folder / "m.onnx")
    rtx = registry.backend("tensorrt-rtx")
    return rtx.build(folder / "m.onnx", Target("tensorrt-rtx", (arch,)), out=folder / "e", profiles=(), options=BuildOptions())


def test_int4_stores_weights_in_blocks_and_leaves_activations() -> None:
    model = mlp()
    result, record = inserted(model, INT4)
    assert operators(result) == ["DequantizeLinear", "DequantizeLinear", "MatMul", "Gelu", "MatMul"]
    assert opset(result) == 21
    nodes = {n.inputs[0].name: n for n in result.graph if n.op_type == "DequantizeLinear"}
    assert {n: d.attributes["block_size"].value for n, d in nodes.items()} == {"w_int4": 64, "v_int4": 128}
    stored = result.graph.initializers["w_int4"].const_value
    assert stored.nbytes == 192 * 384 / 2
    expected = quantize_blocks(weight(192, 384), axis=0, format=INT4, base=FP32)
    np.testing.assert_array_equal(stored.numpy().astype(np.int8), expected.codes.astype(np.int8))
    assert [r.anchor for r in record.rewrites] == [n.name for n in model.graph if n.op_type == "MatMul"]


@pytest.mark.parametrize(("format", "needed"), [(NVFP4, 23), (MXFP8, 21)])
def test_activations_get_their_blocks_from_the_engine(format: Format, needed: int) -> None:
    result, _ = inserted(mlp(), format)
    dynamic = [n for n in result.graph if n.domain == "trt" and "Dynamic" in n.op_type]
    assert [n.inputs[0].name for n in dynamic] == ["x", "g"]
    assert (opset(result), result.graph.opset_imports["trt"]) == (needed, 1)
    assert result.ir_version >= {NVFP4: 11, MXFP8: 9}[format]
    assert len(result.graph.initializers) == {NVFP4: 8, MXFP8: 4}[format]


@pytest.mark.parametrize("format", [INT4, NVFP4, MXFP8])
def test_the_reference_executes_the_product_of_what_both_operands_become(format: Format) -> None:
    w, x = weight(192, 64), np.random.default_rng(0).standard_normal((2, 50, 192)).astype(np.float32)
    result, _ = inserted(graph("(float[2,50,192] x) => (float[2,50,64] y) { y = MatMul(x, w) }", opset=20, w=w), format)
    stored = quantize_blocks(w, axis=0, format=format, base=FP32).decoded()
    expected = fake_quantized(torch.from_numpy(x), LIMIT / (format.reach or 1.0), format).numpy() @ stored
    got = registry.backend("onnxruntime").executor(result, simulate=True)({"x": x})["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


def test_projections_of_one_value_share_what_quantizes_it() -> None:
    text = "(float[2,64] x) => (float[2,64] a, float[2,64] b) { a = MatMul(x, w) b = MatMul(x, v) }"
    result, _ = inserted(graph(text, opset=20, w=weight(64, 64), v=weight(64, 64)), NVFP4)
    assert operators(result).count("TRT_FP4DynamicQuantize") == 1


def test_a_gemm_is_blocked_along_its_inputs() -> None:
    text = "(float[2,64] x) => (float[2,48] y) { y = Gemm<transB=1>(x, w, b) }"
    result, _ = inserted(graph(text, opset=20, w=weight(48, 64), b=weight(48)), INT4)
    (node,) = [n for n in result.graph if n.op_type == "DequantizeLinear"]
    assert (node.attributes["axis"].value, tuple(node.inputs[1].shape)) == (1, (48, 2))


def test_a_weight_without_whole_blocks_is_declined() -> None:
    model = graph("(float[2,40] x) => (float[2,64] y) { y = MatMul(x, w) }", opset=20, w=weight(40, 64))
    result, record = inserted(model, INT4)
    assert [d.code for d in record.declines] == ["NO_BLOCKS"]
    assert operators(result) == ["MatMul"]
    assert opset(result) == 20


def test_a_missing_scale_is_declined() -> None:
    model = mlp()
    plan = replace(planned(model, NVFP4), scales={})
    _, records = run(model, [InsertQdq(plan)], contract=QUANTIZED)
    assert {d.code for d in records[0].declines} == {"NO_SCALE"}


@pytest.mark.parametrize(
    ("format", "base", "arch"),
    [(INT4, FP16, "sm_80"), (INT4, BF16, "sm_89"), (NVFP4, FP16, "sm_120"), (NVFP4, BF16, "sm_121")],
)
def test_an_engine_computes_in_it(tmp_path: Path, format: Format, base: Format, arch: str) -> None:
    model = mlp()
    plan = planned(model, format, base)
    engine = built(model, plan, arch, tmp_path)
    assert [f.verdict for f in audit(plan, engine)] == ["ok", "ok"], engine.realised
    assert "weights_dequantised_at_run_time" not in engine.realised.counts


def test_the_audit_sees_mxfp8_computed_in_fp16(tmp_path: Path) -> None:
    model = mlp()
    plan = planned(model, MXFP8, FP16)
    engine = built(model, plan, "sm_120", tmp_path)
    assert [(f.verdict, f.realised[:4]) for f in audit(plan, engine)] == [("mismatch", "fp16")] * 2


def test_every_format_lives_in_one_engine(tmp_path: Path) -> None:
    text = "a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) d = Relu(c) e = MatMul(d, w) f = Relu(e) y = MatMul(f, w)"
    model = graph(f"(float[64,256] x) => (float y) {{ {text} }}", opset=20, w=weight(256, 256))
    formats = (INT8, FP8, INT4, NVFP4)
    regions = partition(model)
    scales = {v: {f.name: LIMIT / f.reach for f in formats if f.reach} for r in regions for v in r.activations}
    plan = PrecisionPlan(FP16, tuple(Assignment(r, f, "test") for r, f in zip(regions, formats, strict=True)), scales)
    engine = built(model, plan, "sm_120", tmp_path)
    assert [(f.requested, f.verdict) for f in audit(plan, engine)] == [(f.name, "ok") for f in formats]
