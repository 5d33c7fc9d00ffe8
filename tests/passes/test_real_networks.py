"""Networks in training form, raw-exported: the canonical passes keep what they compute, and leave one Conv per merged block."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from pass_graphs import execute, operators
from torch import Tensor, nn
from torch_blocks import Dbb, MobileOne, RepVgg, exported, randomized

from deploycc import registry
from deploycc.core.contract import CANONICAL
from deploycc.core.passes import run
from deploycc.export import declare_torchvision_operators

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

BOUND = 1e-4
TIMM = {
    "repvgg_a0": [(2, 96, 96), (1, 64, 128), (3, 95, 71)],
    "mobileone_s0": [(2, 96, 96), (1, 64, 128), (3, 95, 71)],
    "resnet34": [(2, 96, 96), (1, 64, 128), (3, 95, 71)],
    "resnet50": [(2, 96, 96), (1, 64, 128), (3, 95, 71)],
    "mobilenetv2_100": [(2, 96, 96), (1, 64, 128), (3, 95, 71)],
    "convnext_tiny": [(2, 96, 96), (1, 64, 128), (3, 128, 96)],
    "deit_tiny_patch16_224": [(2, 224, 224), (1, 224, 224), (3, 224, 224)],
    "swin_tiny_patch4_window7_224": [(2, 224, 224), (1, 224, 224), (3, 224, 224)],
}


class DbbNet(nn.Module):
    """A residual network of diverse branch blocks."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = Dbb(3, width, 2, padded_norm=True)
        self.blocks = nn.ModuleList(
            nn.Sequential(Dbb(width, width, padded_norm=True), Dbb(width, width, padded_norm=True)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for block in self.blocks:
            y = y + block(y)
        return self.head(y.mean((2, 3)))


SMALL: dict[str, Callable[[], nn.Module]] = {
    "RepVGG and MobileOne": lambda: nn.Sequential(RepVgg(3, 8, 2), RepVgg(8, 8), MobileOne(8, 3, groups=8), MobileOne(8, 1)),
    "DBB": lambda: DbbNet(8, 1),
}


def canonical(model: ir.Model) -> ir.Model:
    """Run every canonical pass."""
    return run(model, [cls() for _, cls in registry.passes("canonicalize")], contract=CANONICAL)[0]


def assert_equal(network: nn.Module, before: ir.Model, after: ir.Model, sizes: list[tuple[int, int, int]]) -> None:
    """Compare the network, its raw export and the result on images of several sizes and batches."""
    for batch, height, width in sizes:
        x = np.random.default_rng(height * width).standard_normal((batch, 3, height, width)).astype(np.float32)
        (raw,), (found,) = execute(before, {"x": x}), execute(after, {"x": x})
        with torch.no_grad():
            wanted = network(torch.from_numpy(x)).numpy()
        for reference in (raw, wanted):
            assert reference.shape == found.shape
            assert np.max(np.abs(reference - found)) <= BOUND * np.max(np.abs(reference))


@pytest.mark.parametrize("name", SMALL)
def test_a_small_network_is_kept_and_merged(name: str) -> None:
    network = randomized(SMALL[name]())
    before = exported(network, 2, 3, 32, 32, sizes=True)
    after = canonical(before)
    assert operators(after).count("Conv") == {"RepVGG and MobileOne": 4, "DBB": 3}[name]
    assert "BatchNormalization" not in operators(after)
    assert_equal(network, before, after, [(2, 32, 32), (1, 16, 24), (3, 17, 29)])


@pytest.mark.slow
def test_a_deep_residual_network_of_diverse_branches_is_kept_and_merged() -> None:
    network = randomized(DbbNet(32, 8))
    before = exported(network, 2, 3, 64, 64, sizes=True)
    after = canonical(before)
    assert operators(after).count("Conv") == 17
    assert_equal(network, before, after, [(2, 64, 64), (1, 32, 48), (3, 57, 43)])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_is_kept(name: str) -> None:
    declare_torchvision_operators()
    import timm

    torch.manual_seed(0)
    network = randomized(timm.create_model(name, pretrained=False))
    sizes = TIMM[name]
    is_free = len({size[1:] for size in sizes}) > 1
    before = exported(network, 2, 3, *sizes[0][1:], sizes=is_free, largest=256)
    after = canonical(before)
    if name == "repvgg_a0":
        assert operators(after).count("Conv") == 1 + sum(network_depths(network))
    assert "BatchNormalization" not in operators(after)
    assert_equal(network, before, after, sizes)


def network_depths(network: nn.Module) -> list[int]:
    """Return the number of blocks of each stage of a RepVGG network."""
    return [len(stage) for stage in network.stages]
