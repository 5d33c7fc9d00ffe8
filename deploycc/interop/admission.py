"""What a model may contain."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    import onnx_ir as ir


def check_admissible(proto: onnx.ModelProto, path: Path) -> None:
    """Accept."""


def check_types(model: ir.Model, path: Path) -> None:
    """Accept."""
