"""Fixtures of the backends' tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from onnx import parser

from deploycc.backends.tensorrt_rtx import TensorRTRTX
from deploycc.core.backend import BuildOptions, Engine
from deploycc.core.target import parse_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Engine]:
    """Return a function that builds a model, given as text or bytes, with TensorRT-RTX."""

    def build_text(model: str | bytes, target: str = "tensorrt-rtx:sm_89", profiles: list | None = None, **options: float) -> Engine:
        path = tmp_path / "model.onnx"
        path.write_bytes(model if isinstance(model, bytes) else parser.parse_model(model).SerializeToString())
        chosen = BuildOptions(**options)
        return TensorRTRTX().build(path, parse_target(target), out=tmp_path / "m.engine", profiles=profiles or [], options=chosen)

    return build_text
