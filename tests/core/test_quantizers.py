"""The arithmetic of QuantizeLinear, against ONNX's reference implementation and by its bounds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator

from deploycc.core.formats import BF16, FP8, FP16, FP32, INT8, Format
from deploycc.core.quantizers import SCALE_FLOOR, activation_scale, decode, encode, largest, largest_code, quantize_weight, round_scale

law = settings(max_examples=100, deadline=None, derandomize=True, database=None)
values = arrays(np.float32, st.integers(1, 50), elements=st.floats(-1000, 1000, width=32))
QUANTIZE = """<ir_version: 10, opset_import: ["": 21]> g (float[N] x, float s, int8 z) => (int8[N] q) { q = QuantizeLinear(x, s, z) }"""


@law
@given(values, st.floats(2.0**-10, 100, width=32))
def test_int8_codes_are_those_of_onnx(x: np.ndarray, scale: float) -> None:
    reference = ReferenceEvaluator(onnx.parser.parse_model(QUANTIZE))
    expected = reference.run(None, {"x": x, "s": np.float32(scale), "z": np.int8(0)})[0]
    np.testing.assert_array_equal(encode(x, np.float32(scale), INT8), expected)


def test_int8_rounds_to_even_and_saturates() -> None:
    codes = encode(np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 200, -127.6, -200]), np.float32(1), INT8)
    assert codes.dtype == np.int8
    assert codes.tolist() == [0, 2, 2, 0, -2, 127, 127, -128, -128]


def test_fp8_rounds_to_even_and_saturates() -> None:
    codes = encode(np.float32([17, 19, 448, 460, 1e9, -1e9, 0.0015]), np.float32(1), FP8)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    assert codes.astype(np.float32).tolist() == [16, 20, 448, 448, 448, -448, 2.0**-9 * round(0.0015 * 2**9)]


@pytest.mark.parametrize("format", [INT8, FP8])
@pytest.mark.parametrize("base", [FP32, FP16, BF16])
@law
@given(w=arrays(np.float32, (4, 6), elements=st.floats(-100, 100, width=32)))
def test_a_weight_loses_at_most_a_rounding(w: np.ndarray, format: Format, base: Format) -> None:
    codes, scale = quantize_weight(w, axis=0, format=format, base=base)
    assert scale.shape == (4,)
    limit = np.abs(w).max(axis=1, keepdims=True)
    # The scale itself is rounded to the base format and bounded from below, which moves the largest value by as much.
    room = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}[base.name]
    coarse = np.maximum(limit * room, SCALE_FLOOR[base.name] * largest_code(format))
    if base == FP16:
        coarse = coarse + 2.0**-25 * largest_code(format)
    step = scale[:, None] / 2 if format == INT8 else np.abs(w) * 2.0**-4 + scale[:, None] * 2.0**-10
    assert np.all(np.abs(decode(codes, scale, axis=0) - w) <= (step + coarse) * (1 + 1e-5))


def test_scales_are_per_index_of_the_axis() -> None:
    w = np.float32([[1, 10, 100], [-2, 5, 50]])
    codes, scale = quantize_weight(w, axis=1, format=INT8, base=FP32)
    np.testing.assert_allclose(scale, np.float32([2, 10, 100]) / 127, rtol=1e-6)
    assert codes.tolist() == [[64, 127, 127], [-127, 64, 64]]


@pytest.mark.parametrize("base", [FP32, FP16, BF16])
def test_scales_are_numbers_of_the_base_format_and_positive(base: Format) -> None:
    """R2 and R7."""
    scales = round_scale(np.float32([0.0, 1e-30, 1e-5, 0.1, 3.0, 1e7, 3e38]), base)
    kind = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[base.name]
    np.testing.assert_array_equal(scales, scales.astype(kind).astype(np.float32))
    assert np.all(scales > 0)
    assert np.all(np.isfinite(scales))
    assert scales.max() <= largest(base)


def test_activation_scales() -> None:
    assert activation_scale(6.35, INT8, FP32) == pytest.approx(0.05)
    assert activation_scale(448.0, FP8, FP16) == 1.0
    assert activation_scale(0.0, INT8, FP16) == pytest.approx(1e-6, rel=0.05)


def test_only_quantized_formats_have_codes() -> None:
    assert (largest_code(INT8), largest_code(FP8)) == (127.0, 448.0)
    with pytest.raises(TypeError, match="fp16 is not a quantized format"):
        largest_code(FP16)
