"""The kernel body, compiled by g++ under sanitizers, against the float64 reference; and that nvcc compiles the same code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from dcnv3_cases import operands, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BFLOAT16, FP16_PAIRS, SOURCES, Case, compiled, kernel_program, run_kernel

from plugins_trt.dcnv3 import DCNv3, reference

FLOAT, HALF, INT8 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int8)
WIDTHS = [1, 2, 4, 8, 16]
FP32_BOUND = 2e-6
FP16_BOUND = 1e-3
# One rounding of the result to BF16, and nothing else that FP16 has not.
BF16_BOUND = 2.0**-8
# Types of x, offset, mask and y, and the error that rounding the result may cause.
PLAIN_TYPES = [
    (FLOAT, FLOAT, FLOAT, FLOAT, FP32_BOUND),
    (HALF, HALF, HALF, HALF, FP16_BOUND),
    (HALF, FLOAT, HALF, HALF, FP16_BOUND),
    (BFLOAT16, HALF, BFLOAT16, BFLOAT16, BF16_BOUND),
    (BFLOAT16, FLOAT, BFLOAT16, BFLOAT16, BF16_BOUND),
    (INT8, HALF, HALF, HALF, FP16_BOUND),
]
RECORD_TYPES = [
    (FLOAT, FLOAT, FLOAT, FP32_BOUND),
    (HALF, HALF, HALF, FP16_BOUND),
    (HALF, FLOAT, HALF, FP16_BOUND),
    (BFLOAT16, HALF, BFLOAT16, BF16_BOUND),
    (BFLOAT16, FLOAT, BFLOAT16, BF16_BOUND),
    (INT8, HALF, HALF, FP16_BOUND),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, np.ndarray, float]:
    """Return a case, its exact result, and the bound on the error relative to the largest result."""
    kernel_h, kernel_w = draw(st.sampled_from([(3, 3), (3, 3), (2, 2), (4, 4), (3, 5), (1, 1), (5, 3)]))
    square = kernel_h == kernel_w == 3
    what = DCNv3(
        group=draw(st.integers(1, 4)),
        kernel_h=kernel_h,
        kernel_w=kernel_w,
        stride_h=draw(st.integers(1, 3)),
        stride_w=draw(st.integers(1, 3)),
        pad_h=draw(st.integers(0, 4)),
        pad_w=draw(st.integers(0, 4)),
        dilation_h=draw(st.integers(1, 2)),
        dilation_w=draw(st.integers(1, 2)),
        offset_scale=draw(st.sampled_from([0.5, 1.0, 1.5, 2.0])),
        remove_center=draw(st.integers(0, 1)) if square else 0,
        softmax=draw(st.integers(0, 1)),
        record=draw(st.integers(0, 1)),
        x_scale=1.0,
    )
    if what.record:
        x_type, offset_type, y_type, bound = draw(st.sampled_from(RECORD_TYPES))
        mask_type = offset_type
    else:
        x_type, offset_type, mask_type, y_type, bound = draw(st.sampled_from(PLAIN_TYPES))
    if x_type == INT8:
        what = replace(what, x_scale=0.03125)
    width = draw(st.sampled_from(WIDTHS))
    per_group = width * draw(st.integers(1, 2))
    paired = width > 1 and x_type in (HALF, INT8) and draw(st.booleans())
    size = (draw(st.integers(1, 3)), draw(st.integers(kernel_h * 2, 12)), draw(st.integers(kernel_w * 2, 12)), what.group * per_group)
    spread = draw(st.sampled_from([0.0, 0.5, 2.0, 10.0]))
    x, offset, mask = operands(what, size, seed=draw(st.integers(0, 99)), spread=spread)
    x = np.clip(np.rint(x / what.x_scale), -128, 127) if x_type == INT8 else x
    x, offset, mask = x.astype(x_type), offset.astype(offset_type), mask.astype(mask_type)
    case = Case(what, x, offset, mask, y_type, width + FP16_PAIRS * paired)
    return case, reference(x.astype(float), offset.astype(float), mask.astype(float), what), bound


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(cases(), min_size=4, max_size=4))
def test_kernel_equals_the_reference(drawn: list[tuple[Case, np.ndarray, float]]) -> None:
    for (case, exact, bound), found in zip(drawn, run_kernel([case for case, _, _ in drawn]), strict=True):
        assert isinstance(found, np.ndarray), found
        # Offsets may move every sample out of a small image: then the result is zero, and so must be the kernel's.
        assert np.abs(found.astype(float) - exact).max() <= bound * max(np.abs(exact).max(), 1e-3), case


@pytest.mark.parametrize("types", PLAIN_TYPES, ids=lambda t: "-".join(str(k) for k in t[:4]))
@pytest.mark.parametrize("width", WIDTHS)
def test_every_kernel_of_internimage(types: tuple[np.dtype, np.dtype, np.dtype, np.dtype, float], width: int) -> None:
    """3x3, stride 1, 16 channels per group: what the network runs, in every type and width, with and without softmax."""
    x_type, offset_type, mask_type, y_type, bound = types
    made = []
    for softmax in (0, 1):
        what = DCNv3(group=2, softmax=softmax, x_scale=0.03125 if x_type == INT8 else 1.0)
        x, offset, mask = operands(what, (2, 14, 13, 32), spread=1.0)
        x = np.clip(np.rint(x / what.x_scale), -128, 127) if x_type == INT8 else x
        arrays = x.astype(x_type), offset.astype(offset_type), mask.astype(mask_type)
        tactics = [width, width + FP16_PAIRS] if width > 1 and x_type in (HALF, INT8) else [width]
        made += [(Case(what, *arrays, y_type, tactic), reference(*(a.astype(float) for a in arrays), what)) for tactic in tactics]
    for (_, exact), found in zip(made, run_kernel([case for case, _ in made]), strict=True):
        assert isinstance(found, np.ndarray), found
        assert relative_error(found, exact) <= bound


def test_positions_do_not_lose_accuracy_in_large_images() -> None:
    """FP32 positions on a map of 4000 columns: computed as base + offset they would be wrong by 2e-4 pixels."""
    what = DCNv3(group=1)
    x, offset, mask = operands(what, (1, 4, 4000, 4), spread=1.0)
    found = run_kernel([Case(what, x, offset, mask, FLOAT, 4)])[0]
    assert relative_error(np.asarray(found), reference(x, offset, mask, what)) <= FP32_BOUND


HOSTILE = [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e9, -3e9, 2.0**31, -(2.0**31), 65504.0, -65504.0, 1e-40, -0.0]


@pytest.mark.parametrize("kind", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("record", [0, 1])
def test_hostile_offsets_stay_inside_the_image(kind: np.dtype, record: int) -> None:
    """AddressSanitizer watches every access, UndefinedBehaviorSanitizer every conversion; samples nowhere count as zero."""
    what = DCNv3(group=2, record=record)
    x, offset, mask = operands(what, (2, 6, 5, 32))
    with np.errstate(over="ignore"):
        hostile = np.resize(np.array(HOSTILE), offset.shape).astype(kind)
    if record:
        # Only the offsets are hostile: a mask that is not a number gives a result that is none.
        apart = hostile.reshape(*offset.shape[:3], 2, -1)
        apart[..., 18:] = offset.reshape(apart.shape)[..., 18:]
    mask = hostile if record else mask.astype(kind)
    x = x.astype(kind)
    results = run_kernel([Case(what, x, hostile, mask, kind, width) for width in WIDTHS])
    exact = reference(x, hostile, mask, what)
    for found in results:
        assert isinstance(found, np.ndarray), found
        assert relative_error(found, exact) <= (FP32_BOUND if kind == FLOAT else FP16_BOUND)


def test_images_of_a_batch_are_independent() -> None:
    """Batches whose images do not divide into thread blocks, which a published kernel gets wrong."""
    what = DCNv3(group=4)
    x, offset, mask = operands(what, (5, 7, 7, 64))
    order = [3, 0, 4, 1, 2]
    once, again = run_kernel([Case(what, x, offset, mask, FLOAT, 16), Case(what, x[order], offset[order], mask[order], FLOAT, 16)])
    np.testing.assert_array_equal(np.asarray(once)[order], again)


def test_center_feature_scale() -> None:
    what = DCNv3(group=2)
    x, offset, mask = operands(what, (2, 6, 5, 32))
    center = np.random.default_rng(5).random((2, 6, 5, 2)).astype(np.float32)
    results = run_kernel([Case(what, x, offset, mask, FLOAT, width, center) for width in WIDTHS])
    exact = reference(x, offset, mask, what, center=center)
    assert [relative_error(np.asarray(found), exact) <= FP32_BOUND for found in results] == [True] * 5


def test_int8_result_rounds_to_nearest_and_saturates() -> None:
    what = DCNv3(group=2, x_scale=0.03125, y_scale=0.0078125)
    x, offset, mask = operands(what, (2, 6, 5, 32))
    codes = np.clip(np.rint(x / what.x_scale), -128, 127).astype(np.int8)
    offset, mask = offset.astype(np.float16), mask.astype(np.float16)
    exact = reference(codes, offset, mask, what) / what.y_scale
    for found in run_kernel([Case(what, codes, offset, mask, INT8, 8), Case(what, codes, offset, mask, INT8, 8 + FP16_PAIRS)]):
        assert isinstance(found, np.ndarray), found
        assert found.max() == 127
        # FP16 interpolation may be wrong by its bound before the result is rounded.
        assert np.abs(found - exact.clip(-128, 127)).max() <= 0.5 + FP16_BOUND * np.abs(exact).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tactic": 8}, "tactic 8 does not fit 4 channels per group"),
        ({"tactic": 3}, "tactic 3 does not fit"),
        ({"tactic": 4 + FP16_PAIRS}, "tactic 36 does not fit"),
        ({"what": DCNv3(group=2, stride_h=2)}, "offset and mask must have 3x5 pixels of 9 points in 2 groups"),
        ({"mask": np.zeros((2, 6, 5, 36), np.float32)}, "offset and mask must have"),
        ({"y": HALF}, "there is no kernel for these types"),
        ({"offset": np.zeros((2, 6, 5, 36), BFLOAT16)}, "there is no kernel for these types"),
        ({"center": np.zeros((2, 6, 5, 3), np.float32)}, "center must be of the type of x"),
    ],
)
def test_what_the_launch_refuses(change: dict[str, object], message: str) -> None:
    what = DCNv3(group=2)
    case = replace(Case(what, *operands(what, (2, 6, 5, 8)), FLOAT), **change)  # type: ignore[arg-type]
    refused = run_kernel([case])[0]
    assert isinstance(refused, str)
    assert message in refused


def test_an_empty_batch_is_no_work() -> None:
    what = DCNv3(group=2)
    found = run_kernel([Case(what, *operands(what, (0, 6, 5, 8)), FLOAT)])[0]
    assert np.asarray(found).size == 0


def test_the_sanitizers_are_in_the_program() -> None:
    symbols = kernel_program().read_bytes()
    assert b"__asan_init" in symbols
    assert b"__ubsan_handle" in symbols


@pytest.mark.slow
def test_nvcc_compiles_every_kernel_without_spills() -> None:
    source = SOURCES / "dcnv3_launch.cu"
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v,-warn-spills,-Werror", "-c", str(source), "-o", "OUT"]
    assert compiled("launch", command, [source, *SOURCES.glob("*.h")]).stat().st_size > 100_000


@pytest.mark.slow
def test_instructions_per_channel() -> None:
    """The kernel is bound by instructions, so that their number is its speed: at most 110 per channel at sixteen channels per thread."""
    folder = str(SOURCES.parents[1] / "benchmarks")
    if not all(shutil.which(tool) for tool in ("nvcc", "cuobjdump")):
        pytest.skip("nvcc or cuobjdump is not installed")
    code = "import dcnv3; print(*dcnv3.instructions(dcnv3.KERNELS[0], 'sm_90'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    count, spilled = map(int, done.stdout.split())
    assert count / 16 <= 110
    assert spilled == 0
