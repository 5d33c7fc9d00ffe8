"""The bundle: everything that a server needs, in one directory that says what it is and proves what it holds.

``bundle.json`` names the variants of the model (an engine per GPU architecture, the ONNX file, the portable ONNX file), what each
requires, the golden outputs that it must reproduce, and the SHA-256 of every file. A server reads nothing that is not listed.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc import __version__, registry
from deploycc.backends.modelfile import copy_model
from deploycc.configuration import read_preprocessing
from deploycc.core.data import Dataset, open_data
from deploycc.core.errors import BackendError, UsageError
from deploycc.interop import load_model
from deploycc.output import BuildDirectory, digest_file
from deploycc.serve import golden, portable
from deploycc.serve.build import Build, BuiltEngine, read_build
from deploycc.serve.golden import FP32_UNIT, TF32_UNIT, Golden
from deploycc.serve.interface import Interface, interface_of
from deploycc.verify.numerics import PERFECT_DB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

SCHEMA = "deploycc.bundle/1"
GOLDEN_SAMPLES = 4
MOST_LABELS = 1_000_000


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """What to bundle: a build directory, where the golden inputs come from, and what only people know about the model."""

    directory: Path
    out: Path | None = None
    data: str | None = None
    labels: Path | None = None
    config: Path | None = None
    plugins: tuple[Path, ...] = ()
    seed: int = 0

    @property
    def bundle(self) -> Path:
        """Return the bundle's directory: ``--out``, or the build's name with ``.bundle``."""
        return self.out or self.directory.resolve().with_suffix(".bundle")


@dataclass
class Bundled:
    """A written bundle: its directory, what ``bundle.json`` says, and what the user should know."""

    directory: Path
    manifest: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def bundle(request: BundleRequest) -> Bundled:
    """Write the bundle of a build; it appears complete or not at all.

    Raises:
        UsageError: when the build is damaged, or the data, labels or plugins do not fit it.
        BackendError: when the model does not reproduce its own golden outputs.
    """
    place = BuildDirectory(request.bundle, file="bundle.json", schema=SCHEMA)
    place.check()
    build = read_build(request.directory)
    with place.staged() as folder:
        result = _write(request, build, folder)
    result.directory = place.path
    return result


def _write(request: BundleRequest, build: Build, folder: Path) -> Bundled:
    interface = interface_of(build.model, build.profiles)
    feeds, source = _golden_inputs(request, build, interface)
    reference = registry.backend("onnxruntime")
    names = [o.name for o in interface.outputs]
    executor = reference.executor(build.model, simulate=True)
    outputs = golden.run(executor, feeds, names)
    notes: list[str] = []
    if interface.batch and (mixing := _mixes_samples(executor, feeds, outputs)):
        notes.append(f"requests are not joined into batches: {mixing}")
        interface = Interface(interface.inputs, interface.outputs, None)
    plugins = [_plugin(path, folder) for path in request.plugins or _recorded_plugins(build)]
    variants = [_engine_variant(e, build, plugins, outputs, folder) for e in build.engines if e.target.backend != "onnxruntime"]
    variants += _onnx_variants(build, feeds, outputs, folder, notes)
    manifest = {
        "schema": SCHEMA,
        "deploycc": __version__,
        "name": _name(build),
        "source": {"model": build.manifest["inputs"]["model"], "precision": build.report["request"]["precision"]},
        **interface.rows(),
        "variants": variants,
        "golden": {"inputs": _saved(feeds, folder, "input"), "samples": len(next(iter(feeds.values()))), "source": source},
        "labels": _labels(request, folder),
        "preprocessing": read_preprocessing(request.config),
    }
    manifest["files"] = _hashes(folder)
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (folder / "bundle.json").write_text(text)
    return Bundled(folder, json.loads(text), notes)


def _golden_inputs(request: BundleRequest, build: Build, interface: Interface) -> tuple[dict[str, np.ndarray], str]:
    """Return a few samples of the data that the build was calibrated with, or synthetic ones where that cannot be found."""
    most = interface.batch[2] if interface.batch else GOLDEN_SAMPLES
    data = _open(request, build).take(min(GOLDEN_SAMPLES, most))
    feeds = next(data.batches(min(GOLDEN_SAMPLES, most)))
    return feeds, "synthetic" if data.synthetic else Path(data.source).name


def _open(request: BundleRequest, build: Build) -> Dataset:
    paths = build.manifest.get("paths") or {}
    beside = Path(str(paths.get("model", ""))).with_suffix(".calib.npz") if paths.get("model") else None
    recorded = paths.get("data") if request.config is not None or Path(str(paths.get("data"))).is_file() else None
    spec = request.data or recorded or (str(beside) if beside and beside.is_file() else f"synthetic:{GOLDEN_SAMPLES}")
    return open_data(spec, build.model.graph.inputs, build.profiles, seed=request.seed, preprocessing=read_preprocessing(request.config))


def _mixes_samples(executor: Any, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> str:
    """Return how the first sample's outputs depend on the others in its batch, or nothing when they do not."""
    alone = executor({name: array[:1] for name, array in feeds.items()}, list(outputs))
    least = golden.rounding_limit_db(1000, TF32_UNIT)
    for name, value in outputs.items():
        if len(value) != len(next(iter(feeds.values()))):
            return f"output '{name}' has {len(value)} rows for {len(next(iter(feeds.values())))} samples"
        if golden.sqnr_db(value[:1], alone[name]) < least:
            return f"output '{name}' of a sample depends on the other samples of its batch"
    return ""


