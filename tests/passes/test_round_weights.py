import numpy as np
from small_graphs import compute, graph, random, weight

from deploycc.core.contract import CANONICAL
from deploycc.core.passes import run
from passes.round_weights import RoundWeights

MODEL = "(float[B,4] x) => (float[B,3] y) { y = MatMul(x, w) }"


def test_the_weight_is_replaced_in_a_copy() -> None:
    before, new = graph(MODEL, w=weight(4, 3)), np.round(weight(4, 3), 1)
    after, [record] = run(before, [RoundWeights({"w": new})], contract=CANONICAL)
    x = random(5, 4)
    assert np.allclose(compute(after, x=x)["y"], x @ new, atol=1e-6)
    assert np.array_equal(before.graph.initializers["w"].const_value.numpy(), weight(4, 3))
    assert [r.anchor for r in record.rewrites] == ["w"]
    assert record.rewrites[0].proof.startswith("|w' - w| =")


def test_declines_what_does_not_fit() -> None:
    before = graph(MODEL, w=weight(4, 3))
    after, [record] = run(before, [RoundWeights({"w": weight(3, 4), "absent": weight(4, 3)})], contract=CANONICAL)
    assert [(d.anchor, d.code) for d in record.declines] == [("w", "NO_WEIGHT"), ("absent", "NO_WEIGHT")]
    assert after is before
