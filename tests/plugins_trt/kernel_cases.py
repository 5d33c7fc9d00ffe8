"""The C++ programs of the plugin: how tests build them, and how they hand cases of the kernel to one."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plugins_trt.dcnv3 import DCNv3

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins_trt" / "csrc"
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2, np.dtype(np.int8): 3}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP16_PAIRS = 32


@dataclass(frozen=True)
class Case:
    """One problem for the kernel; ``y`` is the type of the result, ``tactic`` its channels per thread, plus FP16_PAIRS."""

    what: DCNv3
    x: np.ndarray
    offset: np.ndarray
    mask: np.ndarray
    y: np.dtype
    tactic: int = 1
    center: np.ndarray | None = None


def compiled(name: str, command: Sequence[str], sources: Sequence[Path]) -> Path:
    """Return the program or library that ``command`` makes of ``sources``; it is kept in ``build`` until one of them changes.

    The last word of ``command`` is replaced by the file to write.
    """
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    key = hashlib.sha256("\0".join(command).encode())
    for source in sorted(sources):
        key.update(source.read_bytes())
    out = ROOT / "build" / "plugins_trt" / f"{name}-{key.hexdigest()[:12]}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f"{name}-*"):
            old.unlink()
        partial = out.with_suffix(".partial")
        done = subprocess.run([*command[:-1], str(partial)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        partial.replace(out)
    return out


def kernel_program() -> Path:
    """Return the kernel as a program for the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    source = SOURCES / "tests" / "run_cases.cpp"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *sanitizers, str(source), "-o", "OUT"]
    return compiled("run_cases", command, [source, *SOURCES.glob("*.h")])


def run_kernel(cases: Sequence[Case]) -> list[np.ndarray | str]:
    """Run cases on the CPU and return for each the result, or why the kernel refused it."""
    done = subprocess.run([str(kernel_program())], input=b"".join(map(_encoded, cases)), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    results: list[np.ndarray | str] = []
    position = 0
    for case in cases:
        (length,) = struct.unpack_from("<q", done.stdout, position)
        shape = _shapes(case)[4]
        size = length if length >= 0 else int(np.prod(shape)) * case.y.itemsize
        payload = done.stdout[position + 8 : position + 8 + size]
        results.append(payload.decode() if length >= 0 else np.frombuffer(payload, case.y).reshape(shape))
        position += 8 + size
    assert position == len(done.stdout)
    return results


def _encoded(case: Case) -> bytes:
    numbers = astuple(case.what)
    attributes = b"".join(struct.pack("<f" if isinstance(n, float) else "<i", n) for n in numbers)
    types = [TYPES[a] for a in (case.x.dtype, case.offset.dtype, case.mask.dtype, case.y)]
    head = struct.pack("<6i", case.tactic, *types, int(case.center is not None))
    shapes = b"".join(struct.pack("<4q", *shape) for shape in _shapes(case))
    arrays = [case.x, case.offset, *([] if case.what.record else [case.mask]), *([] if case.center is None else [case.center])]
    return attributes + head + shapes + b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)


def _shapes(case: Case) -> list[tuple[int, ...]]:
    head = case.offset.shape[:3]
    center = case.center.shape if case.center is not None else (0, 0, 0, 0)
    return [case.x.shape, case.offset.shape, case.mask.shape, center, (*head, case.x.shape[3])]