def _engine_variant(engine: BuiltEngine, build: Build, plugins: Sequence[str], outputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    path = f"engines/{engine.path.name}"
    (folder / "engines").mkdir(exist_ok=True)
    shutil.copyfile(engine.path, folder / path)
    limits = golden.limits(build.sqnr_db, nodes=len(build.model.graph), unit=TF32_UNIT)
    if not (engine.target.archs and engine.version):
        what = f"the build does not say which GPU and which version {engine.path.name} is for"
        raise UsageError(what, at=str(build.directory), fix="build again with this version of deploycc")
    requires = {
        "version": engine.version,
        "archs": list(engine.target.archs),
        "plugins": list(plugins),
        "compatible": list(engine.compatibility),
    }
    return {
        "kind": engine.target.backend,
        "path": path,
        "requires": requires,
        "golden": _golden_rows(Golden(outputs, limits), folder, "model"),
    }


def _onnx_variants(
    build: Build, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], folder: Path, notes: list[str]
) -> list[dict[str, Any]]:
    """Write model.onnx and its portable form, each checked against its golden outputs as it will be served."""
    variants = []
    expected = Golden(outputs, golden.limits(build.sqnr_db, nodes=len(build.model.graph), unit=FP32_UNIT))
    copy_model(build.directory / "model.onnx", folder / "model.onnx")
    try:
        _must_reproduce(build.model, feeds, expected)
        variants.append({"kind": "onnx", "path": "model.onnx", "golden": _golden_rows(expected, folder, "model")})
    except BackendError as error:
        notes.append(f"model.onnx is not served by ONNX Runtime: {error.what}")
    path = folder / "portable.onnx"
    try:
        if note := portable.write_portable(build.model, path):
            notes.append(f"portable.onnx is {note}")
        wide = load_model(path).model
        executor = registry.backend("onnxruntime").executor(wide)
        perfect = dict.fromkeys(outputs, PERFECT_DB)
        own = Golden(golden.run(executor, feeds, list(outputs)), golden.limits(perfect, nodes=len(wide.graph), unit=FP32_UNIT))
        variants.append({"kind": "onnx-fp32", "path": "portable.onnx", "golden": _golden_rows(own, folder, "portable")})
    except BackendError as error:
        path.unlink(missing_ok=True)
        notes.append(f"there is no portable form: {error.what}")
    return variants


def _must_reproduce(model: ir.Model, feeds: Mapping[str, np.ndarray], expected: Golden) -> None:
    found = registry.backend("onnxruntime").executor(model)(feeds, list(expected.outputs))
    if missed := golden.check(expected, found):
        raise BackendError("; ".join(missed), at="golden outputs", fix="build again, and report the model if that does not help")


def _golden_rows(expected: Golden, folder: Path, what: str) -> list[dict[str, Any]]:
    files = _saved(expected.outputs, folder, f"{what}-output")
    return [{"output": name, "path": files[name], "minimum_sqnr_db": db} for name, db in expected.minimum_sqnr_db.items()]


def _saved(arrays: Mapping[str, np.ndarray], folder: Path, prefix: str) -> dict[str, str]:
    return {name: f"golden/{file}" for name, file in golden.save(arrays, folder / "golden", prefix).items()}


def _plugin(path: Path, folder: Path) -> str:
    if not path.is_file():
        raise UsageError(f"the plugin library {path} does not exist", at="--plugin", fix="build it first; see plugins_trt")
    (folder / "plugins").mkdir(exist_ok=True)
    shutil.copyfile(path, folder / "plugins" / path.name)
    return f"plugins/{path.name}"


def _recorded_plugins(build: Build) -> list[Path]:
    """Return the plugin library that the engines were built with, which must be the one of that time."""
    digest = build.manifest["inputs"].get("dcn")
    if digest is None:
        return []
    library = Path(build.manifest["options"]["dcn"])
    if not library.is_file() or digest_file(library) != digest:
        what = f"the plugin library {library} that the engines were built with is missing or has changed"
        raise UsageError(what, at=str(build.directory), fix="name it with --plugin, or build again")
    return [library]


def _labels(request: BundleRequest, folder: Path) -> str | None:
    if request.labels is None:
        return None
    try:
        lines = request.labels.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the labels cannot be read ({error})", at="--labels", fix="give a text file with one label per line") from error
    if not 0 < len(lines) <= MOST_LABELS:
        raise UsageError(f"{len(lines)} labels", at="--labels", fix="give a text file with one label per line")
    (folder / "labels.txt").write_text("\n".join(lines) + "\n")
    return "labels.txt"


def _name(build: Build) -> str:
    """Return the model's name as it stands in URLs and folders: letters, digits, dot, dash and underscore."""
    stem = Path(build.report["model"]["path"]).stem
    return re.sub(r"[^A-Za-z0-9_.-]", "_", stem).lstrip(".") or "model"


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): {"sha256": digest_file(p), "bytes": p.stat().st_size} for p in files}
