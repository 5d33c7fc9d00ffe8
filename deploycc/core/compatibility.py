"""Where else an engine shall run than on the GPU and under the version that build it; each mode has its price."""

from __future__ import annotations

from dataclasses import dataclass

from deploycc.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Mode:
    """What an engine gains by a mode, and what that costs, as TensorRT's headers and manual put it."""

    gains: str
    costs: str


VERSION, AMPERE_PLUS, SAME_ARCH = "version", "ampere-plus", "same-arch"
MODES = {
    VERSION: Mode(
        "later releases of the same major version of TensorRT",
        "it uses the operators of the lean runtime only, which can be slower, and holds a copy of that runtime: "
        "code that a server must be told to trust",
    ),
    AMPERE_PLUS: Mode(
        "every GPU of sm_80 or later",
        "kernels share 48 KiB of memory, so that there are fewer to choose from and some fusions are lost; "
        "build for each architecture (repeat --target) where speed matters",
    ),
    SAME_ARCH: Mode("every GPU of the same architecture", "there may be fewer kernels to choose from than for the one model of GPU"),
}


def parse_compatibility(text: str) -> tuple[str, ...]:
    """Return the modes that ``text`` names, separated by commas, in the order of `MODES`.

    Raises:
        UsageError: for an unknown mode, or two that say how many GPUs to serve.
    """
    names = [part.strip() for part in text.split(",")] if text else []
    at = f"--compatibility {text}"
    if unknown := [name for name in names if name not in MODES]:
        raise UsageError(f"unknown mode '{unknown[0]}'", at=at, fix=f"use one of {', '.join(MODES)}, or several with commas")
    if {AMPERE_PLUS, SAME_ARCH} <= set(names):
        raise UsageError(f"{AMPERE_PLUS} includes {SAME_ARCH}", at=at, fix="name one of them")
    return tuple(name for name in MODES if name in names)
