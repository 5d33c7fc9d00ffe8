"""The TensorRT plugin without a GPU: its class, its library, and that library in TensorRT-RTX's plugin registry.

Everything here needs TensorRT's public headers (``include`` of its open-source repository) in TENSORRT_ROOT, and those of CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import SOURCES, compiled

ALL = [p for p in SOURCES.rglob("*") if p.is_file()]
FLAGS = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-pthread"]
LIBRARY_SOURCES = ["dcnv3_plugin.cpp", "library.cpp", "tests/launch_cpu.cpp"]
FORMS = ["DCNv3", "DCNv3Center", "DCNv3DQ", "DCNv3DQQ"]


def headers() -> list[str]:
    """Return the compiler's options for the headers of TensorRT and CUDA, or skip with the reason."""
    root = os.environ.get("TENSORRT_ROOT", "")
    if not root:
        pytest.skip("TENSORRT_ROOT is not set: it names a folder with include/NvInferRuntime.h")
    places = [os.environ.get("CUDA_HOME"), *map(str, sorted(Path("/usr/local").glob("cuda*")))]
    cuda = next((Path(p, "include") for p in places if p and Path(p, "include", "cuda_runtime_api.h").exists()), None)
    if cuda is None:
        pytest.skip("the headers of CUDA were not found; set CUDA_HOME")
    assert Path(root, "include", "NvInferRuntime.h").exists(), f"TENSORRT_ROOT={root} holds no include/NvInferRuntime.h"
    return ["-isystem", str(Path(root, "include")), "-isystem", str(cuda)]


@pytest.fixture(scope="module")
def library() -> Path:
    """Return the plugin library, with a launch that computes on the CPU."""
    sources = [str(SOURCES / name) for name in LIBRARY_SOURCES]
    link = [f"-Wl,--version-script={SOURCES / 'exports.map'}", "-Wl,--no-undefined", "-ldl"]
    return compiled(
        "libdcnv3.so", ["g++", *FLAGS, "-shared", "-fPIC", "-fvisibility=hidden", *headers(), *sources, *link, "-o", "OUT"], ALL
    )


def output_of(*command: str | Path) -> str:
    """Return what a command prints; it must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_plugin_class() -> None:
    """Shapes, formats, tactics, fields, clone, serialisation, and a whole enqueue in several threads."""
    sources = [str(SOURCES / name) for name in ("dcnv3_plugin.cpp", "tests/launch_cpu.cpp", "tests/plugin_test.cpp")]
    program = compiled("plugin_test", ["g++", *FLAGS, *headers(), *sources, "-o", "OUT"], ALL)
    assert output_of(program) == "all checks passed\n"


def test_loading_registers_and_hands_over(library: Path) -> None:
    source = str(SOURCES / "tests" / "library_test.cpp")
    program = compiled("library_test", ["g++", *FLAGS, "-rdynamic", *headers(), source, "-ldl", "-o", "OUT"], ALL)
    assert output_of(program, library) == "all checks passed\n"


def exported(path: Path) -> set[str]:
    """Return the symbols that a library defines for others."""
    return {line.split()[-1] for line in output_of("nm", "-D", "--defined-only", path).splitlines()}


def needed(path: Path) -> str:
    """Return the lines that name the libraries which a library needs."""
    return "\n".join(line for line in output_of("readelf", "-d", path).splitlines() if "NEEDED" in line)


def test_the_library_exports_its_two_doors_and_needs_no_tensorrt(library: Path) -> None:
    assert exported(library) == {"getCreators", "setLoggerFinder"}
    assert "nvinfer" not in needed(library)


REGISTRY = """
import sys
import numpy as np
import tensorrt_rtx as trt

registry = trt.get_plugin_registry()
handle = registry.load_library(sys.argv[1])
print(*sorted(c.name for c in registry.all_creators if c.name.startswith("DCNv3")))
creator = registry.get_creator("DCNv3", "1", "")

def create(**values):
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    fields = [trt.PluginField(name, np.array([v], kinds[type(v)][0]), kinds[type(v)][1]) for name, v in values.items()]
    return creator.create_plugin("one", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)

