"""How precision passes through a node of DCNv3: offsets are never INT8, FP8 or BF16, and the rest follows the plan."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from dcnv3_cases import parsed, session

from deploycc.core.contract import CANONICAL
from deploycc.core.dcnv3 import feeds_offsets, nodes_of
from deploycc.core.formats import BF16, FP16, Format
from deploycc.core.passes import run
from deploycc.core.plan import PrecisionPlan
from deploycc.quant.islands import sampling_islands
from deploycc.quant.regions import partition
from passes.insert_casts import InsertCasts

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
    assert regions["out_p"].formats == ("int8", "fp8")


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
