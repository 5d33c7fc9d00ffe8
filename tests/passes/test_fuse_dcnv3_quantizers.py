from __future__ import annotations

import numpy as np
import onnx_ir as ir
from pass_graphs import apply, codes, execute, graph, operators

from deploycc.core.contract import LOWERED
from deploycc.core.dcnv3 import attributes_of, nodes_of
from deploycc.core.passes import run
from passes.fold_constants import FoldConstants
from passes.fuse_dcnv3_quantizers import FuseDcnv3Quantizers

FUSE = FuseDcnv3Quantizers()
INPUTS = "int8[N,4,5,8] q, float16[N,4,5,36] o, float16[N,4,5,18] m"
# ONNX text has no FP16 constants: they are cast, and folded.
BEFORE = "s = Cast<to=10>(sf) t = Cast<to=10>(tf) x = DequantizeLinear(q, s) d = deploycc.DCNv3<group=2>(x, o, m)"
BOTH = "<float sf = {0.03125}, float tf = {0.0078125}, int8 z = {0}>"
FLOAT, CODES = "float16[N,4,5,8] y", "int8[N,4,5,8] y"


def folded(text: str) -> ir.Model:
    return apply(graph(text), FoldConstants())


def lowered(model: ir.Model) -> ir.Model:
    return run(model, [FUSE], contract=LOWERED)[0]


def feeds() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "q": draw.integers(-127, 128, (2, 4, 5, 8)).astype(np.int8),
        "o": draw.standard_normal((2, 4, 5, 36)).astype(np.float16),
        "m": (draw.random((2, 4, 5, 18)) / 9).astype(np.float16),
    }


def test_values_are_read_as_codes() -> None:
    before = folded(f"({INPUTS}) => ({FLOAT}) {BOTH} {{ {BEFORE} y = Identity(d) }}")
    after = lowered(before)
    assert operators(after) == ["DCNv3DQ", "Identity"]
    assert attributes_of(nodes_of(after)[0]).x_scale == 0.03125
    # Codes times a power of two are exact in FP16, so that nothing but the order of a product and a sum differs.
    np.testing.assert_allclose(execute(after, feeds())[0], execute(before, feeds())[0], rtol=0, atol=2.0**-10)


def test_the_result_is_written_as_codes() -> None:
    before = folded(f"({INPUTS}) => ({CODES}) {BOTH} {{ {BEFORE} y = QuantizeLinear(d, t, z) }}")
    after = lowered(before)
    assert operators(after) == ["DCNv3DQQ"]
    assert after.graph.outputs[0].name == "y"
    assert after.graph.outputs[0].dtype == ir.DataType.INT8
    # The original rounds the result to FP16 before it rounds to a code: they may differ by one code where it is near the middle of two.
    difference = np.abs(execute(after, feeds())[0].astype(int) - execute(before, feeds())[0].astype(int))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.97


def test_a_result_with_a_second_reader_stays_in_floating_point() -> None:
    after = lowered(folded(f"({INPUTS}) => ({CODES}, {FLOAT[:-1]}w) {BOTH} {{ {BEFORE} y = QuantizeLinear(d, t, z) w = Neg(d) }}"))
    assert operators(after) == ["DCNv3DQ", "QuantizeLinear", "Neg"]


def test_declines_type() -> None:
    inputs = INPUTS.replace("float16[N,4,5,36]", "float[N,4,5,36]")
    assert codes(folded(f"({inputs}) => ({FLOAT}) {BOTH} {{ {BEFORE} y = Neg(d) }}"), FUSE) == ["TYPE"]


def test_declines_scale() -> None:
    constants = "<float[8] sf = {1, 1, 1, 1, 1, 1, 1, 2}, float tf = {1}>"
    before = BEFORE.replace("DequantizeLinear", "DequantizeLinear<axis=3>")
    assert codes(folded(f"({INPUTS}) => ({FLOAT}) {constants} {{ {before} y = Neg(d) }}"), FUSE) == ["SCALE"]
    inputs = f"{INPUTS}, float sf"
    assert codes(folded(f"({inputs}) => ({FLOAT}) <float tf = {{1}}> {{ {BEFORE} y = Neg(d) }}"), FUSE) == ["SCALE"]


def test_nothing_to_do() -> None:
    text = "(float16[N,4,5,8] x, float16[N,4,5,36] o, float16[N,4,5,18] m) => (float16[N,4,5,8] y) { y = deploycc.DCNv3<group=2>(x, o, m) }"
    assert operators(lowered(graph(text))) == ["DCNv3"]
    assert codes(graph(text), FUSE) == []
