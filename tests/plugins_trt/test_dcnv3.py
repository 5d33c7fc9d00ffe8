"""The operator, its reference and its ONNX body."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dcnv3_cases import execute, model, operands, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from deploycc.core.dcnv3 import DEQUANTIZED, REQUANTIZED, SCALED, attributes_of, nodes_of
from deploycc.core.errors import UsageError
from plugins_trt.dcnv3 import DCNv3, function, provide_functions, reference

KERNELS = [(3, 3), (2, 2), (4, 4), (3, 5), (1, 1)]
SIZE = (2, 9, 11, 8)
BOUND = 5e-6


def configuration(draw: st.DrawFn) -> DCNv3:
    kernel_h, kernel_w = draw(st.sampled_from(KERNELS))
    return DCNv3(
        group=draw(st.sampled_from([1, 2, 4])),
        kernel_h=kernel_h,
        kernel_w=kernel_w,
        stride_h=draw(st.integers(1, 3)),
        stride_w=draw(st.integers(1, 3)),
        pad_h=draw(st.integers(0, 3)),
        pad_w=draw(st.integers(0, 3)),
        dilation_h=draw(st.integers(1, 2)),
        dilation_w=draw(st.integers(1, 2)),
        offset_scale=draw(st.sampled_from([0.5, 1.0, 1.5, 2.0])),
        remove_center=draw(st.integers(0, 1)) if kernel_h == kernel_w == 3 else 0,
        softmax=draw(st.integers(0, 1)),
    )


configurations = st.composite(configuration)()


# The reference


def test_zero_offsets_and_equal_masks_average_the_window() -> None:
    what = DCNv3(group=2)
    x = np.random.default_rng(0).standard_normal((1, 6, 7, 4))
    found = reference(x, np.zeros((1, 6, 7, 36)), np.full((1, 6, 7, 18), 1 / 9), what)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    np.testing.assert_allclose(found, windows.mean((-1, -2)), atol=1e-14)


@pytest.mark.parametrize("k", range(6))
def test_kernel_points_run_along_columns_first(k: int) -> None:
    """One mask of one: the output is the image, shifted by the kernel point, of which y is the inner index."""
    what = DCNv3(group=1, kernel_h=2, kernel_w=3, pad_h=0, pad_w=0)
    x = np.random.default_rng(1).standard_normal((1, 6, 8, 1))
    mask = np.zeros((1, 5, 6, 6))
    mask[..., k] = 1
    i, j = divmod(k, 2)
    np.testing.assert_array_equal(reference(x, np.zeros((1, 5, 6, 12)), mask, what), x[:, j : j + 5, i : i + 6])


def test_an_offset_moves_along_x_before_y() -> None:
    what = DCNv3(group=1, kernel_h=1, kernel_w=1, pad_h=0, pad_w=0)
    x = np.arange(30, dtype=float).reshape(1, 5, 6, 1)
    offset = np.zeros((1, 5, 6, 2))
    offset[..., 0] = 1
    found = reference(x, offset, np.ones((1, 5, 6, 1)), what)
    np.testing.assert_array_equal(found[0, :, :-1, 0], x[0, :, 1:, 0])
    assert not found[0, :, -1].any()


def test_offset_scale_dilates_the_kernel() -> None:
    x, offset, mask = operands(DCNv3(group=2), SIZE, spread=0.0)
    doubled = reference(x, offset, mask, DCNv3(group=2, offset_scale=2.0))
    # Without offsets, twice the scale is twice the dilation, and padding by one more keeps the size.
    wide = DCNv3(group=2, dilation_h=2, dilation_w=2, pad_h=2, pad_w=2)
    np.testing.assert_allclose(doubled, reference(x, offset, mask, wide), atol=1e-14)


def test_images_of_a_batch_are_independent() -> None:
    what = DCNv3(group=4, stride_h=2, stride_w=2)
    x, offset, mask = operands(what, (5, 7, 7, 8))
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(reference(x, offset, mask, what)[order], reference(x[order], offset[order], mask[order], what))


def test_positions_that_are_not_numbers_sample_nothing() -> None:
    what = DCNv3(group=1, kernel_h=1, kernel_w=1, pad_h=0, pad_w=0)
    offset = np.zeros((1, 2, 2, 2))
    offset[0, 0, 0], offset[0, 0, 1, 0], offset[0, 1, 0, 1] = np.nan, np.inf, -1e30
    found = reference(np.ones((1, 2, 2, 3)), offset, np.ones((1, 2, 2, 1)), what)
    np.testing.assert_array_equal(found[..., 0], [[[0, 0], [0, 1]]])


# The body


@pytest.mark.parametrize("opset", [16, 18, 20, 21, 23])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_body_equals_the_reference(opset: int, stride: int) -> None:
    for dilation, (kernel_h, kernel_w) in product([1, 2], KERNELS):
        shape = {"kernel_h": kernel_h, "kernel_w": kernel_w, "stride_h": stride, "stride_w": stride}
        what = DCNv3(group=2, dilation_h=dilation, dilation_w=dilation, pad_h=2, pad_w=1, **shape)
        arrays = operands(what, SIZE, seed=dilation)
        made = model(what, opset=opset)
        onnx.checker.check_model(ir.to_proto(made))
        assert relative_error(execute(made, *arrays), reference(*arrays, what)) <= BOUND


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(configurations, st.integers(0, 9))
def test_body_equals_the_reference_whatever_the_attributes(what: DCNv3, seed: int) -> None:
    arrays = operands(what, SIZE, seed=seed)
    assert relative_error(execute(model(what), *arrays), reference(*arrays, what)) <= BOUND


def test_body_in_the_reference_evaluator() -> None:
    """A second executor: the body relies on the standard, not on one runtime."""
    what = DCNv3(group=2, stride_h=2, remove_center=1, softmax=1)
    arrays = operands(what, (1, 6, 5, 4))
    found = ReferenceEvaluator(ir.to_proto(model(what))).run(None, dict(zip(("x", "offset", "mask"), arrays, strict=True)))
    assert relative_error(np.asarray(found[0]), reference(*arrays, what)) <= BOUND


@pytest.mark.parametrize("softmax", [0, 1])
def test_a_record_holds_offsets_and_masks(softmax: int) -> None:
    what = DCNv3(group=2, record=1, softmax=softmax)
    arrays = operands(what, SIZE)
    assert what.record_width == 32
    apart = arrays[1].reshape(*arrays[1].shape[:3], 2, 32)
    offset, mask = (apart[..., part].reshape(*apart.shape[:3], -1) for part in (slice(0, 18), slice(18, 27)))
    plain = DCNv3(group=2, softmax=softmax)
    np.testing.assert_array_equal(execute(model(what), *arrays), execute(model(plain), arrays[0], offset, mask))
    assert relative_error(execute(model(what), *arrays), reference(arrays[0], offset, mask, plain)) <= BOUND


def test_center_feature_scale() -> None:
    what = DCNv3(group=2)
    arrays = operands(what, SIZE)
    center = np.random.default_rng(3).random((*arrays[1].shape[:3], 2)).astype(np.float32)
    found = execute(model(what, operator=SCALED), *arrays, center)
    assert relative_error(found, reference(*arrays, what, center=center)) <= BOUND


def test_sixteen_bit_operands_are_computed_in_fp32() -> None:
    what = DCNv3(group=2)
    arrays = [a.astype(np.float16) for a in operands(what, SIZE)]
    exact = reference(*arrays, what)
    found = execute(model(what, types=dict.fromkeys(("x", "offset", "mask", "y"), "FLOAT16")), *arrays)
    assert found.dtype == np.float16
    # One rounding to FP16 at the end, of at most half a unit in the last place of the largest result.
    assert relative_error(found, exact) <= 2.0**-11 + BOUND


def test_int8_image_with_its_scale() -> None:
    what = DCNv3(group=2, x_scale=0.03125)
    x, offset, mask = operands(what, SIZE)
    codes = np.clip(np.rint(x / what.x_scale), -128, 127).astype(np.int8)
    found = execute(model(what, operator=DEQUANTIZED, types={"x": "INT8"}), codes, offset, mask)
    assert relative_error(found, reference(codes, offset, mask, what)) <= BOUND


def test_int8_result() -> None:
    what = DCNv3(group=2, x_scale=0.03125, y_scale=0.0078125)
    x, offset, mask = operands(what, SIZE)
    codes = np.clip(np.rint(x / what.x_scale), -128, 127).astype(np.int8)
    found = execute(model(what, operator=REQUANTIZED, types={"x": "INT8", "y": "INT8"}), codes, offset, mask)
    exact = reference(codes, offset, mask, what) / what.y_scale
    assert found.dtype == np.int8
    assert found.max() == 127  # it saturates
    # Half a step of rounding, and the error of the sum in steps.
    assert np.abs(found - exact.clip(-128, 127)).max() <= 0.5 + BOUND * np.abs(exact).max()


def test_grid_sample_has_no_attributes() -> None:
    nodes = [n for n in function() if n.op_type == "GridSample"]
    assert len(nodes) == 1
    assert not nodes[0].attributes


def test_functions_are_those_in_use() -> None:
    made = model(DCNv3(group=2))
    node = nodes_of(made)[0]
    assert attributes_of(node) == DCNv3(group=2)
    assert node.attributes["plugin_namespace"].value == ""
    assert node.attributes["plugin_version"].value == "1"
    made.functions[("deploycc", "DCNv3Center", "")] = function(SCALED)
    provide_functions(made)
    assert list(made.functions) == [("deploycc", "DCNv3", "")]


# Checks


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"group": 0}, "the attribute group of DCNv3 is 0"),
        ({"stride_w": -1}, "the attribute stride_w of DCNv3 is -1"),
        ({"pad_h": -1}, "the attribute pad_h of DCNv3 is -1"),
        ({"softmax": 2}, "the attribute softmax of DCNv3 is 2"),
        ({"x_scale": float("nan")}, "the attribute x_scale of DCNv3 is nan"),
        ({"remove_center": 1, "kernel_w": 5}, "a kernel of 3x5 has no centre"),
    ],
)
def test_refuses_attributes(attributes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DCNv3(**{"group": 2, **attributes})


@pytest.mark.parametrize(
    ("operand", "shape", "message"),
    [
        (0, (2, 9, 11, 7), r"x has the shape \[2, 9, 11, 7\]"),
        (1, (2, 9, 11, 36), r"offset has the shape \[2, 9, 11, 36\], and \[2, 5, 6, 36\] was expected"),
        (2, (2, 5, 6, 36), r"mask has the shape \[2, 5, 6, 36\], and \[2, 5, 6, 18\] was expected"),
    ],
)
def test_refuses_shapes(operand: int, shape: tuple[int, ...], message: str) -> None:
    """Offsets at the resolution of the input are the upstream module's silent error at stride 2."""
    what = DCNv3(group=2, stride_h=2, stride_w=2)
    arrays = list(operands(what, SIZE))
    arrays[operand] = np.zeros(shape)
    with pytest.raises(UsageError, match=message):
        reference(*arrays, what)


def test_refuses_an_image_smaller_than_the_kernel() -> None:
    with pytest.raises(UsageError, match="a kernel of 5x3 does not fit an image of 2x9"):
        DCNv3(group=1, kernel_h=5).output_size(2, 9)
