"""TensorRT for RTX: engines for GeForce and RTX GPUs, built ahead of time on any machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deploycc.backends.probed import COMPUTES, reason_against
from deploycc.core.compatibility import VERSION
from deploycc.core.formats import BF16, FORMATS, FP16, INT8, Format
from deploycc.core.target import ARCHS, Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploycc.core.backend import BuildOptions, Engine
    from deploycc.core.shapes import Profile

DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_120")


@dataclass(frozen=True, slots=True)
class TensorRTRTX:
    """TensorRT-RTX: one engine may serve several architectures; no GPU is needed to build it."""

    name: str = "tensorrt-rtx"

    def resolve(self, target: Target) -> Target:
        """Return ``target`` with architectures: Ampere, Ada and Blackwell when none were asked for."""
        return target if target.archs else Target(target.backend, DEFAULT_ARCHS)

    def formats(self, target: Target) -> frozenset[Format]:
        """Return the formats that every architecture of ``target`` computes in natively, as probed (``deploycc targets``)."""
        archs = self.resolve(target).archs
        return frozenset(f for f in FORMATS.values() if not any(_against(f, arch) for arch in archs))

    def unsupported_reason(self, target: Target, wanted: Format) -> str:
        """Return why ``target`` does not compute in ``wanted``, and what would; empty when it does."""
        reasons = {arch: reason for arch in self.resolve(target).archs if (reason := _against(wanted, arch))}
        if not reasons:
            return ""
        best = next(f.name for f in (INT8, BF16, FP16) if f in self.formats(target))
        having = [arch for arch in ARCHS[self.name] if not _against(wanted, arch)]
        other = f" or a target of {', '.join(having)}" if having else ""
        archs, reason, name = ", ".join(reasons), next(iter(reasons.values())), wanted.name.upper()
        has = f"{archs} {reason} where {name} is asked for" if reason.startswith(COMPUTES) else f"{archs} has no {name} units"
        return f"{has}; use --precision {best}{other}"

    def unsupported_mode(self, target: Target, mode: str) -> str:
        """Return why an engine for ``target`` cannot be as compatible as ``mode`` says, and what to do: it never can."""
        if mode == VERSION:
            return "TensorRT-RTX comes without the lean runtime that such an engine needs; build again for each version of it"
        archs = "+".join(ARCHS[self.name][1:])
        return f"an engine of {self.name} runs on the architectures that it is built for; name them, as in --target {self.name}:{archs}"

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


def _against(wanted: Format, arch: str) -> str:
    """Return why ``arch`` does not compute in ``wanted``, as probed."""
    reason = reason_against(wanted, "tensorrt-rtx", arch)
    return "was not probed" if reason is None else reason
