"""One small build for all tests of serving, and the C++ runner when it has been compiled."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from small_graphs import graph, random, weight

from deploycc.interop import save_model
from deploycc.pipeline import build
from deploycc.request import BuildRequest

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "build" / "serve_cpp"
NET = (
    "(float[N,16,6,6] x) => (float[N,5] y) "
    "{ c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) m = ReduceMean<keepdims=0>(r, axes) y = Gemm<transB=1>(m, v) }"
)


def write_net(folder: Path) -> Path:
    """Write a small network and its calibration data; return its path."""
    model = graph(NET, opset=20, w=weight(32, 16, 3, 3), v=weight(5, 32), axes=np.array([2, 3], np.int64))
    save_model(model, folder / "net.onnx")
    np.savez(folder / "net.calib.npz", x=random(16, 16, 6, 6))
    return folder / "net.onnx"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a build in INT8 with an engine of TensorRT-RTX."""
    folder = tmp_path_factory.mktemp("served")
    request = BuildRequest(
        write_net(folder),
        precision="int8",
        targets=("tensorrt-rtx:sm_89", "onnxruntime"),
        out=folder / "net.deploycc",
        shapes=("x=1:2:4",),
    )
    return build(request)[1]


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """Return a copy of the build that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "net.deploycc"))


@pytest.fixture(scope="session")
def runner() -> Path:
    """Return the folder of the compiled runner, brought up to date."""
    if not (COMPILED / "CMakeCache.txt").exists():
        pytest.skip("the C++ runner is not compiled: cmake -S examples/serve_cpp -B build/serve_cpp && cmake --build build/serve_cpp")
    subprocess.run(["cmake", "--build", COMPILED, "-j2"], check=True, capture_output=True)
    return COMPILED
