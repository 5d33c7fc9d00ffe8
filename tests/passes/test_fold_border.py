"""Borders that hold the image of zero: blocks of DBB as its authors write them, and every reason to leave a border alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from pass_graphs import apply, assert_close, assert_same, codes, execute, graph, operators, record
from torch_blocks import Dbb, PaddedNorm, exported, randomized

from passes.eliminate_identity import EliminateIdentity
from passes.fold_batchnorm import FoldBatchnorm
from passes.fold_border import FoldBorder
from passes.fold_constants import FoldConstants
from passes.merge_branches import MergeBranches
from passes.merge_convolutions import MergeConvolutions

FOLD = FoldBorder()
FRONT = [FoldConstants(), EliminateIdentity(), FOLD, FoldBatchnorm()]

# One channel: 2 x + 3, so the image of zero is 3. The map is 4 x 5 with its border, which is written row by row.
GIVEN = (
    "float[1,1,1,1] w = {2}, float[1] b = {3}, int64[8] p = {0,0,1,1,0,0,1,1}, float[1,1,3,3] k = {1,2,3,4,5,6,7,8,9},"
    "int64[2,1] ends = {0,-1}, int64[2,1] last = {0,4}, int64[1,1] first = {0}, float[2,1,1,5] row = {3,3,3,3,3,3,3,3,3,3},"
    "float[2,1,4,1] column = {3,3,3,3,3,3,3,3}, float[1,1,4,1] one = {3,3,3,3}, float[2,1,1,5] ramp = {3,3,3,3,3,3,3,3,3,4},"
    "float[1,1,1,3] part = {3,3,3}"
)
MAP = "a = Conv(x, w, b) z = Pad(a, p)"
ROWS = "t = Transpose<perm=[2,1,0,3]>(z) r = ScatterND(t, ends, row)"
COLUMNS = "u = Transpose<perm=[3,1,0,2]>(r) c = ScatterND(u, last, column) f = Transpose<perm=[3,1,2,0]>(c)"


def border(text: str, *, outputs: str = "float[1,1,2,3] y", inputs: str = "float[1,1,2,3] x", given: str = GIVEN) -> ir.Model:
    return graph(f"({inputs}) => ({outputs}) <{given}> {{ {text} }}")


def test_before_and_expected() -> None:
    before = border(f"{MAP} {ROWS} {COLUMNS} y = Conv(f, k)")
    expected = border("a = Conv<pads=[1,1,1,1]>(x, w, b) y = Conv(a, k)")
    after = apply(before, FOLD)
    assert_same(after, expected)
    assert_close(before, after, (1, 1, 2, 3), roundings=8)
    assert operators(apply(after, MergeConvolutions())) == ["Conv"]


def test_a_stride_of_the_convolution_spreads_the_padding() -> None:
    before = border(f"a = Conv<strides=[2,2]>(x, w, b) z = Pad(a, p) {ROWS} {COLUMNS} y = Conv(f, k)", inputs="float[1,1,4,6] x")
    after = apply(before, FOLD)
    assert operators(after) == ["Conv", "Conv"]
    assert_close(before, after, (1, 1, 4, 6), roundings=8)


def test_whoever_reads_the_complete_map_may_be_anything() -> None:
    outputs = "float[1,1,4,5] y, float[1,1,4,5] f, int64[4] s"
    before = border(f"{MAP} {ROWS} s = Shape(z) {COLUMNS} y = Relu(f)", outputs=outputs)
    after = apply(before, FOLD)
    assert sorted(operators(after)) == ["Conv", "Relu", "Shape"]
    assert_close(before, after, (1, 1, 2, 3), roundings=8)


DECLINED = {
    "BORDER_VALUE": f"{MAP} t = Transpose<perm=[2,1,0,3]>(z) h = Neg(row) r = ScatterND(t, ends, h) {COLUMNS} y = Conv(f, k)",
    "BORDER_PART, one side": f"{MAP} {ROWS} u = Transpose<perm=[3,1,0,2]>(r) c = ScatterND(u, first, one)"
    " f = Transpose<perm=[3,1,2,0]>(c) y = Conv(f, k)",
    "BORDER_PART, not one number": f"{MAP} t = Transpose<perm=[2,1,0,3]>(z) r = ScatterND(t, ends, ramp) {COLUMNS} y = Conv(f, k)",
    "BORDER_PART, a sum": f'{MAP} t = Transpose<perm=[2,1,0,3]>(z) r = ScatterND<reduction="add">(t, ends, row) {COLUMNS} y = Conv(f, k)',
    "BORDER_PART, channels": f"{MAP} t = Transpose<perm=[1,2,0,3]>(z) r = ScatterND(t, first, wide)"
    " f = Transpose<perm=[2,0,1,3]>(r) y = Conv(f, k)",
    "NOT_POINTWISE": f"a = Relu(x) z = Pad(a, p) {ROWS} {COLUMNS} y = Conv(f, k)",
    "NONCONST_PADS": f'a = Conv(x, w, b) z = Pad<mode="edge">(a, p) {ROWS} {COLUMNS} y = Conv(f, k)',
    "MULTI_CONSUMER": f"{MAP} {ROWS} {COLUMNS} d = Relu(z) e = Add(f, d) y = Conv(e, k)",
    "MULTI_CONSUMER, inside": f"{MAP} {ROWS} {COLUMNS} d = Conv(f, k) y = Add(d, a)",
    "GRAPH_OUTPUT": f"{MAP} {ROWS} {COLUMNS} y = Conv(f, k)",
}


@pytest.mark.parametrize("name", DECLINED)
def test_declines(name: str) -> None:
    outputs = "float[1,1,2,3] y" + (", float[1,1,4,5] z" if name == "GRAPH_OUTPUT" else "")
    before = border(DECLINED[name], outputs=outputs, given=f"{GIVEN}, float[1,4,1,5] wide = {{{', '.join(['3'] * 20)}}}")
    before = apply(before, FoldConstants())
    assert codes(before, FOLD) == [name.split(",")[0]]


def test_a_map_without_scattered_rows_is_not_spoken_of() -> None:
    assert codes(border(f"{MAP} y = Conv(z, k)"), FOLD) == []


class Biased(torch.nn.Module):
    """A convolution whose bias the border forgets, as no trained DBB has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = torch.nn.Conv2d(4, 4, 1), PaddedNorm(4, 1), torch.nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def test_a_border_that_forgets_a_bias_is_declined() -> None:
    model = apply(exported(randomized(Biased()), 2, 4, 9, 9), *FRONT[:2])
    assert codes(model, FOLD) == ["BORDER_VALUE"]


@pytest.mark.parametrize(("outputs", "stride", "sizes"), [(8, 1, True), (16, 2, False)])
def test_a_diverse_branch_block_becomes_one_convolution(outputs: int, stride: int, sizes: bool) -> None:
    block = randomized(Dbb(8, outputs, stride, padded_norm=True))
    after = apply(exported(block, 2, 8, 16, 16, sizes=sizes), *FRONT, MergeBranches())
    assert operators(after) == ["Conv", "Relu"]
    for shape in [(1, 8, 16, 16), (3, 8, 16, 16), *([(3, 8, 13, 11), (5, 8, 9, 32)] if sizes else [])]:
        x = torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))
        with torch.no_grad():
            wanted = block(x).numpy()
        found = execute(after, {"x": x.numpy()})[0]
        assert np.max(np.abs(wanted - found)) <= 1e-5 * np.max(np.abs(wanted))


def test_the_proof_says_what_was_rounded() -> None:
    rewrite = record(border(f"{MAP} {ROWS} {COLUMNS} y = Conv(f, k)"), FOLD).rewrites[0]
    assert rewrite.proof == "the border is exact, not as the model rounded it"
    assert rewrite.what == "'n_a' pads instead"
