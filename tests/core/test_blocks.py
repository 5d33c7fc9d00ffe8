"""Numbers in blocks: the arithmetic against ml_dtypes and ONNX's reference, and the laws of each format."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator

from deploycc.core.blocks import Blocks, block_size, encode_blocks, quantize_blocks
from deploycc.core.formats import FP16, FP32, INT4, MXFP8, NVFP4, Format
from deploycc.core.quantizers import round_scale

BLOCKED = (INT4, NVFP4, MXFP8)
law = settings(max_examples=50, deadline=None, derandomize=True, database=None)
matrices = arrays(np.float32, (64, 3), elements=st.floats(-1000, 1000, width=32))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("format", "depth", "size"),
    [(INT4, 256, 128), (INT4, 128, 64), (INT4, 192, 64), (INT4, 96, 32), (INT4, 64, 32), (INT4, 32, 0), (INT4, 100, 0),
     (NVFP4, 48, 16), (NVFP4, 16, 0), (NVFP4, 40, 0), (MXFP8, 64, 32), (MXFP8, 32, 0)],
)  # fmt: skip
def test_blocks_are_whole_and_at_least_two(format: Format, depth: int, size: int) -> None:
    assert block_size(format, depth) == size


def test_what_does_not_fill_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="100 elements along axis 0 do not fill whole blocks of int4"):
        quantize_blocks(normal(100, 4), axis=0, format=INT4, base=FP16)


def test_weights_per_code_count_the_scale_of_their_block() -> None:
    assert [f.weight_bits for f in BLOCKED] == [4.125, 4.5, 8.25]


@pytest.mark.parametrize("axis", [0, 1])
def test_int4_is_what_onnx_dequantizes(axis: int) -> None:
    weight = normal(256, 256)
    found = quantize_blocks(weight, axis=axis, format=INT4, base=FP32)
    text = (
        f"<ir_version: 10, opset_import: ['': 21]> g () => (float[256,256] y) {{ y = DequantizeLinear<axis={axis}, block_size=128>(w, s) }}"
    )
    model = onnx.parser.parse_model(text.replace("'", '"'))
    codes = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [256, 256], found.codes.astype(np.int8).reshape(-1))
    model.graph.initializer.extend([codes, onnx.numpy_helper.from_array(found.scale, "s")])
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, {})[0], found.decoded())


@law
@given(matrices)
def test_int4_errs_by_half_a_step_at_most_where_it_does_not_saturate(weight: np.ndarray) -> None:
    found = quantize_blocks(weight, axis=0, format=INT4, base=FP32)
    steps = np.repeat(found.scale, found.size, axis=0)
    inside = np.abs(weight) <= 7.5 * steps
    assert np.all(np.abs(found.decoded() - weight)[inside] <= steps[inside] / 2 * (1 + 1e-6))


@law
@given(matrices)
def test_no_block_errs_more_than_with_the_scale_of_its_largest_element(weight: np.ndarray) -> None:
    limits = np.abs(weight.reshape(2, 32, 3)).max(axis=1)
    scale = round_scale(limits / 7, FP32)
    plain = np.clip(np.rint(weight / np.repeat(scale, 32, axis=0)), -8, 7) * np.repeat(scale, 32, axis=0)
    found = quantize_blocks(weight, axis=0, format=INT4, base=FP32).decoded()
    error, before = (np.square(v - weight).reshape(2, 32, 3).sum(axis=1) for v in (found, plain))
    assert np.all(error <= before * (1 + 1e-5) + 1e-30)


@law
@given(matrices)
def test_mxfp8_scales_are_the_least_powers_of_two_that_hold_their_block(weight: np.ndarray) -> None:
    found = quantize_blocks(weight, axis=0, format=MXFP8, base=FP16)
    limit = np.abs(weight.reshape(2, 32, 3)).max(axis=1)
    power = np.ldexp(1.0, found.scale.astype(int) - 127)
    seen = limit > 448 * 2.0**-126
    assert np.all(limit[seen] <= 448 * power[seen])
    assert np.all(limit[seen] > 448 * power[seen] / 2)


@pytest.mark.parametrize(("format", "least_db"), [(INT4, 19.0), (NVFP4, 20.5), (MXFP8, 31.0)])
def test_the_noise_of_normal_numbers(format: Format, least_db: float) -> None:
    weight = normal(512, 64)
    error = quantize_blocks(weight, axis=0, format=format, base=FP16).decoded() - weight
    assert 10 * np.log10((weight**2).sum() / (error**2).sum()) > least_db


def test_nvfp4_has_the_scale_of_scales_of_its_largest_element_and_none_at_zero() -> None:
    weight = normal(64, 8)
    weight[:16] = 0.0
    found = quantize_blocks(weight, axis=0, format=NVFP4, base=FP32)
    assert found.scale.astype(np.float32).min() > 0
    assert not found.decoded()[:16].any()
    assert found.whole == round_scale(np.abs(weight).max() / 2688, FP32)


@pytest.mark.parametrize("axis", [0, 1])
def test_values_on_the_grid_are_kept(axis: int) -> None:
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    weight = np.resize(np.concatenate([grid, -grid]), (32, 32))
    weight = weight if axis == 1 else weight.T.copy()
    np.testing.assert_allclose(quantize_blocks(weight, axis=axis, format=NVFP4, base=FP32).decoded(), weight, rtol=1e-6)


def test_codes_saturate_and_round_to_even() -> None:
    assert encode_blocks(np.array([9.0, -9.0, 2.5, 5.0]), INT4).astype(np.float32).tolist() == [7, -8, 2, 5]
    assert encode_blocks(np.array([9.0, -9.0, 2.5, 5.0]), NVFP4).astype(np.float32).tolist() == [6, -6, 2, 4]
    assert encode_blocks(np.array([500.0, -500.0]), MXFP8).astype(np.float32).tolist() == [448, -448]


def test_scales_of_scales_multiply() -> None:
    blocks = Blocks(np.ones((4, 1), np.float32), np.array([[1.0], [2.0]], ml_dtypes.float8_e4m3fn), axis=0, size=2, whole=0.5)
    assert blocks.decoded().reshape(-1).tolist() == [0.5, 0.5, 1.0, 1.0]
