"""A finished build, read back: what a bundle is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.core.compatibility import parse_compatibility
from deploycc.core.errors import UsageError
from deploycc.core.shapes import Profile, parse_shape
from deploycc.core.target import Target, parse_target
from deploycc.interop import load_model
from deploycc.output import digest_file, is_build

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class BuiltEngine:
    """One engine of a build: its target, its file, the version of its builder (empty for ``onnxruntime``), and its compatibility."""

    target: Target
    path: Path
    version: str
    compatibility: tuple[str, ...] = ()


@dataclass(frozen=True)
class Build:
    """A build directory whose files are those that its manifest and its report record."""

    directory: Path
    report: dict[str, Any]
    manifest: dict[str, Any]
    model: ir.Model
    profiles: tuple[Profile, ...]
    engines: tuple[BuiltEngine, ...]

    @property
    def sqnr_db(self) -> dict[str, float]:
        """Return the measured distance of ``model.onnx`` from the FP32 original, per output."""
        return {row["output"]: float(row["sqnr_db"]) for row in self.report["verification"]}


def read_build(directory: Path) -> Build:
    """Read a build directory and check that its model and its engines are the recorded ones.

    Raises:
        UsageError: when it is no build directory, or a file in it is missing or has changed.
    """
    if not is_build(directory):
        raise UsageError(f"{directory} is no build directory", at="DIR", fix="name a directory that deploycc build wrote")
    manifest, report = (_read(directory / name) for name in ("manifest.json", "report.json"))
    for name, digest in manifest["outputs"].items():
        _check(directory / name, digest)
    rows = report["engines"]
    for row in rows:
        _check(directory / row["path"], row["sha256"])
    targets = [parse_target(row["target"]) for row in rows]
    modes = parse_compatibility(manifest["options"].get("compatibility", ""))
    engines = tuple(BuiltEngine(t, directory / r["path"], r.get("version", ""), modes) for t, r in zip(targets, rows, strict=True))
    profiles = tuple(Profile(name, *(shapes * 3)[:3]) for name, shapes in map(parse_shape, report["model"]["profiles"]))
    return Build(directory, report, manifest, load_model(directory / "model.onnx").model, profiles, engines)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path.name} cannot be read ({error})", at=str(path.parent), fix="build again; the directory is damaged"
        ) from error


def _check(path: Path, digest: str) -> None:
    fix = "build again; only what was verified is bundled"
    if not path.is_file():
        raise UsageError(f"{path.name} is missing", at=str(path), fix=fix)
    if digest_file(path) != digest:
        raise UsageError(f"{path.name} has changed since the build", at=str(path), fix=fix)
