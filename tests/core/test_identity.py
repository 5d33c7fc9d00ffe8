"""PyTorch module, ONNX node, region and Q/DQ nodes stay known to each other, from raw exports to the lowered graph."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from small_graphs import residual, transformer

from deploycc.core.contract import QUANTIZED
from deploycc.core.formats import FP16, INT8
from deploycc.core.identity import SCOPES, identities, pairs_before, scope_of
from deploycc.core.passes import run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.quant.regions import partition
from passes.insert_casts import InsertCasts
from passes.insert_qdq import InsertQdq


@pytest.mark.parametrize(
    ("metadata", "name", "path"),
    [
        ("['', 'layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d']", "node_conv2d_1", "layer1.0.conv1"),
        ("['', 'add']", "node_add", ""),
        ("broken [", "n", ""),
        (None, "/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        (None, "/blocks.0/attn/qkv/MatMul", "blocks.0.attn.qkv"),
        (None, "/Add", ""),
        (None, "node_conv2d", ""),
    ],
)
def test_the_path_is_read_from_metadata_or_an_older_name(metadata: str | None, name: str, path: str) -> None:
    node = ir.Node("", "Conv", [], name=name, metadata_props={SCOPES: metadata} if metadata else {})
    assert scope_of(node) == path


def quantized(model: ir.Model) -> tuple[PrecisionPlan, ir.Model]:
    """Return a plan with everything in INT8 that may be, and the graph with pairs and casts."""
    for number, node in enumerate(model.graph):
        node.metadata_props[SCOPES] = f"['', 'm{number}', '{node.op_type}']"
    regions = partition(model)
    scales = {v: {"int8": 0.05} for r in regions for v in (*r.activations, *r.residuals)}
    chosen = tuple(Assignment(r, INT8 if "int8" in r.formats else FP16, "test") for r in regions)
    plan = PrecisionPlan(FP16, chosen, scales)
    return plan, run(model, [InsertQdq(plan), InsertCasts(plan)], contract=QUANTIZED)[0]


def test_every_pair_belongs_to_a_region_and_has_its_module() -> None:
    for make in (residual, transformer):
        plan, model = quantized(make())
        found = identities(plan, model)
        pairs = [n for n in model.graph if n.op_type in {"QuantizeLinear", "DequantizeLinear"}]
        assert {n.name for n in pairs} == {name for identity in found.values() for name in identity.qdq}
        assert all(scope_of(n) for n in pairs)


def test_the_pairs_of_a_region_are_those_of_its_operands_and_its_skip() -> None:
    plan, model = quantized(residual())
    region = next(a.region for a in plan.assignments if a.region.residuals)
    add = next(n for n in model.graph if n.name in region.nodes and n.op_type == "Add")
    skip = [p.name for i in (0, 1) for p in pairs_before(add, i)]
    assert len(skip) == 2
    assert set(skip) < set(identities(plan, model)[region.name].qdq)


def test_projections_of_one_region_name_each_module() -> None:
    plan, model = quantized(transformer())
    tied = next(a.region for a in plan.assignments if len(a.region.anchors) == 3)
    assert len(identities(plan, model)[tied.name].torch) == 3
