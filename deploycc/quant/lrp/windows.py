"""Where the windows of convolutions and poolings lie, as ONNX says it: strides, dilations, pads on either side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from deploycc.core.graph import attribute, int_attribute, ints_attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Window:
    """One entry per spatial axis; ``before`` and ``after`` are the pads that the node asks for."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, sizes: Sequence[int], *, kernel: Sequence[int], transposed: bool = False) -> Window:
        """Return the window of ``node`` over spatial ``sizes``."""
        ones = (1,) * len(sizes)
        strides, dilations = ints_attribute(node, "strides") or ones, ints_attribute(node, "dilations") or ones
        extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        mode = str(attribute(node, "auto_pad", "NOTSET"))
        wanted = ints_attribute(node, "output_shape") if transposed else None
        if mode in {"SAME_UPPER", "SAME_LOWER"} or wanted is not None:
            totals = _totals(node, sizes, strides, extents, transposed=transposed)
            small, large = zip(*((t // 2, t - t // 2) for t in totals), strict=True)
            # With ``output_shape`` everything but SAME_UPPER puts the odd element in front.
            upper = mode == "SAME_UPPER" if transposed else mode != "SAME_LOWER"
            before, after = (small, large) if upper else (large, small)
        else:
            pads = ints_attribute(node, "pads") if mode == "NOTSET" else None
            pads = pads or (0,) * 2 * len(sizes)
            before, after = pads[: len(sizes)], pads[len(sizes) :]
        return cls(tuple(kernel), strides, dilations, tuple(before), tuple(after))

    def split_padding(self, x: Tensor, *, value: float) -> tuple[Tensor, tuple[int, ...]]:
        """Return ``x`` with what a symmetric padding cannot express already added, and the symmetric rest."""
        if self.before == self.after and all(p >= 0 for p in self.before) and value == 0.0:
            return x, self.before
        return functional.pad(x, _flat(self.before, self.after), value=value), (0,) * len(self.before)

    def ceiling(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return what must be added behind each axis so that ``ceil_mode`` has only whole windows."""
        missing = []
        for size, k, s, d, b, a in zip(sizes, self.kernel, self.strides, self.dilations, self.before, self.after, strict=True):
            room = size + b + a - (d * (k - 1) + 1)
            steps = math.ceil(room / s)
            # A window that would begin in the padding behind the input is not taken.
            steps -= steps * s >= size + b
            missing.append(max(0, steps * s - room))
        return tuple(missing)


def _totals(node: ir.Node, sizes: Sequence[int], strides: Sequence[int], extents: Sequence[int], *, transposed: bool) -> list[int]:
    """Return the padding of each axis, both sides together, that yields the wanted output sizes."""
    if not transposed:
        return [max(0, (math.ceil(n / s) - 1) * s + e - n) for n, s, e in zip(sizes, strides, extents, strict=True)]
    wanted = ints_attribute(node, "output_shape") or tuple(n * s for n, s in zip(sizes, strides, strict=True))
    extra = ints_attribute(node, "output_padding") or (0,) * len(sizes)
    rows = zip(sizes, strides, extents, wanted[-len(sizes) :], extra, strict=True)
    return [(n - 1) * s + e + x - w for n, s, e, w, x in rows]


def _flat(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return pads in torch's order: last axis first, both sides of an axis together."""
    return [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]


def pooling_window(node: ir.Node, x: Tensor) -> tuple[Window, list[int]]:
    """Return the window of a pooling node, and its pads before and behind, those of ``ceil_mode`` included, in torch's order."""
    window = Window.of(node, x.shape[2:], kernel=ints_attribute(node, "kernel_shape") or ())
    extra = window.ceiling(x.shape[2:]) if int_attribute(node, "ceil_mode", 0) else (0,) * (x.ndim - 2)
    after = [a + e for a, e in zip(window.after, extra, strict=True)]
    return window, _flat(window.before, after)
