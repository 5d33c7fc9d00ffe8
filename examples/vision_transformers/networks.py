"""Two transformers in miniature: DeiT with its class token, and Swin with shifted windows and PatchMerging.

Both take grey images of shape ``[N, 1, 28, 28]`` with values in 0..1 and return logits of shape ``[N, 10]``. The blocks of the first
are those of ``examples/fashion``; those of the second follow Liu et al. 2021 ("Swin Transformer", sections 3.1 to 3.3).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "fashion"))
from models import Block


def patch_embedding(width: int, *, middle: int | None = None, kernel: int, padding: int) -> nn.Sequential:
    """Return convolutions with two strides of 2 in place of one of stride 4: small transformers learn much faster (Xiao et al. 2021).

    ``middle`` adds one of stride 1 between them.
    """
    steps = [(1, 24, 2)] + ([] if middle is None else [(24, middle, 1)])
    layers = [(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in steps]
    return nn.Sequential(*(layer for triple in layers for layer in triple), nn.Conv2d(middle or 24, width, kernel, 2, padding))


class MiniDeiT(nn.Module):
    """Pre-norm blocks over 36 patches and a class token; the token is classified."""

    def __init__(self, width: int = 60, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = patch_embedding(width, middle=48, kernel=4, padding=0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 37, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias per relative position."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        rows, columns = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("index", rows * (2 * window - 1) + columns, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attended windows ``[N*windows, tokens, width]``; ``mask`` is added per window, ``[windows, tokens, tokens]``."""
        count, tokens, width = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] * self.scale) @ qkv[1].transpose(-2, -1) + self.bias[self.index].permute(2, 0, 1)
        if mask is not None:
            apart = scores.reshape(-1, len(mask), self.heads, tokens, tokens) + mask[:, None]
            scores = apart.reshape(count, self.heads, tokens, tokens)
        return self.proj((scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(count, tokens, width))


class SwinBlock(nn.Module):
    """One pre-norm block over a map ``[N, side, side, width]``, its windows moved by ``shift``."""

    def __init__(self, width: int, heads: int, *, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), WindowAttention(width, heads, window), nn.LayerNorm(width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.register_buffer("mask", shift_mask(side, window, shift) if shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        side, window, width, across = self.side, self.window, x.shape[-1], self.side // self.window
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm1(x)
        y = y.reshape(-1, across, window, across, window, width).transpose(2, 3).reshape(-1, window * window, width)
        y = self.attn(y, self.mask)
        y = y.reshape(-1, across, across, window, window, width).transpose(2, 3).reshape(-1, side, side, width)
        x = x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Return ``[windows, tokens, tokens]``: 0 where two tokens of a shifted window lie together in the image, -100 elsewhere."""
    bands = torch.bucketize(torch.arange(side), torch.tensor([side - window, side - shift]), right=True)
    areas = bands[:, None] * 3 + bands[None, :]
    across = side // window
    areas = areas.reshape(across, window, across, window).transpose(1, 2).reshape(across * across, window * window)
    return torch.where(areas[:, :, None] == areas[:, None, :], 0.0, -100.0)


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width: concatenate, normalise, reduce."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class MiniSwin(nn.Module):
    """Two stages, 8x8 tokens in windows of 4x4 (every other block shifted), then 4x4 tokens in one window; the mean is classified."""

    def __init__(self, width: int = 32, depths: tuple[int, int] = (2, 4)) -> None:
        super().__init__()
        self.patch_embed, self.embed_norm = patch_embedding(width, kernel=3, padding=2), nn.LayerNorm(width)
        self.stage1 = nn.ModuleList(SwinBlock(width, 2, side=8, window=4, shift=2 * (i % 2)) for i in range(depths[0]))
        self.merging = PatchMerging(width)
        self.stage2 = nn.ModuleList(SwinBlock(2 * width, 4, side=4, window=4, shift=0) for _ in range(depths[1]))
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed_norm(self.patch_embed(image).permute(0, 2, 3, 1))
        for block in self.stage1:
            x = block(x)
        x = self.merging(x)
        for block in self.stage2:
            x = block(x)
        return self.head(self.norm(x).mean((1, 2)))


def deit() -> MiniDeiT:
    """Return an untrained MiniDeiT (0.32M parameters)."""
    return MiniDeiT()


def swin() -> MiniSwin:
    """Return an untrained MiniSwin (0.24M parameters)."""
    return MiniSwin()
