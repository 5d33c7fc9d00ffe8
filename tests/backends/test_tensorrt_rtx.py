import pytest
from backend_models import batch, conv_text, matmul_text, model_text

from deploycc.backends.tensorrt_rtx import DEFAULT_ARCHS, TensorRTRTX
from deploycc.core.errors import BackendError
from deploycc.core.formats import BF16, FP8, FP16, FP32, INT4, INT8, MXFP8, NVFP4
from deploycc.core.target import Target, parse_target


def test_one_engine_serves_every_default_architecture_with_a_dynamic_batch(build):
    engine = build(matmul_text("fp16"), "tensorrt-rtx", batch(64))
    assert engine.target.archs == DEFAULT_ARCHS
    assert engine.path.stat().st_size == engine.bytes > 10_000
    assert engine.path.read_bytes()[:4] == b"vtrt"
    assert engine.build_seconds > 0
    assert 50 < engine.peak_rss_mb < 2000
    assert engine.warnings == ()
    assert engine.realised.operands["fc"] == ("fp16", "fp16")


def test_the_file_beside_the_engine_is_only_the_model(build, tmp_path):
    build(matmul_text("fp16"), profiles=batch(64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.engine", "model.onnx"]


@pytest.mark.parametrize(
    ("target", "formats"),
    [
        ("tensorrt-rtx:sm_75", {FP32, FP16}),
        ("tensorrt-rtx:sm_80", {FP32, FP16, BF16, INT8, INT4}),
        ("tensorrt-rtx:sm_89", {FP32, FP16, BF16, INT8, FP8, INT4}),
        ("tensorrt-rtx:sm_86+sm_120", {FP32, FP16, BF16, INT8, INT4}),
        ("tensorrt-rtx:sm_89+sm_121", {FP32, FP16, BF16, INT8, FP8, INT4}),
        ("tensorrt-rtx:sm_120+sm_121", {FP32, FP16, BF16, INT8, FP8, INT4, NVFP4}),
        ("tensorrt-rtx", {FP32, FP16, BF16, INT8, INT4}),
    ],
)
def test_formats_are_those_of_the_weakest_architecture(target, formats):
    assert TensorRTRTX().formats(parse_target(target)) == formats


def test_a_format_that_is_missing_has_a_reason_and_a_remedy():
    rtx = TensorRTRTX()
    reason = rtx.unsupported_reason(parse_target("tensorrt-rtx:sm_80"), FP8)
    assert reason == "sm_80 has no FP8 units; use --precision int8 or a target of sm_89, sm_120, sm_121"
    assert "sm_80, sm_86 has no FP8 units" in rtx.unsupported_reason(Target("tensorrt-rtx"), FP8)
    turing = rtx.unsupported_reason(parse_target("tensorrt-rtx:sm_75"), INT8)
    assert turing.startswith("sm_75 computes in fp16 x fp16 where INT8 is asked for; ")
    assert turing.endswith("use --precision fp16 or a target of sm_80, sm_86, sm_89, sm_120, sm_121")
    assert rtx.unsupported_reason(parse_target("tensorrt-rtx:sm_120"), FP8) == ""


def test_a_format_that_is_only_emulated_names_no_target():
    reason = TensorRTRTX().unsupported_reason(parse_target("tensorrt-rtx:sm_120"), MXFP8)
    assert reason == "sm_120 computes in fp16 x fp8 where MXFP8 is asked for; use --precision int8"


def test_the_int8_convolution_that_sm_75_builds_computes_in_fp16(build):
    engine = build(conv_text("fp16", "int8"), "tensorrt-rtx:sm_75", batch(16, 14, 14))
    assert engine.realised.operands["stage_conv"] == ("fp16", "fp16")


@pytest.mark.parametrize(
    ("text", "target", "profiles", "words"),
    [
        (conv_text("fp16", "fp8"), "tensorrt-rtx:sm_80+sm_89", batch(16, 14, 14), ["FP8 does not exist on sm_80 (", "remove sm_80 from"]),
        (matmul_text("bf16"), "tensorrt-rtx:sm_75", batch(64), ["BF16 does not exist on sm_75"]),
        (matmul_text("fp32"), "tensorrt-rtx:sm_75", batch(64), ["no FP32 GEMM for sm_75", "node 'fc'", "--precision fp16"]),
        (matmul_text("fp16"), "tensorrt-rtx:sm_89", [], ["no optimization profile", "--shape NAME=MIN:OPT:MAX"]),
    ],
)
def test_an_impossible_build_says_why(build, tmp_path, text, target, profiles, words):
    with pytest.raises(BackendError) as caught:
        build(text, target, profiles)
    assert_plain(str(caught.value), words)
    assert not (tmp_path / "m.engine").exists()


FLOATS = {"inputs": "float[2,3] x", "outputs": "float[2,3] y"}
QUANTIZED = {"inputs": "float[2,3] x", "outputs": "int8[2,3] y"}
SCALE = "s = Constant<value = float {1.0}>()"
NONZERO = model_text("a = Relu(x) [nz] y = NonZero(a)", inputs="float[2,3] x", outputs="int64[2,N] y")
TWO_TYPES = model_text("y = MatMul(x, z)", inputs="float[2,3] x, float16[3,4] z", outputs="float[2,4] y")
DETERMINANT = model_text("y = Det(x)", inputs="float[2,3,3] x", outputs="float[2] y")
NEGATIVE = model_text("s = Constant<value = float {-1.0}>() [q] y = QuantizeLinear<output_dtype = 3>(x, s)", **QUANTIZED)
ASYMMETRIC = model_text(f"{SCALE} z = Constant<value = int8 {{3}}>() [q] y = QuantizeLinear(x, s, z)", **QUANTIZED)
UNSIGNED = model_text(f"{SCALE} [q] a = QuantizeLinear<output_dtype = 2>(x, s) y = DequantizeLinear(a, s)", **FLOATS)
BIAS = model_text(f"{SCALE} b = Constant<value = int32[3] {{1, 2, 3}}>() [dq] c = DequantizeLinear(b, s) y = Add(x, c)", **FLOATS)
SAME_NAMES = model_text(
    f"{SCALE} [q] a = QuantizeLinear<output_dtype = 3>(x, s) [d] b = DequantizeLinear(a, s) "
    "[q] c = QuantizeLinear<output_dtype = 3>(b, s) [e] y = DequantizeLinear(c, s)",
    **FLOATS,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NONZERO, ["the op NonZero", "node 'nz'"]),
        (TWO_TYPES, ["(Float and Half)", "insert a Cast"]),
        (DETERMINANT, ["does not have this op", "makes 'y' (Det)"]),
        (NEGATIVE, ["a scale is zero, negative", "node 'q' (QuantizeLinear)"]),
        (ASYMMETRIC, ["a zero point is not zero", "node 'q'"]),
        (UNSIGNED, ["quantizes to UINT8", "INT8"]),
        (BIAS, ["DequantizeLinear of Int32", "node 'dq'", "QuantizeBias=False"]),
        (SAME_NAMES, ["have the same name", "node 'q'"]),
    ],
)
def test_a_refused_model_names_the_node_and_the_remedy(build, text, words):
    with pytest.raises(BackendError) as caught:
        build(text)
    assert_plain(str(caught.value), words)