made = create(group=4, kernel_h=3, offset_scale=2.0)
print(made.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name, create(group=0), create(group=4, unknown=1))
del made, creator
registry.deregister_library(handle)
print(any(c.name.startswith("DCNv3") for c in registry.all_creators))
"""


def check_registry(path: Path) -> None:
    """Load a library into the registry of TensorRT-RTX, in a process of its own, and create the plugin from fields."""
    pytest.importorskip("tensorrt_rtx")
    done = subprocess.run([sys.executable, "-c", REGISTRY, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [" ".join(FORMS), "DCNv3 None None", "False"], done.stdout + done.stderr
    assert "group is 0, give 1 to 65536" in done.stderr
    assert "there is no attribute unknown" in done.stderr


def test_the_registry_of_tensorrt_rtx_takes_the_library(library: Path) -> None:
    check_registry(library)


OPENING = """
import ctypes, os, sys

ctypes.CDLL(sys.argv[2], mode=getattr(os, sys.argv[3]))
import tensorrt_rtx as trt

registry = trt.get_plugin_registry()
for _ in range(2):
    print(*sorted(c.name for c in registry.all_creators if c.name.startswith("DCNv3")))
    library = ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW | os.RTLD_LOCAL)
print(registry.get_creator("DCNv3", "1", "").name)
"""


def major_version() -> int:
    """Return the major version of TensorRT's headers."""
    text = Path(os.environ["TENSORRT_ROOT"], "include", "NvInferVersion.h").read_text()
    found = re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", text)
    assert found
    return int(found[1])


def check_opening(path: Path, folder: Path) -> None:
    """Open a library as Triton does, with dlopen alone, and find it in the registry of a TensorRT that is loaded already.

    Triton's own backend is opened too, so that its TensorRT is not among the global symbols; here TensorRT-RTX plays it, under its name.
    """
    libraries = pytest.importorskip("tensorrt_rtx_libs")
    runtime = next(Path(libraries.__path__[0]).glob("libtensorrt_rtx.so*"))
    played = folder / f"libnvinfer.so.{major_version()}"
    played.symlink_to(runtime)
    for mode, place in (("RTLD_GLOBAL", ""), ("RTLD_LOCAL", str(folder))):
        environment = {**os.environ, "LD_LIBRARY_PATH": place}
        command = [sys.executable, "-c", OPENING, str(path), str(played), mode]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.stdout.splitlines() == ["", " ".join(FORMS), "DCNv3"], mode + done.stdout + done.stderr


def test_opening_the_library_registers_it_with_the_tensorrt_of_the_process(library: Path, tmp_path: Path) -> None:
    if major_version() < 11:
        pytest.skip("the plugin registry of TensorRT-RTX is that of TensorRT 11")
    check_opening(library, tmp_path)


@pytest.mark.slow
def test_cmake_builds_the_library_with_its_kernels(tmp_path: Path) -> None:
    """The real library, for one architecture: exported symbols, needed libraries, its own tests, and the registry."""
    headers()
    missing = [tool for tool in ("cmake", "nvcc") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    output_of("cmake", "-S", SOURCES, "-B", tmp_path, "-DCMAKE_CUDA_ARCHITECTURES=90-real")
    output_of("cmake", "--build", tmp_path)
    assert "100% tests passed" in output_of("ctest", "--test-dir", tmp_path)
    built = next(tmp_path.glob("libdeploycc_dcnv3_trt*.so"))
    assert exported(built) == {"getCreators", "setLoggerFinder"}
    assert not {"nvinfer", "cudart"} & set(needed(built).replace("lib", " ").replace(".so", " ").split())
    check_registry(built)
    if major_version() >= 11:
        check_opening(built, tmp_path)


LOADING = """
import sys
import tensorrt_rtx as trt
from deploycc.backends.nvinfer import load_library

print(load_library(trt, sys.argv[1]), load_library(trt, "/nowhere.so"))
"""


def test_a_build_knows_whether_a_library_was_loaded(library: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = subprocess.run([sys.executable, "-c", LOADING, str(library)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr
