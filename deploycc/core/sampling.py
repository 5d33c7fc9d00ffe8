"""Which attributes of DCNv3 explain given sample positions, if any do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.dcnv3 import DCNv3
from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions in pixels [N, Ho, Wo, G, K, 2], x before y: ``still`` at zero offsets, ``shifted`` at the offsets ``offset``."""

    still: np.ndarray
    shifted: np.ndarray
    offset: np.ndarray

    def moved(self, pads: tuple[int, int]) -> Positions:
        """Return the positions on the image without its ``pads`` (rows, columns)."""
        back = np.array([pads[1], pads[0]], np.float64)
        return replace(self, still=self.still - back, shifted=self.shifted - back)


def fitted(found: Positions, size: tuple[int, int]) -> DCNv3 | None:
    """Return the attributes with which DCNv3 samples an image of ``size`` (rows, columns) at these positions, or None.

    The positions are compared in full, at zero and at the generic offsets; since they are affine in the offsets, equality at both
    is equality everywhere, but for an accident of probability zero.
    """
    scale = float(np.float32(np.median((found.shifted - found.still) / found.offset)))
    # The positions were normalized in float32, which is worth a few units in the last place of the image size.
    tolerance = 16 * float(np.finfo(np.float32).eps) * (max(size) + float(np.abs(found.shifted).max()))
    if not 0 < scale < 1e6:
        return None
    for guess in _guesses(found, size, float(np.round(scale, 5))):
        still, shifted = (positions(guess, found.still.shape, offset) for offset in (np.zeros_like(found.offset), found.offset))
        if max(np.abs(still - found.still).max(), np.abs(shifted - found.shifted).max()) <= tolerance:
            return guess
    return None


def positions(what: DCNv3, shape: tuple[int, ...], offset: np.ndarray) -> np.ndarray:
    """Return the sample positions [N, Ho, Wo, G, K, 2] for ``offset``, by the formula of `deploycc.core.dcnv3`."""
    _, rows, columns, _, points, _ = shape
    k = np.arange(points)
    k = k + what.remove_center * (k >= what.kernel_h * what.kernel_w // 2)
    reach = np.array([what.dilation_w * (what.kernel_w - 1) // 2, what.dilation_h * (what.kernel_h - 1) // 2])
    place = np.stack([k // what.kernel_h * what.dilation_w, k % what.kernel_h * what.dilation_h], -1) - reach
    base_x = np.arange(columns) * what.stride_w - what.pad_w + reach[0]
    base_y = np.arange(rows) * what.stride_h - what.pad_h + reach[1]
    base = np.stack(np.broadcast_arrays(base_x[None, :], base_y[:, None]), -1)
    return np.asarray(base[:, :, None, None] + (place + offset) * what.offset_scale)


def _guesses(found: Positions, size: tuple[int, int], scale: float) -> Iterator[DCNv3]:
    """Yield the attributes that explain the first positions, for each shape of the kernel."""
    rows, columns, group, points = found.still.shape[1:5]
    first = found.still[0, :, :, 0]
    for kernel_h, kernel_w, removed in _kernels(points):
        x, y = first[0, 0, :, 0], first[0, 0, :, 1]
        step_x = (x[kernel_h] - x[0]) / scale if kernel_w > 1 else 1.0
        step_y = (y[1] - y[0]) / scale if kernel_h > 1 else 1.0
        dilation_w, dilation_h = round(step_x), round(step_y)
        reach_w, reach_h = dilation_w * (kernel_w - 1) // 2, dilation_h * (kernel_h - 1) // 2
        stride_w = round(first[0, 1, 0, 0] - x[0]) if columns > 1 else size[1]
        stride_h = round(first[1, 0, 0, 1] - y[0]) if rows > 1 else size[0]
        try:
            guess = DCNv3(
                group=group,
                kernel_h=kernel_h,
                kernel_w=kernel_w,
                stride_h=stride_h,
                stride_w=stride_w,
                pad_h=round(reach_h * (1 - scale) - y[0]),
                pad_w=round(reach_w * (1 - scale) - x[0]),
                dilation_h=dilation_h,
                dilation_w=dilation_w,
                offset_scale=scale,
                remove_center=removed,
            )
            fits = guess.output_size(*size) == (rows, columns)
        except UsageError:
            continue
        if fits:
            yield guess


def _kernels(points: int) -> Iterator[tuple[int, int, int]]:
    """Yield (height, width, removed centre) of every kernel of that many points, squares first."""
    shapes = [(h, points // h, 0) for h in range(1, points + 1) if points % h == 0]
    side = round((points + 1) ** 0.5)
    if side * side == points + 1 and side % 2 and side > 1:
        shapes.append((side, side, 1))
    yield from sorted(shapes, key=lambda shape: abs(shape[0] - shape[1]))
