"""Blocks of networks trained with several branches, written down here, and their raw export to ONNX."""

from __future__ import annotations

import io
import warnings

import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploycc.interop.frontend import normalized


def exported(module: nn.Module, *shape: int, dynamic: bool = True, sizes: bool = False, opset: int = 20, largest: int = 64) -> ir.Model:
    """Export without the exporter's own optimizer, the batch dynamic, height and width too with ``sizes``."""
    import onnx

    axes = {0: torch.export.Dim("N", min=1, max=64)}
    if sizes:
        axes |= {2: torch.export.Dim("H", min=8, max=largest), 3: torch.export.Dim("W", min=8, max=largest)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (torch.zeros(shape),),
            dynamo=True,
            optimize=False,
            opset_version=opset,
            dynamic_shapes=(axes,) if dynamic else None,
            input_names=["x"],
            output_names=["y"],
            verbose=False,
        )
        buffer = io.BytesIO()
        program.save(buffer)
    return ir.serde.deserialize_model(normalized(onnx.load_from_string(buffer.getvalue()), opset=opset, path="block"))


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every normalization statistics such as training leaves behind."""
    generator = torch.Generator().manual_seed(seed)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            for tensor, low, high in [(each.weight, 0.5, 1.5), (each.bias, -1, 1), (each.running_mean, -1, 1), (each.running_var, 0.5, 2)]:
                tensor.data.uniform_(low, high, generator=generator)
        elif isinstance(each, nn.Conv2d):
            each.weight.data.normal_(0, (each.weight[0].numel()) ** -0.5, generator=generator)
    return module.eval()


def convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0, groups: int = 1) -> nn.Sequential:
    """Return a convolution and its normalization."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class RepVgg(nn.Module):
    """A 3x3, a 1x1 and, where the shape allows, a normalized skip."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = convolution(inputs, outputs, 3, stride=stride, padding=1, groups=groups)
        self.point = convolution(inputs, outputs, 1, stride=stride, groups=groups)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        return torch.relu(self.dense(x) + self.point(x) + skip)


class QaRepVgg(nn.Module):
    """A RepVGG block whose 1x1 and skip are bare, with one normalization behind the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = convolution(channels, channels, 3, padding=1)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.dense(x) + self.point(x) + x))


class MobileOne(nn.Module):
    """Several equal branches, a 1x1 and a normalized skip, added up in a loop; groups make it depthwise."""

    def __init__(self, channels: int, kernel: int, branches: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        shape = {"stride": stride, "padding": kernel // 2, "groups": groups}
        self.branches = nn.ModuleList(convolution(channels, channels, kernel, **shape) for _ in range(branches))
        self.scale = convolution(channels, channels, 1, stride=stride, groups=groups) if kernel > 1 else None
        self.skip = nn.BatchNorm2d(channels) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        total = 0 if self.scale is None else self.scale(x)
        total = total + (0 if self.skip is None else self.skip(x))
        for branch in self.branches:
            total = total + branch(x)
        return torch.relu(total)


class PaddedNorm(nn.Module):
    """A normalization that pads with its image of zero, so that the convolution before it could as well have padded."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.norm, self.pad = nn.BatchNorm2d(channels), pad

    def forward(self, x: Tensor) -> Tensor:
        y, p = nn.functional.pad(self.norm(x), [self.pad] * 4), self.pad
        n = self.norm
        value = (n.bias - n.running_mean * n.weight / torch.sqrt(n.running_var + n.eps)).view(1, -1, 1, 1)
        y[:, :, :p, :] = value
        y[:, :, -p:, :] = value
        y[:, :, :, :p] = value
        y[:, :, :, -p:] = value
        return y


class Dbb(nn.Module):
    """A diverse branch block: 3x3, 1x1, 1x1 to 3x3 and 1x1 to average, each normalized."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, padded_norm: bool = False) -> None:
        super().__init__()
        self.dense = convolution(inputs, outputs, 3, stride=stride, padding=1)
        self.point = convolution(inputs, outputs, 1, stride=stride)
        first = [nn.Conv2d(inputs, inputs, 1, bias=False, padding=0 if padded_norm else 1)]
        first += [PaddedNorm(inputs, 1) if padded_norm else nn.BatchNorm2d(inputs)]
        self.two = nn.Sequential(*first, convolution(inputs, outputs, 3, stride=stride))
        second = [nn.Conv2d(inputs, outputs, 1, bias=False, padding=0 if padded_norm else 1)]
        second += [PaddedNorm(outputs, 1) if padded_norm else nn.BatchNorm2d(outputs)]
        self.average = nn.Sequential(*second, nn.AvgPool2d(3, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.dense(x) + self.point(x) + self.two(x) + self.average(x))
