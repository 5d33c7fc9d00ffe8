"""NaN and infinity in weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir


def check_numbers(model: ir.Model, path: Path) -> None:
    """Accept."""
