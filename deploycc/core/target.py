"""Targets: where an engine will run, written ``backend[:sm_XX[+sm_YY...]]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deploycc.core.errors import UsageError

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
ARCHS = {
    "tensorrt": ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"),
    "tensorrt-rtx": ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    "onnxruntime": (),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A backend and the GPU architectures one engine must serve (empty: the backend's own choice)."""

    backend: str
    archs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend}:{'+'.join(self.archs)}" if self.archs else self.backend

    @property
    def slug(self) -> str:
        """Return the name used for files: ``tensorrt-rtx-sm_80+sm_89``."""
        return str(self).replace(":", "-")

    @property
    def compute_capabilities(self) -> tuple[int, ...]:
        """Return the architectures as integers, ``sm_89`` as 89."""
        return tuple(int(arch.removeprefix("sm_")) for arch in self.archs)


def parse_target(text: str) -> Target:
    """Parse ``backend[:arch[+arch...]]``.

    Raises:
        UsageError: for an unknown backend or an architecture that the backend does not build for.
    """
    backend, colon, rest = text.partition(":")
    if backend not in BACKENDS:
        raise UsageError(f"unknown target '{text}'", at="--target", fix=f"use one of {', '.join(BACKENDS)}, e.g. tensorrt-rtx:sm_89")
    archs = tuple(dict.fromkeys(re.split(r"[+,]", rest))) if colon else ()
    for arch in archs:
        if arch not in ARCHS[backend]:
            known = ", ".join(ARCHS[backend]) or "none (it runs on the CPU)"
            raise UsageError(f"{backend} does not build for '{arch}'", at=f"--target {text}", fix=f"architectures of {backend}: {known}")
    return Target(backend, tuple(sorted(archs, key=lambda a: int(a[3:]))))
