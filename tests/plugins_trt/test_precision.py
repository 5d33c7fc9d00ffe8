"""How precision passes through a node of DCNv3: offsets are never INT8, FP8 or BF16, and the rest follows the plan."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from dcnv3_cases import parsed, session

from deploycc import registry
from deploycc.core.contract import CANONICAL, LOWERED, QUANTIZED
from deploycc.core.data import open_data
from deploycc.core.dcnv3 import feeds_offsets, nodes_of
from deploycc.core.formats import BF16, FP8, FP16, INT8, Format
from deploycc.core.passes import run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.quantizers import activation_scale
from deploycc.core.shapes import Profile
from deploycc.quant.islands import sampling_islands
from deploycc.quant.regions import partition
from deploycc.quant.sensitivity import measure_noise
from passes.fuse_dcnv3_quantizers import FuseDcnv3Quantizers
from passes.insert_casts import InsertCasts
from passes.insert_qdq import InsertQdq

WIDTH, GROUP = 32, 2


def layer() -> ir.Model:
    """Return a DCNv3 layer: value, offset and mask projections of one input, and an output projection."""
    draw = np.random.default_rng(0)
    shapes = {"value": WIDTH, "offset": GROUP * 18, "mask": GROUP * 9, "out": WIDTH}
    weights = {f"{name}_w": draw.standard_normal((WIDTH, width)) / 6 for name, width in shapes.items()}
    weights |= {f"{name}_b": draw.standard_normal(width) for name, width in shapes.items()}
    lines = [f"{n}_p = MatMul({'sampled' if n == 'out' else 'x'}, {n}_w) {n} = Add({n}_p, {n}_b)" for n in shapes]
    body = f"{' '.join(lines[:3])} sampled = deploycc.DCNv3<group={GROUP}>(value, offset, mask) {lines[3]}"
    made = parsed(f"float[N,5,6,{WIDTH}] x", f"float[N,5,6,{WIDTH}] out", body, weights)
    for node in made.graph:
        node.outputs[0].shape = ir.Shape(["N", 5, 6, shapes.get((node.name or "").removesuffix("_p"), WIDTH)])
    return made


def cast(model: ir.Model, base: Format) -> ir.Model:
    """Return the model computed in ``base``, with the islands that the rules ask for."""
    plan = PrecisionPlan(base, (), islands=sampling_islands(model, base))
    return run(model, [InsertCasts(plan)], contract=CANONICAL)[0]


def kinds(model: ir.Model) -> list[str]:
    """Return the types of the operands and the result of the only node."""
    node = nodes_of(model)[0]
    return [str(value.dtype) for value in (*node.inputs, *node.outputs) if value is not None]


def test_projections_of_offsets_are_not_quantized() -> None:
    regions = {name: region for region in partition(layer()) for name in region.anchors}
    assert regions["offset_p"].formats == ()
    assert regions["offset_p"].rules == ("D2",)
    assert {"int8", "fp8"} <= set(regions["out_p"].formats)


def test_feeds_offsets_looks_past_layout_only() -> None:
    model = layer()
    values = {node.name: node.outputs[0] for node in model.graph}
    assert [name for name, value in values.items() if feeds_offsets(value)] == ["offset_p", "offset"]


def test_fp16_takes_the_whole_node() -> None:
    assert kinds(cast(layer(), FP16)) == ["FLOAT16"] * 4


def test_bf16_leaves_the_offsets_in_fp32_from_their_projection_on() -> None:
    model = cast(layer(), BF16)
    assert kinds(model) == ["BFLOAT16", "FLOAT", "BFLOAT16", "BFLOAT16"]
    types = {node.name: node.inputs[0].dtype for node in model.graph if node.inputs[0] is not None}
    assert types["offset_p"] == types["offset"] == ir.DataType.FLOAT
    assert types["mask_p"] == types["out_p"] == ir.DataType.BFLOAT16


def test_islands_are_for_bf16_only() -> None:
    assert sampling_islands(layer(), FP16) == {}
    assert set(sampling_islands(layer(), BF16)) == {"offset_p", "offset"}


def test_an_fp16_layer_computes_the_same() -> None:
    x = np.random.default_rng(1).standard_normal((2, 5, 6, WIDTH)).astype(np.float32)
    exact = session(layer()).run(None, {"x": x})[0]
    found = session(cast(layer(), FP16)).run(None, {"x": x})[0]
    # Rounding an offset of a few pixels to FP16 moves a sample by up to 2^-10 pixels; the rest rounds to 2^-11 once per op.
    assert np.abs(found - exact).max() <= 2.0**-7 * np.abs(exact).max()


def plan_of(model: ir.Model, format: Format, *, samples_codes: bool) -> PrecisionPlan:
    """Return the plan that computes the output projection in ``format``, with the scales of one run."""
    regions = partition(model, samples_codes=samples_codes)
    chosen = tuple(Assignment(r, format if "out_p" in r.anchors else FP16, "test") for r in regions)
    names = {v for a in chosen if a.format == format for v in (*a.region.activations, *a.region.residuals)}
    probe = model.clone()
    values = {v.name: v for n in probe.graph for v in n.outputs}
    probe.graph.outputs.extend(values[name] for name in sorted(names))
    found = session(probe).run(sorted(names), {"x": INPUT})
    limits = dict(zip(sorted(names), (float(np.abs(f).max()) for f in found), strict=True))
    scales = {name: {format.name: activation_scale(limit, format, FP16)} for name, limit in limits.items()}
    return PrecisionPlan(FP16, chosen, scales)


def lowered(format: Format, *, samples_codes: bool) -> ir.Model:
    """Return the layer with the plan applied, as a target gets it."""
    model = layer()
    plan = plan_of(model, format, samples_codes=samples_codes)
    quantized = run(model, [InsertQdq(plan), InsertCasts(plan)], contract=QUANTIZED)[0]
    return run(quantized, [FuseDcnv3Quantizers()], contract=LOWERED)[0]


INPUT = np.random.default_rng(1).standard_normal((2, 5, 6, WIDTH)).astype(np.float32)


def test_a_kernel_that_reads_int8_gets_its_values_in_int8_by_the_plan() -> None:
    """The plan quantizes the projection behind the node; with a plugin, what the node reads belongs to that region."""
    region = next(r for r in partition(layer(), samples_codes=True) if "out_p" in r.anchors)
    assert (region.nodes[0], region.residuals) == ("sampled", ("value",))
    model = lowered(INT8, samples_codes=True)
    assert [n.op_type for n in nodes_of(model)] == ["DCNv3DQQ"]
    assert kinds(model) == ["INT8", "FLOAT16", "FLOAT16", "INT8"]
    exact, found = (session(m).run(None, {"x": INPUT})[0] for m in (layer(), model))
    assert 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()) > 30


def test_the_body_gains_nothing_by_int8_and_keeps_its_values() -> None:
    assert all(not r.residuals for r in partition(layer()))
    assert kinds(lowered(INT8, samples_codes=False)) == ["FLOAT16"] * 4


def test_no_kernel_reads_fp8() -> None:
    assert kinds(lowered(FP8, samples_codes=True)) == ["FLOAT16"] * 4


def test_the_score_of_the_region_counts_what_the_node_reads() -> None:
    """Measured noise with the values in INT8 is that of the built graph, and more than that of the projection alone."""
    model = layer()
    plan = plan_of(model, INT8, samples_codes=True)
    data = open_data("synthetic:4", model.graph.inputs, [Profile("x", *[(n, 5, 6, WIDTH) for n in (1, 2, 4)])], seed=0)
    noise = {}
    for samples_codes in (True, False):
        region = next(r for r in partition(model, samples_codes=samples_codes) if "out_p" in r.anchors)
        scores = measure_noise(model, [region], [INT8], plan.scales, data, reference=registry.backend("onnxruntime"), batch=2)
        noise[samples_codes] = scores.score(region.name, "int8")
    assert noise[True] > 1.1 * noise[False] > 0
