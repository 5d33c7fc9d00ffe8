from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from pass_graphs import apply, assert_close, codes, graph, operators

from deploycc.core.dcnv3 import attributes_of, nodes_of
from passes.fuse_dcnv3_projections import FuseDcnv3Projections

FUSE = FuseDcnv3Projections()
WIDTHS = {"o": 36, "m": 18}
BODY = "op = MatMul(q, ow) o = Add(op, ob) mp = MatMul(q, mw) m = Add(mb, mp)"
NODE = "y = deploycc.DCNv3<group=2, softmax=1>(x, o, m)"


def layer(body: str = BODY, node: str = NODE, outputs: str = "float[N,4,5,8] y", extra: str = "") -> ir.Model:
    """Return a graph of two projections and a node; weights are multiples of 1/64, so that text carries them exactly."""
    draw = np.random.default_rng(0)
    weights = []
    for name, width in WIDTHS.items():
        for part, shape in (("w", (8, width)), ("b", (width,))):
            numbers = ", ".join(str(v / 64) for v in draw.integers(-64, 65, shape).ravel())
            weights.append(f"float[{','.join(map(str, shape))}] {name}{part} = {{{numbers}}}")
    return graph(f"(float[N,4,5,8] x, float[N,4,5,8] q) => ({outputs}) <{', '.join(weights)}{extra}> {{ {body} {node} }}")


@pytest.mark.parametrize("softmax", [0, 1])
def test_one_product_writes_records(softmax: int) -> None:
    before = layer(node=f"y = deploycc.DCNv3<group=2, softmax={softmax}>(x, o, m)")
    after = apply(before, FUSE)
    assert operators(after) == ["MatMul", "Add", "DCNv3"]
    node = nodes_of(after)[0]
    assert node.inputs[1] is node.inputs[2]
    assert attributes_of(node).record == 1
    assert node.inputs[1].shape == ir.Shape(["N", 4, 5, 64])
    assert_close(before, after, (2, 4, 5, 8), (2, 4, 5, 8), roundings=256)


def test_the_columns_of_a_group_are_offsets_then_masks_then_zeros() -> None:
    before, after = layer(), apply(layer(), FUSE)
    names = {v.name: v.const_value.numpy() for v in before.graph.initializers.values() if v.const_value is not None}
    weight = after.graph.node("n_y_record_MatMul").inputs[1].const_value.numpy().reshape(8, 2, 32)
    np.testing.assert_array_equal(weight[..., :18], names["ow"].reshape(8, 2, 18))
    np.testing.assert_array_equal(weight[..., 18:27], names["mw"].reshape(8, 2, 9))
    assert not weight[..., 27:].any()


@pytest.mark.parametrize(
    ("body", "operations"),
    [
        ("o = MatMul(q, ow) m = MatMul(q, mw)", ["MatMul", "DCNv3"]),
        ("o = MatMul(q, ow) mp = MatMul(q, mw) m = Add(mb, mp)", ["MatMul", "Add", "DCNv3"]),
    ],
)
def test_a_bias_may_be_absent(body: str, operations: list[str]) -> None:
    before = layer(body)
    after = apply(before, FUSE)
    assert operators(after) == operations
    assert_close(before, after, (2, 4, 5, 8), (2, 4, 5, 8), roundings=256)


def test_declines_source() -> None:
    assert codes(layer(BODY.replace("MatMul(q, mw)", "MatMul(x, mw)")), FUSE) == ["SOURCE"]
    assert codes(layer(BODY.replace("op = MatMul(q, ow)", "qw = Neg(ow) op = MatMul(q, qw)")), FUSE) == ["SOURCE"]
    assert codes(layer(BODY.replace("m = Add(mb, mp)", "m = Sigmoid(mp)")), FUSE) == ["SOURCE"]


@pytest.mark.parametrize("value", ["o", "m"])
def test_declines_multi_consumer(value: str) -> None:
    assert codes(layer(node=f"{NODE} z = Neg({value})", outputs="float[N,4,5,8] y, float z"), FUSE) == ["MULTI_CONSUMER"]


def test_declines_mask() -> None:
    body = f"{BODY.replace('m = Add', 'a = Add')} b = Reshape(a, five) c = Softmax<axis=-1>(b) m = Reshape(c, four)"
    node = "y = deploycc.DCNv3<group=2>(x, o, m)"
    before = layer(body, node, extra=", int64[5] five = {-1,4,5,2,9}, int64[4] four = {-1,4,5,18}")
    assert codes(before, FUSE) == ["MASK"]


def test_a_record_stays() -> None:
    once = apply(layer(), FUSE)
    assert codes(once, FUSE) == []
    assert operators(apply(once, FUSE)) == operators(once)
