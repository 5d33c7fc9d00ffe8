"""InternImage, written from its paper (arXiv 2211.05778): stacked DCNv3 blocks scaled by channels, depths and groups.

Every variant follows four rules: stage i has 2^(i-1) C channels, groups of equal width, equal depths in stages 1, 2 and 4, and a
third stage at least as deep. Norms, layer scales and the extras of the billion-parameter model are those of the published weights.
All maps are NHWC between the convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from deploycc.core.dcnv3 import DCNv3
from plugins_trt.dcnv3_torch import dcnv3


@dataclass(frozen=True)
class Variant:
    """One member of the family; ``large`` adds what only the billion-parameter model has."""

    channels: int
    depths: tuple[int, ...]
    group_width: int = 16
    post_norm: bool = True
    layer_scale: float | None = 1e-5
    offset_scale: float = 1.0
    large: bool = False
    post_norm_every: int = 0


VARIANTS = {
    "t": Variant(64, (4, 4, 18, 4), post_norm=False, layer_scale=1.0),
    "s": Variant(80, (4, 4, 21, 4)),
    "b": Variant(112, (4, 4, 21, 4)),
    "l": Variant(160, (5, 5, 22, 5), offset_scale=2.0),
    "xl": Variant(192, (5, 5, 24, 5), offset_scale=2.0),
    "h": Variant(320, (6, 6, 32, 6), group_width=32, post_norm=False, layer_scale=None, large=True, post_norm_every=6),
}


class Channels(nn.Module):
    """A convolution of a map in NHWC."""

    def __init__(self, *arguments: int, **options: int | bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*arguments, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DeformableLayer(nn.Module):
    """The DCNv3 module: offsets and masks come from a depthwise convolution, values from a projection."""

    def __init__(self, channels: int, group_width: int, *, offset_scale: float, large: bool) -> None:
        super().__init__()
        groups, kernel = channels // group_width, 5 if large else 3
        self.what = DCNv3(group=groups, offset_scale=offset_scale)
        self.depthwise = Channels(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.act = nn.GELU()
        self.offset = nn.Linear(channels, groups * self.what.points * 2)
        self.mask = nn.Linear(channels, groups * self.what.points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.center = nn.Linear(channels, groups) if large else None
        # Offsets start small, so that training begins with a plain 3x3 window.
        for layer in (self.offset, self.mask):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        values, query = self.input_proj(x), self.act(self.norm(self.depthwise(x)))
        batch, height, width = x.shape[:3]
        logits = self.mask(query).reshape(batch, height, width, self.what.group, self.what.points)
        masks = logits.softmax(-1).reshape(batch, height, width, self.what.group * self.what.points)
        result = dcnv3(values, self.offset(query), masks, self.what)
        if self.center is not None:
            share = self.center(query).sigmoid()[..., None].expand(*x.shape[:3], -1, x.shape[3] // self.what.group).flatten(-2)
            result = result * (1 - share) + values * share
        return self.output_proj(result)


class Mlp(nn.Sequential):
    """Two linear layers, four times as wide between them."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


class Layer(nn.Module):
    """A deformable layer and an MLP, each with its norm before it, behind it, or both, and a skip."""

    def __init__(self, channels: int, variant: Variant) -> None:
        super().__init__()
        parts = [DeformableLayer(channels, variant.group_width, offset_scale=variant.offset_scale, large=variant.large), Mlp(channels)]
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(nn.LayerNorm(channels, eps=1e-6) for _ in parts)
        self.outer = nn.ModuleList(nn.LayerNorm(channels, eps=1e-6) if variant.large else nn.Identity() for _ in parts)
        self.post_norm = variant.post_norm
        self.scales = nn.ParameterList()
        if variant.layer_scale is not None:
            self.scales.extend(nn.Parameter(torch.full((channels,), variant.layer_scale)) for _ in parts)

    def forward(self, x: Tensor) -> Tensor:
        for i, (part, norm, outer) in enumerate(zip(self.parts, self.norms, self.outer, strict=True)):
            branch = norm(part(x)) if self.post_norm else outer(part(norm(x)))
            x = x + (branch * self.scales[i] if len(self.scales) else branch)
        return x


