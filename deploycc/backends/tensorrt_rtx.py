"""TensorRT for RTX: engines for GeForce and RTX GPUs, built ahead of time on any machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deploycc.core.formats import BF16, FP8, FP16, FP32, INT8, Format
from deploycc.core.target import ARCHS, Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploycc.core.backend import BuildOptions, Engine
    from deploycc.core.shapes import Profile

DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_120")
# The first architecture with native arithmetic in each format. sm_75 builds INT8 convolutions but computes them in FP16
# (only its INT8 matrix products are real), so INT8 counts from sm_80; it has FP32 convolutions but no FP32 matrix product.
SINCE: dict[Format, int] = {FP32: 75, FP16: 75, BF16: 80, INT8: 80, FP8: 89}


@dataclass(frozen=True, slots=True)
class TensorRTRTX:
    """TensorRT-RTX: one engine may serve several architectures; no GPU is needed to build it."""

    name: str = "tensorrt-rtx"

    def resolve(self, target: Target) -> Target:
        """Return ``target`` with architectures: Ampere, Ada and Blackwell when none were asked for."""
        return target if target.archs else Target(target.backend, DEFAULT_ARCHS)

    def formats(self, target: Target) -> frozenset[Format]:
        """Return the formats that every architecture of ``target`` computes in natively."""
        oldest = min(self.resolve(target).compute_capabilities)
        return frozenset(wanted for wanted, since in SINCE.items() if oldest >= since)

    def unsupported_reason(self, target: Target, wanted: Format) -> str:
        """Return why ``target`` does not compute in ``wanted``, and what would; empty when it does."""
        lacking = [arch for arch in self.resolve(target).archs if int(arch[3:]) < SINCE[wanted]]
        if not lacking:
            return ""
        known = [f.name for f in SINCE if f in self.formats(target) and f != FP32]
        best = next(name for name in ("int8", "bf16", "fp16") if name in known)
        why = " (INT8 convolutions would run in FP16)" if wanted == INT8 else ""
        has = f"{', '.join(lacking)} has no {wanted.name.upper()} units{why}"
        return f"{has}; use --precision {best} or a target of sm_{SINCE[wanted]} or later"

    def build(self, model: Path, target: Target, *, out: Path, profiles: Sequence[Profile], options: BuildOptions) -> Engine:
        """Build ``model`` for all architectures of ``target`` into ``out`` and read back what it computes in.

        Raises:
            BackendError: with the meaning of the compiler's message, the ONNX node where it is known, and what to do.
        """
        from deploycc.backends import nvinfer
        from deploycc.backends.listing import read_listing

        target = self.resolve(target)
        engine = nvinfer.build("tensorrt_rtx", model, target, out=out, profiles=profiles, options=options, base=300.0, archs=target.archs)
        return replace(engine, realised=read_listing(out.read_bytes()))

    def doctor(self) -> Mapping[str, Any]:
        """Return the version of TensorRT-RTX and the architectures it builds for."""
        try:
            import tensorrt_rtx
        except ImportError as error:
            return {"available": False, "reason": str(error)}
        return {"available": True, "version": tensorrt_rtx.__version__, "archs": list(ARCHS[self.name]), "needs_gpu": False}
