"""TensorRT 10 and 11: engines for the GPU of the machine that builds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycc.backends.probed import reason_against
from deploycc.core.compatibility import AMPERE_PLUS, SAME_ARCH
from deploycc.core.errors import BackendError
from deploycc.core.formats import BF16, FP8, FP16, FP32, INT4, INT8, MXFP8, NVFP4, Format
from deploycc.core.target import Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploycc.core.backend import BuildOptions, Engine
    from deploycc.core.shapes import Profile

# The first architecture with native arithmetic in each format, as NVIDIA states: without such a GPU there is no builder to ask.
# `deploycc targets --probe` asks where there is one.
SINCE: dict[Format, int] = {FP32: 75, FP16: 75, INT8: 75, BF16: 80, INT4: 80, FP8: 89, NVFP4: 100, MXFP8: 100}
# The first architecture that a hardware-compatible engine can be built on.
OLDEST_COMPATIBLE = 80
# Numbers of CUDA's driver API for cuDeviceGetAttribute.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True, slots=True)
class TensorRT:
    """TensorRT: it times kernels on the GPU it finds, so a target's architecture must be this machine's."""

    name: str = "tensorrt"

    def resolve(self, target: Target) -> Target:
        """Return ``target`` with the architecture of this machine's GPU when none was asked for."""
        here = present_arch() if not target.archs else None
        return Target(target.backend, (f"sm_{here}",)) if here else target

    def formats(self, target: Target) -> frozenset[Format]:
        """Return the formats that every architecture of ``target`` computes in natively (every format if none is known)."""
        archs = _archs(target)
        return frozenset(wanted for wanted in SINCE if all(_computes(arch, wanted) for arch in archs))

    def unsupported_reason(self, target: Target, wanted: Format) -> str:
        """Return why ``target`` does not compute in ``wanted``, and what would; empty when it does."""
        lacking = ", ".join(f"sm_{arch}" for arch in _archs(target) if not _computes(arch, wanted))
        if not lacking:
            return ""
        best = "fp16" if wanted == BF16 else "int8"
        return f"{lacking} has no {wanted.name.upper()} units; use --precision {best} or a target of sm_{SINCE[wanted]} or later"

    def unsupported_mode(self, target: Target, mode: str) -> str:
        """Return why an engine for ``target`` cannot be as compatible as ``mode`` says, and what to do; empty when it can."""
        older = ", ".join(f"sm_{arch}" for arch in _archs(target) if arch < OLDEST_COMPATIBLE)
        if mode != AMPERE_PLUS or not older:
            return ""
        return f"{AMPERE_PLUS} begins with sm_{OLDEST_COMPATIBLE}, and the target is {older}; build on a later GPU, or use {SAME_ARCH}"

    def build(self, model: Path, target: Target, *, out: Path, profiles: Sequence[Profile], options: BuildOptions) -> Engine:
        """Build ``model`` for the GPU of this machine into ``out``.

        Raises:
            BackendError: when ``target`` is another GPU, or with the meaning of the builder's message and what to do.
        """
        from deploycc.backends import nvinfer

        here = present_arch()
        if here and any(arch != here for arch in target.compute_capabilities):
            what = f"TensorRT builds for the GPU it runs on, which is sm_{here}"
            raise BackendError(what, at=f"target {target}", fix=f"build on that GPU, or use the target tensorrt:sm_{here}")
        return nvinfer.build("tensorrt", model, target, out=out, profiles=profiles, options=options, base=1800.0)

    def doctor(self) -> Mapping[str, Any]:
        """Return the version of TensorRT and the architecture of the GPU it would build for."""
        here = present_arch()
        gpu = f"sm_{here}" if here else None
        try:
            import tensorrt
        except ImportError as error:
            return {"available": False, "reason": str(error), "gpu": gpu}
        reason = {} if gpu else {"reason": "no GPU with a driver was found"}
        return {"available": gpu is not None, "version": tensorrt.__version__, "gpu": gpu, "needs_gpu": True, **reason}


def present_arch() -> int | None:
    """Return the compute capability of the first GPU as an integer (89 for sm_89), or None without GPU or driver."""
    import ctypes

    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, 0):
        return None
    return None if cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, 0) else 10 * major.value + minor.value


def _computes(arch: int, wanted: Format) -> bool:
    """Return whether ``arch`` has arithmetic in ``wanted``: as probed on this machine, else as stated.

    On sm_120 and later TensorRT-RTX was seen to compute MXFP8 in FP16.
    """
    if (found := reason_against(wanted, "tensorrt", f"sm_{arch}")) is not None:
        return not found
    return arch >= SINCE[wanted] and not (wanted == MXFP8 and arch >= 120)


def _archs(target: Target) -> tuple[int, ...]:
    """Return the architectures of ``target``, or else this machine's, or nothing."""
    here = present_arch() if not target.archs else None
    return target.compute_capabilities or ((here,) if here else ())
