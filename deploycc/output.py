"""The build directory: written to a temporary sibling, renamed when complete; and its manifest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MANIFEST_SCHEMA = "deploycc.manifest/1"
REPRODUCER_SCHEMA = "deploycc.reproducer/1"
PACKAGES = ("deploycc", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "polygraphy", "scipy", "tensorrt", "tensorrt-rtx", "torch")
HASHED = ("model.onnx", "model.onnx.data", "plan.json", "scores.json")


@dataclass(frozen=True, slots=True)
class BuildDirectory:
    """Where a build goes; or, with another file and schema to know it by, something else that must appear as a whole."""

    path: Path
    file: str = "manifest.json"
    schema: str = MANIFEST_SCHEMA

    def check(self) -> None:
        """Refuse a place that cannot be written, or that holds something other than a build.

        Raises:
            UsageError: naming the path.
        """
        with self._explained():
            self._check()

    def _check(self) -> None:
        path, parent = self.path, self.path.resolve().parent
        if path.resolve() in (here := Path.cwd(), *here.parents):
            raise UsageError(f"{path.resolve()} is or holds the working directory", at="--out", fix="name a directory in it or beside it")
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file", at="--out", fix="name a directory that does not exist yet")
        if path.is_dir() and any(path.iterdir()) and not has_schema(path / self.file, self.schema):
            raise UsageError(
                f"{path} is not empty and not a build directory", at="--out", fix="choose another directory; deploycc replaces only its own"
            )
        existing = next(p for p in (parent, *parent.parents) if p.exists())
        if not os.access(existing, os.W_OK) or not existing.is_dir():
            raise UsageError(f"{existing} is not writable", at="--out", fix="choose a directory you may write to")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"{self.path} cannot be written ({error.strerror or error})"
            raise UsageError(what, at="--out", fix="choose a directory you may write to") from error

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Yield a temporary sibling that replaces the directory when the block ends well, and vanishes when it does not."""
        self.check()
        parent = self.path.resolve().parent
        with self._explained():
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=parent))
        folder.chmod(0o755)
        try:
            yield folder
            self._replace(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _replace(self, folder: Path) -> None:
        target = self.path.resolve()
        if not target.exists():
            folder.rename(target)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.rename(old / "build")
        try:
            folder.rename(target)
        except BaseException:
            (old / "build").rename(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def is_build(path: Path) -> bool:
    """Return whether ``path`` holds a complete build."""
    return has_schema(path / "manifest.json", MANIFEST_SCHEMA)


def is_reproducer(path: Path) -> bool:
    """Return whether ``path`` holds the reproducer of a crash."""
    return has_schema(path / "reproducer.json", REPRODUCER_SCHEMA)


def has_schema(path: Path, schema: str) -> bool:
    """Return whether a file is JSON of that schema."""
    try:
        return bool(json.loads(path.read_text()).get("schema") == schema)
    except (OSError, ValueError, AttributeError):
        return False


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, *, inputs: Mapping[str, Any], options: Mapping[str, Any], paths: Mapping[str, Any] | None = None) -> None:
    """Write ``manifest.json``: what went in, what came out, and the versions in between. Same inputs, same bytes.

    ``paths`` are those of the inputs as the user gave them, for `deploycc replay`. Engines are not listed, since builders are not
    deterministic: their hashes are in ``engines/SHA256SUMS``.
    """
    body = {
        "schema": MANIFEST_SCHEMA,
        "inputs": dict(inputs),
        "options": dict(options),
        "paths": dict(paths or {}),
        "outputs": {name: digest_file(folder / name) for name in HASHED if (folder / name).exists()},
        "versions": versions(),
    }
    (folder / "manifest.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    engines = sorted(p for p in (folder / "engines").iterdir() if p.is_file())
    sums = "".join(f"{digest_file(p)}  {p.name}\n" for p in engines)
    (folder / "engines" / "SHA256SUMS").write_text(sums)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
