import importlib.util

import pytest
from backend_models import batch, conv_text, matmul_text
from onnx import parser

from deploycc.backends.tensorrt import TensorRT, present_arch
from deploycc.core.backend import BuildOptions
from deploycc.core.errors import BackendError
from deploycc.core.formats import BF16, FP8, FP16, FP32, INT4, INT8, MXFP8, NVFP4
from deploycc.core.target import Target, parse_target

is_missing = importlib.util.find_spec("tensorrt") is None


@pytest.mark.parametrize(
    ("target", "formats"),
    [
        ("tensorrt:sm_75", {FP32, FP16, INT8}),
        ("tensorrt:sm_87", {FP32, FP16, BF16, INT8, INT4}),
        ("tensorrt:sm_90", {FP32, FP16, BF16, INT8, FP8, INT4}),
        ("tensorrt:sm_80+sm_100", {FP32, FP16, BF16, INT8, INT4}),
        ("tensorrt:sm_100", {FP32, FP16, BF16, INT8, FP8, INT4, NVFP4, MXFP8}),
        ("tensorrt:sm_120", {FP32, FP16, BF16, INT8, FP8, INT4, NVFP4}),
    ],
)
def test_formats_follow_the_architecture(target, formats):
    assert TensorRT().formats(parse_target(target)) == formats


def test_a_format_that_is_missing_has_a_reason_and_a_remedy():
    trt = TensorRT()
    assert trt.unsupported_reason(parse_target("tensorrt:sm_75"), BF16) == (
        "sm_75 has no BF16 units; use --precision fp16 or a target of sm_80 or later"
    )
    assert trt.unsupported_reason(parse_target("tensorrt:sm_86"), FP8).endswith("use --precision int8 or a target of sm_89 or later")
    assert trt.unsupported_reason(parse_target("tensorrt:sm_90"), FP8) == ""


@pytest.mark.skipif(not is_missing, reason="TensorRT is installed")
def test_a_missing_installation_is_said_to_be_missing(tmp_path):
    facts = TensorRT().doctor()
    assert facts["available"] is False
    assert "tensorrt" in facts["reason"]
    (tmp_path / "m.onnx").write_bytes(parser.parse_model(matmul_text("fp16")).SerializeToString())
    with pytest.raises(BackendError, match=r"the Python module 'tensorrt' is not installed.*Fix: install it"):
        TensorRT().build(tmp_path / "m.onnx", Target("tensorrt"), out=tmp_path / "e", profiles=[], options=BuildOptions())


@pytest.mark.tensorrt
@pytest.mark.parametrize("fmt", [None, "int8", "fp8"])
def test_an_engine_is_built_for_the_gpu_of_this_machine(tmp_path, fmt):
    target = Target("tensorrt", (f"sm_{present_arch()}",))
    (tmp_path / "m.onnx").write_bytes(parser.parse_model(conv_text("fp16", fmt)).SerializeToString())
    engine = TensorRT().build(tmp_path / "m.onnx", target, out=tmp_path / "e", profiles=batch(16, 14, 14), options=BuildOptions())
    assert engine.bytes == (tmp_path / "e").stat().st_size > 0


@pytest.mark.tensorrt
def test_another_gpu_is_refused(tmp_path):
    other = "sm_75" if present_arch() != 75 else "sm_80"
    with pytest.raises(BackendError, match="TensorRT builds for the GPU it runs on"):
        TensorRT().build(tmp_path / "m.onnx", Target("tensorrt", (other,)), out=tmp_path / "e", profiles=[], options=BuildOptions())
