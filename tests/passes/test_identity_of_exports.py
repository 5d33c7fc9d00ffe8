"""Raw exports keep the PyTorch module of every region through all exact passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest
from torch import Tensor, nn
from torch_blocks import RepVgg, exported

from deploycc.export import declare_torchvision_operators
from deploycc.quant.regions import partition
from deploycc.request import BuildRequest, Silent, resolve
from deploycc.rewriting import canonicalize

if TYPE_CHECKING:
    from pathlib import Path

    from deploycc.core.plan import Region


def regions_of(network: nn.Module, folder: Path, *shape: int) -> tuple[Region, ...]:
    """Export without the exporter's optimizer, run the exact passes as a build does, and partition."""
    ir.save(exported(network, *shape), folder / "raw.onnx")
    request = BuildRequest(folder / "raw.onnx", "int8", data="synthetic:2", targets=("onnxruntime",), shapes=("x=1:2:2",))
    return partition(canonicalize(resolve(request, Silent())).model)


class Small(nn.Module):
    """Branches that become one convolution, a residual sum, a normalization, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = RepVgg(3, 16, 2)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.body(y)
        return self.head(self.norm(y.mean((2, 3))))


def test_merged_branches_have_the_module_of_their_block(tmp_path: Path) -> None:
    assert [r.source for r in regions_of(Small(), tmp_path, 2, 3, 32, 32)] == ["stem", "body.0", "head"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "count"), [("resnet18", 64, 21), ("deit_tiny_patch16_224", 224, 62)])
def test_networks_of_timm(name: str, size: int, count: int, tmp_path: Path) -> None:
    """The module of each weighted region is one that holds a weight, and attention cores are those of attention modules."""
    declare_torchvision_operators()
    import timm

    network = timm.create_model(name)
    regions = regions_of(network, tmp_path, 2, 3, size, size)
    modules = dict(network.named_modules())
    assert len(regions) == count
    assert [r.name for r in regions if r.source not in modules] == []
    assert [r.source for r in regions if r.weights and not hasattr(modules[r.source], "weight")] == []
    assert all(r.source.endswith("attn") for r in regions if r.kind == "attention")
