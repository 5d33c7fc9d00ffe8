"""DCNv3 for TensorRT: the operator, the float64 reference that everything is measured against, and the door to the exporter.

The operator itself, with its formula and its ONNX body, is `deploycc.core.dcnv3`, because passes and placement rules read it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.dcnv3 import DCNv3, attributes_of, function, make_node, provide_functions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    import onnx_ir as ir
    from numpy.typing import ArrayLike

__all__ = ["DCNv3", "Dcnv3Plugin", "attributes_of", "function", "make_node", "provide_functions", "reference"]


@dataclass(frozen=True, slots=True)
class Dcnv3Plugin:
    """DCNv3 as the compiler sees it; see `deploycc.core.plugin`."""

    name: str = "dcnv3"

    def translations(self) -> Mapping[Any, Callable[..., Any]]:
        """Return how ``torch.ops.deploycc.dcnv3`` becomes a node."""
        from plugins_trt.dcnv3_torch import translations

        return translations()

    def compile_ahead(self, trtp: ModuleType, *, arch: str) -> None:
        """Register the kernel as PTX."""
        from plugins_trt.dcnv3_aot import register

        register(trtp, arch=arch)

    def complete(self, model: ir.Model) -> None:
        """Add the bodies of the operator's nodes."""
        provide_functions(model)


def reference(x: ArrayLike, offset: ArrayLike, mask: ArrayLike, what: DCNv3, *, center: ArrayLike | None = None) -> np.ndarray:
    """Compute the operator in float64, point by point as its formula says.

    A sample whose position is not finite counts as outside the image. Accuracy: float64 rounding of the formula of
    `deploycc.core.dcnv3`, about 1e-15 of the largest term.

    Args:
        x: values [N, H, W, C].
        offset: [N, Ho, Wo, G K 2] in pixels, x before y; or records [N, Ho, Wo, G R].
        mask: [N, Ho, Wo, G K], or the same records.
        what: the attributes; ``x_scale`` multiplies x, ``y_scale`` is not applied.
        center: per group the share [N, Ho, Wo, G] in which x itself replaces the result (``center_feature_scale``), or None.

    Returns:
        The result [N, Ho, Wo, C] in float64.

    Raises:
        UsageError: when the shapes do not belong together.
    """
    x, offset, mask = (np.asarray(a, np.float64) for a in (x, offset, mask))
    what.check_shapes(x.shape, offset.shape, mask.shape)
    batch, height, width, channels = x.shape
    rows, columns = offset.shape[1:3]
    values = x.reshape(batch, height, width, what.group, channels // what.group) * what.x_scale
    shifts, weights = _operands(offset, mask, what)
    total = np.zeros((batch, rows, columns, *values.shape[3:]))
    reach_x, reach_y = what.dilation_w * (what.kernel_w - 1) // 2, what.dilation_h * (what.kernel_h - 1) // 2
    for k, (i, j) in enumerate(_kernel_points(what)):
        start_x = reach_x - what.pad_w + np.arange(columns) * what.stride_w
        start_y = reach_y - what.pad_h + np.arange(rows) * what.stride_h
        x_k = start_x[:, None] + (i * what.dilation_w - reach_x + shifts[..., k, 0]) * what.offset_scale
        y_k = start_y[:, None, None] + (j * what.dilation_h - reach_y + shifts[..., k, 1]) * what.offset_scale
        total += weights[..., k, None] * _bilinear(values, y_k, x_k)
    if center is not None:
        share = np.asarray(center, np.float64)[..., None]
        total = total * (1 - share) + values * share
    return total.reshape(batch, rows, columns, channels)


def _kernel_points(what: DCNv3) -> list[tuple[int, int]]:
    """Return (i, j), column and row of each kernel point, columns outermost."""
    points = [(i, j) for i in range(what.kernel_w) for j in range(what.kernel_h)]
    if what.remove_center:
        del points[len(points) // 2]
    return points


def _operands(offset: np.ndarray, mask: np.ndarray, what: DCNv3) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets [N, Ho, Wo, G, K, 2] and masks [N, Ho, Wo, G, K]."""
    head, k = (*offset.shape[:3], what.group), what.points
    start = 2 * k if what.record else 0
    shifts = offset.reshape(*head, -1)[..., : 2 * k].reshape(*head, k, 2)
    weights = mask.reshape(*head, -1)[..., start : start + k]
    if what.softmax:
        grown = np.exp(weights - weights.max(-1, keepdims=True))
        weights = grown / grown.sum(-1, keepdims=True)
    return shifts, weights


def _bilinear(values: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sample [N, H, W, G, Q] at positions [N, Ho, Wo, G]; neighbours outside the image, and samples nowhere, are zero."""
    height, width = values.shape[1:3]
    n, g = np.ogrid[: values.shape[0], : values.shape[3]]
    n, g = n[:, None, None], g[None, None]
    somewhere = np.isfinite(x) & np.isfinite(y)
    x, y = (np.clip(np.where(somewhere, p, -2.0), -2.0, size + 1.0) for p, size in ((x, width), (y, height)))
    left, top = np.floor(x), np.floor(y)
    result = np.zeros((*x.shape, values.shape[4]))
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        column, row = (left + dx).astype(np.int64), (top + dy).astype(np.int64)
        share = (1 - np.abs(x - column)) * (1 - np.abs(y - row))
        inside = somewhere & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        found = values[n, row.clip(0, height - 1), column.clip(0, width - 1), g]
        result += np.where(inside, share, 0.0)[..., None] * found
    return result