def test_a_file_that_is_no_model_is_said_to_be_none(build):
    with pytest.raises(BackendError, match="not an ONNX model, or it is damaged"):
        build(b"not a protobuf")


def test_a_workspace_that_is_too_small_is_said_to_be(build):
    with pytest.raises(BackendError, match="the workspace is too small"):
        build(matmul_text("fp16"), "tensorrt-rtx:sm_89", batch(64), workspace=1)


def test_the_retyping_of_uint8_is_reported_as_a_warning(build):
    pair = f"{SCALE} z = Constant<value = uint8 {{0}}>() a = QuantizeLinear(x, s, z) y = DequantizeLinear(a, s, z)"
    engine = build(model_text(pair, **FLOATS))
    assert any("Defaulting to INT8" in line for line in engine.warnings)


def test_attention_without_a_fused_kernel_is_decomposed(build):
    qkv = ", ".join(f"float[1,2,64,32] {name}" for name in "qkv")
    engine = build(model_text("[attention] y = Attention(q, k, v)", inputs=qkv, outputs="float[1,2,64,32] y", opset=23))
    assert engine.bytes > 0


def test_the_doctor_reports_the_installation():
    facts = TensorRTRTX().doctor()
    assert facts["available"] is True
    assert facts["needs_gpu"] is False


def assert_plain(text, words):
    assert all(word in text for word in words), text
    assert not any(noise in text for noise in ("cudaError", "checkMacros", "/_src", "Error Code")), text
    assert "Where: " in text
    assert "Fix: " in text
