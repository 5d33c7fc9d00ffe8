from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from pass_graphs import apply, assert_close, codes, graph, operators, record

from deploycc.interop import load_model
from passes.split_projections import SplitProjections

SPLIT = SplitProjections()
FASHION = Path(__file__).parents[2] / "examples" / "fashion" / "vit.onnx"
READERS = {
    "gather": "q = Gather<axis=0>(t, i0) k = Gather<axis=0>(t, i1) v = Gather<axis=0>(t, i2)",
    "slice": "sa = Slice(t, s0, s1, s0) q = Squeeze(sa, s0) sb = Slice(t, s1, s2, s0) k = Squeeze(sb, s0) "
    "sc = Slice(t, s2, s3, s0) v = Squeeze(sc, s0)",
}
INDICES = ", ".join(f"int64 i{n} = {{{n}}}, int64[1] s{n} = {{{n}}}" for n in range(4))


def joint(readers: str, *, shape: str = "-1, 5, 3, 2, 4", perm: str = "2,0,3,1,4", tail: str = "") -> ir.Model:
    """A joint projection of width 8 into 24 columns: three parts, two heads of four."""
    draw = np.random.default_rng(0)
    w, b = (", ".join(f"{n:.4f}" for n in draw.standard_normal(size)) for size in (8 * 24, 24))
    return graph(
        f"(float[N,5,8] x) => (float[N,2,5,4] o) "
        f"<float[8,24] w = {{{w}}}, float[24] b = {{{b}}}, int64[5] shape = {{{shape}}}, {INDICES}> "
        f"{{ m = MatMul(x, w) y = Add(m, b) r = Reshape(y, shape) t = Transpose<perm=[{perm}]>(r) {readers} "
        f"s = Mul(q, k) o = Add(s, v) {tail} }}"
    )


@pytest.mark.parametrize("readers", READERS)
def test_a_joint_projection_becomes_one_product_per_part(readers: str) -> None:
    before = joint(READERS[readers])
    after = apply(before, SPLIT)
    assert operators(after).count("MatMul") == 3
    assert {"Gather", "Slice", "Squeeze"}.isdisjoint(operators(after))
    assert_close(before, after, (3, 5, 8), roundings=24)


def test_the_split_axis_may_lie_behind_the_heads() -> None:
    before = joint(READERS["gather"], shape="-1, 5, 2, 3, 4", perm="3,0,2,1,4")
    after = apply(before, SPLIT)
    assert operators(after).count("MatMul") == 3
    assert_close(before, after, (2, 5, 8), roundings=24)


def test_the_columns_are_taken_as_they_are() -> None:
    before = joint(READERS["gather"])
    weight = before.graph.initializers["w"].const_value.numpy()
    after = apply(before, SPLIT)
    parts = [after.graph.initializers[f"w_part{i}"].const_value.numpy() for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), weight)


def test_declines_when_a_reader_takes_more_than_one_index() -> None:
    before = joint(READERS["gather"], tail="z = Relu(t)")
    before.graph.outputs.append(next(v for n in before.graph for v in n.outputs if v.name == "z"))
    assert codes(before, SPLIT) == ["READER"]


def test_declines_when_a_part_is_not_read() -> None:
    readers = "q = Gather<axis=0>(t, i0) k = Gather<axis=0>(t, i1) v = Relu(q)"
    assert codes(joint(readers), SPLIT) == ["READER"]


def test_the_fashion_transformer_has_its_four_projections_split() -> None:
    model = load_model(FASHION).model
    from deploycc import registry
    from deploycc.core.contract import CANONICAL
    from deploycc.core.passes import run

    canonical, _ = run(model, [cls() for _, cls in registry.passes("canonicalize")], contract=CANONICAL)
    assert len(record(canonical, SPLIT).rewrites) == 4
