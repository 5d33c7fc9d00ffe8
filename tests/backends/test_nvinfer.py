import ast
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tensorrt_rtx
from backend_models import chain_model, model_text

from deploycc.backends import nvinfer
from deploycc.core.backend import BuildOptions
from deploycc.core.errors import BackendError
from deploycc.core.target import Target

CRASHER = model_text("y = DepthToSpace<blocksize = 0>(x)", inputs="float[1,4,4,4] x", outputs="float[1,C,H,W] y")
# What the variables of nvinfer.py are in the TensorRT API.
CLASSES = {
    "builder": tensorrt_rtx.Builder,
    "network": tensorrt_rtx.INetworkDefinition,
    "parser": tensorrt_rtx.OnnxParser,
    "config": tensorrt_rtx.IBuilderConfig,
    "profile": tensorrt_rtx.IOptimizationProfile,
    "tensor": tensorrt_rtx.ITensor,
    "error": tensorrt_rtx.ParserError,
}
# Names outside the subset that TensorRT 10, 11 and RTX share, each used only where its name is known to exist.
RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
PYTHON = {"__name__", "__version__", "__class__"}


def used_names(owner):
    """Return the attributes that nvinfer.py reads from or sets on the variable ``owner``, ``a.b`` as ``a``."""
    tree = ast.parse(inspect.getsource(nvinfer))
    found = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
    return {n.attr for n in found if n.value.id == owner} - PYTHON


def test_every_name_that_the_common_code_uses_exists():
    assert {n for n in used_names("trt") if not hasattr(tensorrt_rtx, n)} == set()
    for variable, kind in CLASSES.items():
        # 'error' also names the exceptions of the parent's half.
        names = used_names(variable) - {"kind", "message", "output"}
        assert names, variable
        assert {n for n in names if not hasattr(kind, n)} == set(), variable


def test_names_of_tensorrt_rtx_alone_are_used_in_one_function_only():
    others = [f for name, f in inspect.getmembers(nvinfer, inspect.isfunction) if f.__module__ == nvinfer.__name__ and name != "set_archs"]
    for function in others:
        tree = ast.parse(inspect.getsource(function))
        assert not RTX_ONLY & {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}, function.__name__


@pytest.mark.parametrize(
    ("name", "version", "bit", "flags"),
    [("tensorrt", "10.16.1", 1, 2), ("tensorrt", "11.1.0", 0, 0), ("tensorrt_rtx", "1.7.1", 0, 0), ("tensorrt", "11.1.0", None, 0)],
)
def test_strong_typing_is_a_flag_in_tensorrt_10_alone(name, version, bit, flags):
    kinds = SimpleNamespace(STRONGLY_TYPED=bit) if bit is not None else SimpleNamespace()
    assert nvinfer.network_flags(SimpleNamespace(__name__=name, __version__=version, NetworkDefinitionCreationFlag=kinds)) == flags


def test_the_network_of_the_real_module_is_strongly_typed():
    network = tensorrt_rtx.Builder(tensorrt_rtx.Logger()).create_network(nvinfer.network_flags(tensorrt_rtx))
    assert network.get_flag(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_the_time_budget_grows_with_the_square_of_the_nodes():
    assert nvinfer.time_budget(0, base=300) == 300
    assert nvinfer.time_budget(1000, base=300) == 1300
    assert nvinfer.time_budget(2000, base=300) == 4300
    assert nvinfer.time_budget(10**6, base=300) == nvinfer.LONGEST


def test_a_build_that_takes_too_long_is_stopped_and_leaves_nothing(build, tmp_path):
    start = time.perf_counter()
    with pytest.raises(BackendError, match=r"stopped after 2 s.*raise the time-out"):
        build(chain_model(4000), timeout=2)
    assert time.perf_counter() - start < 6
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_crash_becomes_an_error_with_a_reproducer(build, tmp_path):
    with pytest.raises(BackendError, match=r"compiler crashed \(SIGFPE\).*a reproducer is in .*m\.engine\.reproducer"):
        build(CRASHER)
    folder = tmp_path / "m.engine.reproducer"
    order = json.loads((folder / "request.json").read_text())
    assert (folder / order["request"]["model"]).read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert order["entry"] == nvinfer.ENTRY
    assert order["request"]["archs"] == ["sm_89"]
    assert not (tmp_path / "m.engine").exists()


def test_the_reproducer_crashes_again(build, tmp_path):
    with pytest.raises(BackendError):
        build(CRASHER)
    folder = tmp_path / "m.engine.reproducer"
    code = "import json; from deploycc.backends.nvinfer import *; build_in_child(json.load(open('request.json'))['request'])"
    again = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), check=False, capture_output=True)
    assert again.returncode == -signal.SIGFPE


def test_a_failed_build_keeps_the_old_engine(build, tmp_path):
    (tmp_path / "m.engine").write_bytes(b"old")
    with pytest.raises(BackendError):
        build(CRASHER)
    assert (tmp_path / "m.engine").read_bytes() == b"old"


def test_ctrl_c_stops_the_build_at_once(tmp_path):
    (tmp_path / "model.onnx").write_bytes(chain_model(4000))
    code = (
        "from pathlib import Path; from deploycc.backends.tensorrt_rtx import TensorRTRTX as Rtx;"
        "from deploycc.core.backend import BuildOptions; from deploycc.core.target import parse_target as target;"
        "Rtx().build(Path('model.onnx'), target('tensorrt-rtx:sm_89'), out=Path('m.engine'), profiles=[], options=BuildOptions())"
    )
    # A test run in the background of a shell ignores SIGINT, and its children with it; a user's terminal does not.
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child = compiling_child(parent)
    start = time.perf_counter()
    parent.send_signal(signal.SIGINT)
    _, stderr = parent.communicate(timeout=20)
    assert time.perf_counter() - start < 2
    assert b"KeyboardInterrupt" in stderr
    assert not child.is_running()
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def compiling_child(parent, seconds=30):
    """Return the child of ``parent`` once it has computed for a second, that is, when it is deep inside the compiler."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert parent.poll() is None, parent.communicate()[1].decode()
        children = psutil.Process(parent.pid).children()
        if children and children[0].cpu_times().user > 1:
            return children[0]
        time.sleep(0.1)
    raise AssertionError("the build did not start")


def environment():
    root = Path(nvinfer.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root)}


def test_a_module_that_is_not_installed_is_said_to_be_missing(tmp_path):
    with pytest.raises(BackendError, match="the Python module 'tensorrt_of_another_age' is not installed"):
        nvinfer.build(
            "tensorrt_of_another_age",
            tmp_path / "model.onnx",
            Target("tensorrt"),
            out=tmp_path / "m.engine",
            profiles=[],
            options=BuildOptions(),
            base=300,
        )
