"""Where external data may lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import onnx


def check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Accept."""