class Stage(nn.Module):
    """The layers at one resolution."""

    def __init__(self, channels: int, depth: int, variant: Variant) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(channels, variant) for _ in range(depth))
        self.norm = nn.Identity() if variant.post_norm else nn.LayerNorm(channels, eps=1e-6)
        every = variant.post_norm_every if depth > 2 * variant.post_norm_every else 0
        chosen = [i for i in range(depth) if every and i % every == every - 1]
        self.between = nn.ModuleDict({str(i): nn.LayerNorm(channels, eps=1e-6) for i in chosen})

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if str(i) in self.between:
                x = self.between[str(i)](x)
        return self.norm(x)


class Halve(nn.Sequential):
    """Halve the resolution and change the channels."""

    def __init__(self, channels_in: int, channels: int, *, bias: bool = False) -> None:
        super().__init__(Channels(channels_in, channels, 3, stride=2, padding=1, bias=bias), nn.LayerNorm(channels, eps=1e-6))


class Head(nn.Module):
    """1x1 convolution to one and a half times the channels, BatchNorm, GELU, average, classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        wide = channels * 3 // 2
        self.conv = nn.Conv2d(channels, wide, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(wide), nn.GELU()
        self.classify = nn.Linear(wide, classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(self.act(self.norm(self.conv(maps[-1].permute(0, 3, 1, 2)))).mean((2, 3)))


class AttentionHead(nn.Module):
    """The large model's head: stages 3 and 4 at one resolution, pooled by one query, projected and classified."""

    def __init__(self, channels: int, classes: int, width: int = 1024, heads: int = 16, embedding: int = 768) -> None:
        super().__init__()
        self.fine = nn.Conv2d(channels // 2, width, 1)
        self.coarse = nn.Sequential(nn.Conv2d(channels, 4 * width, 1), nn.PixelShuffle(2))
        self.norm_query, self.norm_key, self.norm_value = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project, self.norm = nn.Linear(width, embedding), nn.LayerNorm(embedding, eps=1e-6)
        self.classify, self.heads = nn.Linear(embedding, classes), heads

    def forward(self, maps: list[Tensor]) -> Tensor:
        fine, coarse = (m.permute(0, 3, 1, 2) for m in maps[-2:])
        tokens = (self.fine(fine) + self.coarse(coarse)).flatten(2).transpose(1, 2)
        query = self.query(self.norm_query(tokens.mean(1, keepdim=True)))
        key, value = self.key(self.norm_key(tokens)), self.value(self.norm_value(tokens))
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value)]
        pooled = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return self.classify(self.norm(self.project(pooled)[:, 0]))


class InternImage(nn.Module):
    """Stem, four stages with halvings between them, head; ``image`` [N, 3, H, W] to logits [N, classes]."""

    def __init__(self, variant: Variant, classes: int = 1000, images: int = 3) -> None:
        super().__init__()
        widths = [variant.channels * 2**i for i in range(len(variant.depths))]
        self.stem = nn.Sequential(Halve(images, widths[0] // 2, bias=True), nn.GELU(), Halve(widths[0] // 2, widths[0], bias=True))
        self.stages = nn.ModuleList(Stage(w, d, variant) for w, d in zip(widths, variant.depths, strict=True))
        self.halvings = nn.ModuleList(Halve(a, b) for a, b in pairwise(widths))
        self.head = (AttentionHead if variant.large else Head)(widths[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        x, maps = self.stem(image.permute(0, 2, 3, 1)), []
        for i, stage in enumerate(self.stages):
            maps.append(stage(x))
            if i < len(self.halvings):
                x = self.halvings[i](maps[-1])
        return self.head(maps)


def internimage_t() -> InternImage:
    """Return an untrained InternImage-T (30M parameters)."""
    return InternImage(VARIANTS["t"])


def internimage_s() -> InternImage:
    """Return an untrained InternImage-S (50M parameters)."""
    return InternImage(VARIANTS["s"])


def internimage_b() -> InternImage:
    """Return an untrained InternImage-B (97M parameters)."""
    return InternImage(VARIANTS["b"])


def fashion() -> InternImage:
    """Return an untrained small InternImage for Fashion-MNIST: one channel, ten classes, 0.09M parameters."""
    return InternImage(Variant(32, (1, 1), post_norm=False, layer_scale=1.0), classes=10, images=1)
