"""Sums of branches over one value: RepVGG, DBB, MobileOne and residual blocks, and every reason to leave one alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from pass_graphs import apply, assert_close, assert_same, codes, execute, graph, operators, record
from torch_blocks import Dbb, MobileOne, QaRepVgg, RepVgg, exported, randomized

from passes.eliminate_identity import EliminateIdentity
from passes.fold_batchnorm import FoldBatchnorm
from passes.fold_constants import FoldConstants
from passes.merge_branches import MergeBranches

MERGE = MergeBranches()
FRONT = [FoldConstants(), EliminateIdentity(), FoldBatchnorm()]


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).uniform(-1, 1, shape).round(3)
    return f"float{list(shape)}".replace(" ", "") + f" {name} = {{{', '.join(map(str, values.ravel()))}}}"


GIVEN = ", ".join(
    [
        *(tensor(name, 4, 4, 3, 3) for name in ("w", "ww")),
        *(tensor(name, 4, 4, 1, 1) for name in ("p", "pp")),
        *(tensor("rows", 4, 4, 3, 1), tensor("columns", 4, 4, 1, 3), tensor("even", 4, 4, 2, 2), tensor("deep", 4, 1, 3, 3)),
        *(tensor("halves", 4, 2, 1, 1), tensor("b", 4), tensor("s", 4, 1, 1), "float half = {0.5}", "float[1] zero = {0}"),
        "float[4] g = {1, -2, 0.5, 3}, float[4] m = {1, 0, -1, 2}, float[4] v = {1, 2, 0.5, 4}",
    ]
)
W = "Conv<pads=[1,1,1,1]>(x, w, b)"


def branches(text: str, *, outputs: str = "float[N,4,?,?] y", size: str = "H,W", inputs: str = "") -> ir.Model:
    return graph(f"(float[N,4,{size}] x{inputs}) => ({outputs}) <{GIVEN}> {{ {text} }}")


def test_before_and_expected() -> None:
    before = graph(
        """(float[N,1,4,4] x) => (float[N,1,4,4] y) <float[1,1,3,3] w = {1,2,3,4,5,6,7,8,9}, float[1] c = {1}, float[1,1,1,1] v = {2}>
        { a = Conv<pads=[1,1,1,1]>(x, w, c) d = Conv(x, v) e = Add(a, d) y = Add(x, e) }"""
    )
    expected = graph(
        """(float[N,1,4,4] x) => (float[N,1,4,4] y) <float[1,1,3,3] w = {1,2,3,4,8,6,7,8,9}, float[1] c = {1}>
        { y = Conv<kernel_shape=[3,3], strides=[1,1], dilations=[1,1], pads=[1,1,1,1], group=1>(x, w, c) }"""
    )
    assert_same(apply(before, MERGE), expected)


SUMS = {
    "rows and columns": "a = Conv<pads=[1,0,1,0]>(x, rows) c = Conv<pads=[0,1,0,1]>(x, columns, b) y = Add(a, c)",
    "dense and depthwise": f"a = {W} c = Conv<group=4, pads=[1,1,1,1]>(x, deep) y = Add(a, c)",
    "grouped and a skip": "a = Conv<group=2>(x, halves, b) y = Add(x, a)",
    "a scaled skip": f"a = {W} c = Mul(s, x) y = Add(c, a)",
    "a skip scaled by one number": f"a = {W} c = Mul(x, half) y = Add(c, a)",
    "a normalized skip": f"a = {W} c = BatchNormalization(x, g, b, m, v) y = Add(c, a)",
    "a normalization behind": f"a = {W} c = Add(x, a) y = BatchNormalization(c, g, b, m, v)",
    "an even kernel": "a = Conv<pads=[0,1,1,0]>(x, even) y = Add(a, x)",
    "dilation over one tap": "a = Conv<dilations=[2,2], pads=[2,2,2,2]>(x, w) c = Conv(x, p) y = Add(a, c)",
    "dilations 1 and 2": f"a = Conv<dilations=[2,2], pads=[2,2,2,2]>(x, w) c = {W} d = Add(a, c) y = Add(d, x)",
    "stride 2": "a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w, b) c = Conv<strides=[2,2]>(x, p) y = Add(a, c)",
    "an average": f"a = {W} c = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x) y = Add(a, c)",
    "a chain in a branch": f"a = {W} c = Conv<pads=[1,1,1,1]>(x, p, b) d = Conv(c, ww) y = Add(a, d)",
    "a chain and a skip": "a = Conv(x, p) c = Conv<pads=[1,1,1,1]>(a, w, b) y = Add(c, x)",
    "an inner skip": "a = Conv(x, p, b) c = Conv(a, pp) d = Add(c, a) e = Conv(d, p) y = Add(e, x)",
    "a sum of many": f"a = {W} c = Conv(x, p) y = Sum(a, x, c)",
    "constants": f"a = {W} c = Conv(x, p) d = Add(c, zero) e = Add(a, s) y = Add(d, e)",
    "a slope of 1": f"a = {W} c = LeakyRelu<alpha=1.0>(a) y = Add(c, x)",
    "padding that keeps the size": 'a = Conv<auto_pad="SAME_UPPER">(x, even) c = Conv<auto_pad="VALID">(x, p) y = Add(a, c)',
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("size", ["9,7", "H,W"])
def test_merges_into_one(name: str, size: str) -> None:
    before = branches(SUMS[name], size=size)
    after = apply(before, MERGE)
    assert operators(after) == ["Conv"]
    for shape in [(1, 4, 9, 7)] + [(3, 4, 12, 15), (2, 4, 4, 4)] * (size == "H,W"):
        assert_close(before, after, shape, roundings=256)


def test_what_reads_another_value_is_added_to_the_rest() -> None:
    before = branches(f"r = Relu(x) a = {W} c = Add(a, r) d = Conv(x, p) y = Add(c, d)", size="9,7", outputs="float[N,4,9,7] y")
    after = apply(before, MERGE)
    assert sorted(operators(after)) == ["Add", "Conv", "Relu"]
    assert_close(before, after, (2, 4, 9, 7), roundings=256)
    assert not record(after, MERGE).rewrites


def test_a_branch_that_does_not_compose_stays_beside_the_others() -> None:
    text = f"a = {W} c = Conv(x, p, b) d = Conv<pads=[1,1,1,1]>(c, ww) e = Conv(x, pp) f = Add(a, d) y = Add(f, e)"
    before = branches(text, size="9,7", outputs="float[N,4,9,7] y")
    after = apply(before, MERGE)
    assert sorted(operators(after)) == ["Add", "Conv", "Conv", "Conv"]
    assert codes(after, MERGE) == ["PAD2_NONZERO"]
    assert_close(before, after, (2, 4, 9, 7), roundings=256)


def test_an_ordinary_residual_block_is_not_spoken_of() -> None:
    before = branches(f"a = {W} c = Relu(a) d = Conv<pads=[1,1,1,1]>(c, ww) e = Add(d, x) y = Relu(e)")
    assert codes(before, MERGE) == []


def test_an_add_without_a_convolution_is_not_spoken_of() -> None:
    before = branches("a = Mul(x, half) c = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) y = Add(a, c)")
    assert codes(before, MERGE) == []


def test_off_does_nothing() -> None:
    assert operators(apply(branches(SUMS["a scaled skip"]), MergeBranches(merge="off"))) == ["Conv", "Mul", "Add"]


DECLINED = {
    "MULTI_CONSUMER": (f"a = {W} y = Add(a, x) z = Relu(a)", {"outputs": "float[N,4,?,?] y, float[N,4,?,?] z"}),
    "GRAPH_OUTPUT": (f"a = {W} y = Add(a, x)", {"outputs": "float[N,4,?,?] y, float[N,4,?,?] a"}),
    "NONCONST_WEIGHT": ("a = Conv<pads=[1,1,1,1]>(x, k) y = Add(a, x)", {"inputs": ", float[4,4,3,3] k"}),
    "PAD2_NONZERO": ("a = Conv(x, p, b) c = Conv<pads=[1,1,1,1]>(a, w) y = Add(c, x)", {}),
    "STRIDE_GROWTH": (
        "a = Conv<strides=[2,2], pads=[2,2,2,2]>(x, w) c = Conv(a, ww) d = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w) y = Add(c, d)",
        {"size": "8,8"},
    ),
    "GEOMETRY": ("a = Conv<pads=[2,2,2,2]>(x, w) c = Conv(x, p) y = Add(a, c)", {"size": "1,1", "outputs": "float[N,4,3,3] y"}),
    "CEIL_MODE": (f"a = {W} c = AveragePool<kernel_shape=[1,1], ceil_mode=1>(x) y = Add(a, c)", {}),
    "COUNT_PAD": (f"a = {W} c = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) y = Add(a, c)", {}),
    "DTYPE": (
        "k = DequantizeLinear(q, half) a = Conv<pads=[1,1,1,1]>(x, k) y = Add(a, x)",
        {"inputs": ", int8[4,4,3,3] q"},
    ),
    "DYNAMIC_SHAPE": (
        'a = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) c = Conv<strides=[2,2]>(x, p) y = Add(a, c)',
        {"size": "9,9"},
    ),
    "COST": ("a = Conv<group=4, pads=[1,1,1,1]>(x, deep) c = Conv(x, p) y = Add(a, c)", {}),
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines(code: str) -> None:
    text, options = DECLINED[code]
    assert codes(branches(text, **options), MERGE) == [code]


def test_declines_groups_that_do_not_nest() -> None:
    given = f"{tensor('w', 6, 3, 1, 1)}, {tensor('v', 6, 2, 1, 1)}"
    before = graph(
        f"(float[N,6,5,5] x) => (float[N,6,5,5] y) <{given}> {{ a = Conv<group=2>(x, w) c = Conv<group=3>(a, v) y = Add(c, x) }}"
    )
    assert codes(before, MERGE) == ["GROUP_MISMATCH"]


def test_declines_numeric() -> None:
    given = GIVEN.replace("v = {1, 2, 0.5, 4}", "v = {0, 2, 0.5, 4}")
    text = f"a = {W} c = BatchNormalization<epsilon=1e-12>(x, g, b, m, v) y = Add(c, a)"
    assert codes(graph(f"(float[N,4,9,7] x) => (float[N,4,9,7] y) <{given}> {{ {text} }}"), MERGE) == ["NUMERIC"]


def test_half_precision_weights_stay_half() -> None:
    text = "k = CastLike(w, x) p2 = CastLike(p, x) a = Conv<pads=[1,1,1,1]>(x, k) c = Conv(x, p2) y = Add(a, c)"
    before = graph(f"(float16[N,4,9,7] x) => (float16[N,4,9,7] y) <{GIVEN}> {{ {text} }}")
    after = apply(before, FoldConstants(), MERGE)
    assert operators(after) == ["Conv"]
    assert {v.dtype for v in after.graph.initializers.values()} == {ir.DataType.FLOAT16}


def test_the_gate_and_the_proof_are_stated() -> None:
    (rewrite,) = record(branches(SUMS["grouped and a skip"]), MERGE).rewrites
    assert rewrite.proof == "exact in float64, rounded once"
    assert "MACs per position 8 to 8 (x1.00), parameters 12 to 12" in rewrite.what


BLOCKS = {
    "RepVGG": lambda: RepVgg(8, 8),
    "RepVGG with stride": lambda: RepVgg(8, 16, 2),
    "RepVGG with groups": lambda: RepVgg(8, 8, groups=4),
    "QARepVGG": lambda: QaRepVgg(8),
    "MobileOne depthwise": lambda: MobileOne(8, 3, groups=8),
    "MobileOne pointwise": lambda: MobileOne(8, 1, branches=2),
    "MobileOne with stride": lambda: MobileOne(8, 3, stride=2, groups=8),
    "DBB": lambda: Dbb(8, 8),
    "DBB with stride": lambda: Dbb(8, 16, 2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_training_form_becomes_one_convolution(name: str) -> None:
    block = randomized(BLOCKS[name]())
    after = apply(exported(block, 2, 8, 16, 16, sizes=True), *FRONT, MERGE)
    assert operators(after) == ["Conv", "Relu"]
    for shape in [(1, 8, 16, 16), (3, 8, 13, 11), (5, 8, 9, 32)]:
        x = torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))
        with torch.no_grad():
            wanted = block(x).numpy()
        found = execute(after, {"x": x.numpy()})[0]
        assert np.max(np.abs(wanted - found)) <= 1e-5 * np.max(np.abs(wanted))


def test_a_stack_of_blocks_has_one_convolution_each() -> None:
    blocks = randomized(torch.nn.Sequential(RepVgg(3, 8, 2), RepVgg(8, 8), Dbb(8, 8), MobileOne(8, 3, groups=8), MobileOne(8, 1)))
    after = apply(exported(blocks, 2, 3, 17, 17), *FRONT, MERGE)
    assert operators(after) == ["Conv", "Relu"] * 5
