"""The kernel with its shapes written in: the same code on the CPU, its PTX, and what TensorRT's Python plugin API is told."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
from dcnv3_cases import operands, relative_error
from kernel_cases import SOURCES, compiled

from deploycc.core.errors import UsageError
from plugins_trt.dcnv3 import DCNv3, reference
from plugins_trt.dcnv3_aot import ENTRY, StaticKernel, register, static_kernel


def on_cpu(kernel: StaticKernel, *arrays: np.ndarray) -> np.ndarray:
    """Compile the kernel as C++ and run it."""
    text = kernel.source().encode()
    source = SOURCES.parents[1] / "build" / "plugins_trt" / f"aot{abs(hash(text))}.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(text)
    library = compiled(
        source.stem,
        ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", "OUT"],
        [source, *SOURCES.glob("*.h")],
    )
    source.unlink()
    y = np.full((*kernel.offset[:3], kernel.x[3]), np.nan, arrays[0].dtype)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, y)]
    getattr(ctypes.CDLL(str(library)), ENTRY)(*pointers)
    library.unlink()
    return y


@pytest.mark.parametrize(
    ("what", "kind", "bound"),
    [
        (DCNv3(group=2), "float32", 2e-6),
        (DCNv3(group=2, record=1, softmax=1), "float16", 1e-3),
        (DCNv3(group=2, kernel_h=2, kernel_w=5, stride_h=2, pad_h=0, pad_w=3, dilation_w=2, offset_scale=0.5), "float32", 2e-6),
        (DCNv3(group=2, remove_center=1), "float16", 1e-3),
    ],
)
def test_the_constants_are_those_of_the_launch(what: DCNv3, kind: str, bound: float) -> None:
    arrays = operands(what, (2, 9, 11, 32), dtype=kind)
    kernel = static_kernel(what, [a.shape for a in arrays], [kind] * 3)
    assert relative_error(on_cpu(kernel, *arrays), reference(*arrays, what)) <= bound


def test_small_problems_get_more_threads() -> None:
    what = DCNv3(group=4)
    small, large = ([(n, 56, 56, 64), (n, 56, 56, 72), (n, 56, 56, 36)] for n in (1, 64))
    assert static_kernel(what, small, ["half"] * 3).width == 2
    chosen = static_kernel(what, large, ["half"] * 3)
    assert (chosen.width, chosen.paired, chosen.blocks) == (16, True, 64 * 56 * 56 * 4 // 128)


def test_refusals() -> None:
    shapes = [(1, 8, 8, 32), (1, 8, 8, 36), (1, 8, 8, 18)]
    with pytest.raises(UsageError, match="no kernel for operands of bfloat16, bfloat16, bfloat16"):
        static_kernel(DCNv3(group=2), shapes, ["bf16"] * 3)
    with pytest.raises(UsageError, match="mask has the shape"):
        static_kernel(DCNv3(group=2), [*shapes[:2], (1, 8, 8, 20)], ["half"] * 3)
    with pytest.raises(UsageError, match="8 channels per thread do not divide 4"):
        StaticKernel(DCNv3(group=8), shapes[0], (1, 8, 8, 144), (1, 8, 8, 72), ("float16",) * 3, 8)


@pytest.mark.slow
def test_ptx_takes_pointers_and_nothing_else(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    what = DCNv3(group=4, record=1, softmax=1)
    text = static_kernel(what, [(8, 56, 56, 64), (8, 56, 56, 128), (8, 56, 56, 128)], ["half"] * 3).ptx("sm_80")
    signature = text.split(f".visible .entry {ENTRY}(")[1].split(")")[0]
    assert signature.count(".param .u64") == 4
    assert signature.count(".param") == 4


@pytest.mark.tensorrt
def test_a_plan_holds_the_kernel() -> None:
    """Needs TensorRT 10.7 or later and a GPU: registration, a network of one node, and a plan without a plugin library."""
    trt = pytest.importorskip("tensorrt")
    trtp = pytest.importorskip("tensorrt.plugin")
    register(trtp, arch="sm_90")
    builder = trt.Builder(trt.Logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS))
    shapes = {"x": (1, 14, 14, 64), "offset": (1, 14, 14, 72), "mask": (1, 14, 14, 36)}
    inputs = [network.add_input(name, trt.float16, shape) for name, shape in shapes.items()]
    attributes = {"group": 4, "kernel_h": 3, "kernel_w": 3, "stride_h": 1, "stride_w": 1, "pad_h": 1, "pad_w": 1}
    attributes |= {"dilation_h": 1, "dilation_w": 1, "offset_scale": 1.0, "remove_center": 0, "softmax": 0, "record": 0}
    layer = network.add_plugin(trtp.op.deploycc.DCNv3(*inputs, **attributes), aot=True)
    network.mark_output(layer.get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    assert plan is not None
    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan) is not None
