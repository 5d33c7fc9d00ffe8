"""``deploycc build --dcn``: what it refuses, and that only TensorRT hears of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploycc.backends.nvinfer import _request
from deploycc.core.backend import BuildOptions
from deploycc.core.errors import UsageError
from deploycc.request import BuildRequest, Silent, resolve

MODEL = Path(__file__).parents[2] / "examples" / "fashion" / "cnn.onnx"


@pytest.mark.parametrize(
    ("dcn", "targets", "message"),
    [
        ("plugn", ("onnxruntime",), "there is no plugin library 'plugn'"),
        ("aot", ("onnxruntime", "tensorrt-rtx:sm_89"), "only TensorRT takes plugins"),
    ],
)
def test_refusals(dcn: str, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(BuildRequest(model=MODEL, dcn=dcn, targets=targets, data="synthetic:1"), Silent())


@pytest.mark.parametrize(("module", "expected"), [("tensorrt", "aot"), ("tensorrt_rtx", "body")])
def test_only_tensorrt_is_told(module: str, expected: str) -> None:
    order = _request(module, MODEL, Path(), [], BuildOptions(dcn="aot"), ())
    assert order["dcn"] == expected
