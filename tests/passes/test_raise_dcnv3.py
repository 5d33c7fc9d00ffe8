"""The decompositions that exporters leave, taken from PyTorch, and graphs that only look like one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from dcnv3_fragments import decomposed
from pass_graphs import apply, codes, execute, graph
from random_graphs import Builder
from torch import Tensor, nn
from torch.nn import functional

from deploycc.core.dcnv3 import attributes_of, nodes_of
from deploycc.interop import load_model
from passes.eliminate_identity import EliminateIdentity
from passes.fold_constants import FoldConstants
from passes.raise_dcnv3 import RaiseDcnv3
from plugins_trt.dcnv3 import DCNv3
from plugins_trt.dcnv3_torch import sampled

if TYPE_CHECKING:
    from collections.abc import Callable

PREPARED = (FoldConstants(), EliminateIdentity())


def padded(x: Tensor, offset: Tensor, mask: Tensor, what: DCNv3) -> Tensor:
    """DCNv3 in the steps of the published PyTorch code: pad, flatten, normalize by the padded size."""
    batch, rows, columns = offset.shape[:3]
    group, points, channels = what.group, what.points, x.shape[3]
    image = functional.pad(x, [0, 0, what.pad_w, what.pad_w, what.pad_h, what.pad_h])
    height, width = image.shape[1:3]
    reach = [what.dilation_h * (what.kernel_h - 1) // 2, what.dilation_w * (what.kernel_w - 1) // 2]
    y = (torch.arange(rows) * what.stride_h + reach[0] + 0.5) / height
    x_ = (torch.arange(columns) * what.stride_w + reach[1] + 0.5) / width
    first = torch.stack(torch.meshgrid(y, x_, indexing="ij")[::-1], -1).reshape(1, rows, columns, 1, 2)
    i = (torch.arange(what.kernel_w) * what.dilation_w - reach[1]) / width
    j = (torch.arange(what.kernel_h) * what.dilation_h - reach[0]) / height
    window = torch.stack(torch.meshgrid(i, j, indexing="ij"), -1).reshape(-1, 1, 2).repeat(1, group, 1).permute(1, 0, 2)
    size = torch.tensor([width, height]).reshape(1, 1, 1, 2).repeat(1, 1, 1, group * points)
    places = (first + window.reshape(1, 1, 1, group * points, 2) * what.offset_scale).repeat(batch, 1, 1, 1, 1).flatten(3, 4)
    grid = 2 * (places + offset * what.offset_scale / size) - 1
    grid = grid.view(batch, rows * columns, group, points, 2).transpose(1, 2).flatten(0, 1)
    maps = image.view(batch, height * width, channels).transpose(1, 2).reshape(batch * group, channels // group, height, width)
    samples = functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = mask.view(batch, rows * columns, group, points).transpose(1, 2).reshape(batch * group, 1, rows * columns, points)
    total = (samples * weights).sum(-1).view(batch, channels, rows * columns)
    return total.transpose(1, 2).reshape(batch, rows, columns, -1).contiguous()


class Layer(nn.Module):
    """A DCNv3 layer around one of the forms."""

    def __init__(self, form: Callable[..., Tensor], what: DCNv3) -> None:
        super().__init__()
        self.form, self.what = form, what
        self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.offset, self.mask = nn.Linear(8, what.group * what.points * 2), nn.Linear(8, what.group * what.points)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.what.output_size(*x.shape[1:3])
        query = x[:, :: self.what.stride_h, :: self.what.stride_w][:, :rows, :columns]
        mask = self.mask(query).unflatten(-1, (self.what.group, -1)).softmax(-1).flatten(-2)
        return self.out(self.form(self.value(x), self.offset(query), mask, self.what))


WIDE = DCNv3(group=2, kernel_h=5, kernel_w=3, pad_h=2, pad_w=2, dilation_w=2, offset_scale=1.5)
HALVED = DCNv3(group=4, stride_h=2, stride_w=2, offset_scale=2.0)


@pytest.mark.parametrize(("form", "what"), [(sampled, HALVED), (padded, DCNv3(group=2)), (padded, WIDE)])
def test_exports_become_the_operator(form: Callable[..., Tensor], what: DCNv3, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = Layer(form, what).eval(), torch.randn(3, 9, 11, 8)
    batch = torch.export.Dim("batch", min=1, max=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(layer, (x,), dynamo=True, optimize=False, verbose=False, opset_version=18, dynamic_shapes=({0: batch},))
    assert program is not None
    program.save(tmp_path / "layer.onnx")
    after = apply(load_model(tmp_path / "layer.onnx").model, *PREPARED, RaiseDcnv3())
    assert "GridSample" not in {n.op_type for n in after.graph}
    assert attributes_of(nodes_of(after)[0]) == what
    with torch.no_grad():
        expected = layer(x).numpy()
    found = execute(after, {after.graph.inputs[0].name or "": x.numpy()})[0]
    assert np.abs(found - expected).max() <= 5e-6 * np.abs(expected).max()


def plain() -> str:
    """Return the text of a decomposition."""
    builder = Builder(np.random.default_rng(0), "float")
    decomposed(builder, lambda strategy: 3 if "integers" in repr(strategy) else 0)
    return builder.text()


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("GridSample(", "GridSample<align_corners=1>(", "MODE"),
        ("GridSample(", 'GridSample<mode="nearest">(', "MODE"),
        ("GridSample(", 'GridSample<padding_mode="border">(', "MODE"),
        ("ReduceSum<keepdims=0>", "ReduceMean<keepdims=0>", "FORM"),
        ("Transpose<perm=[0,3,4,1,2]>", "Transpose<perm=[0,4,3,1,2]>", "FORM"),
        ("Transpose<perm=[0,3,1,2,4]>", "Transpose<perm=[0,3,2,1,4]>", "FORM"),
        ("Transpose<perm=[0,3,1,2,4,5]>", "Transpose<perm=[0,3,2,1,4,5]>", "POSITIONS"),
        ("{4.0, 4.0}", "{4.0, 5.0}", "POSITIONS"),
    ],
)
def test_what_only_looks_like_it_stays(old: str, new: str, code: str) -> None:
    text = plain()
    assert old in text
    # The image's own layout comes first in the text; the result's is the last of that permutation.
    changed = new.join(text.rsplit(old, 1)) if old.startswith("Transpose<perm=[0,3,4,1,2]>") else text.replace(old, new)
    before = apply(graph(changed), *PREPARED)
    assert codes(before, RaiseDcnv3()) == [code]
    assert codes(apply(graph(text), *PREPARED), RaiseDcnv3()) == []


def test_declines_shape() -> None:
    grid = "(float[N,4,8,8] image, float[N,P,Q,2] grid, float[N,1,P,Q] w) => (float[N,4,P] y)"
    body = "s = GridSample(image, grid) p = Mul(s, w) y = ReduceSum<keepdims=0>(p, axes)"
    assert codes(graph(f"{grid} <int64[1] axes = {{3}}> {{ {body} }}"), RaiseDcnv3()) == ["SHAPE"]
