"""What a backend is to the pipeline: three frozen records and a protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from deploycc.core.formats import Format
from deploycc.core.shapes import Profile
from deploycc.core.target import Target

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of one engine build.

    ``timeout`` is the seconds until the child is killed (None: by the graph's size), ``workspace`` the target's in bytes. ``dcn`` says how
    TensorRT computes DCNv3: ``body``, ``aot``, or the path of a plugin library; other backends know the body only. ``compatibility`` names
    modes of ``deploycc.core.compatibility``.
    """

    timeout: float | None = None
    workspace: int | None = None
    dcn: str = "body"
    compatibility: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Realised:
    """What the engine's own listing says: operand types per ONNX node, and counts of what matters.

    ``operands`` maps the name of an ONNX node to the operand types of the op that computes it, e.g. ``("int8", "int8")``.
    ``source`` names the listing and its version gate; an empty record with a ``note`` means that it could not be read.
    """

    operands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_attention: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine on disk; ``version`` is that of the library that built it."""

    target: Target
    path: Path
    bytes: int
    build_seconds: float
    peak_rss_mb: float = 0.0
    realised: Realised = field(default_factory=Realised)
    warnings: tuple[str, ...] = ()
    version: str = ""


class Executor(Protocol):
    """Runs one batch."""

    def __call__(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return the outputs by name (all of the model's when ``outputs`` is None)."""
        ...


class Backend(Protocol):
    """Builds engines from lowered ONNX files; found by entry point (group ``deploycc.backends``)."""

    name: str

    def formats(self, target: Target) -> frozenset[Format]:
        """Return the formats in which ``target`` computes natively (not merely builds)."""
        ...

    def build(self, model: Path, target: Target, *, out: Path, profiles: Sequence[Profile], options: BuildOptions) -> Engine:
        """Build ``model`` for ``target`` into the file ``out``.

        Raises:
            BackendError: with the builder's own message, its meaning, and what to do.
        """
        ...

    def doctor(self) -> Mapping[str, Any]:
        """Return facts about this machine's installation: version, availability, reason when missing."""
        ...


class Reference(Protocol):
    """Executes ONNX graphs on the CPU for calibration and verification."""

    def executor(self, model: ir.Model, *, simulate: bool = False) -> Executor:
        """Return an executor of ``model``; with ``simulate``, types the CPU lacks are emulated."""
        ...
