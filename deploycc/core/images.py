"""A directory of images as a column of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir as ir

    from deploycc.core.columns import Column

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def image_table(folder: Path, value: ir.Value, preprocessing: Mapping[str, Any] | None) -> Mapping[str, Column]:
    """Return the images of ``folder`` as samples of ``value``."""
    raise UsageError("images need preprocessing", at=f"'{folder}'", fix="add a [preprocessing] section to the configuration")
