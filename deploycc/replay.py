"""Run again what a folder records: a whole build from its manifest, or the pass of a crash reproducer. Say what drifted."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploycc import reproducer
from deploycc.core.errors import BackendError, BudgetError, UsageError
from deploycc.output import HASHED, digest_file, is_build, is_reproducer
from deploycc.pipeline import build, digests_of
from deploycc.recorded import read_json, request_of
from deploycc.request import Silent, Watcher, resolve

DRIFTED = 3
# Builders are not deterministic: the same program may differ by some bytes of layout.
ENGINE_SIZE_SLACK = 0.01
INPUTS = {"model": "model", "weights": "model", "calibration": "data", "evaluation": "eval", "plan": "plan", "dcn": "dcn"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a replay found, and the exit code: 0 when it came out as recorded, 3 when it did not."""

    text: str
    exit_code: int


def replay(directory: Path, watch: Watcher | None = None) -> Verdict:
    """Replay a build directory or a reproducer.

    Raises:
        UsageError: when the folder is neither, or an input is missing or has changed.
    """
    if is_reproducer(directory):
        repeated = reproducer.repeat(directory)
        return Verdict(str(repeated), DRIFTED if repeated.error else 0)
    if not is_build(directory):
        raise UsageError(f"{directory} is neither a build nor a reproducer", at="DIR", fix="name a directory that deploycc build wrote")
    return _replay_build(directory, watch or Silent())


def _replay_build(directory: Path, watch: Watcher) -> Verdict:
    recorded = read_json(directory, "manifest.json")
    with tempfile.TemporaryDirectory(prefix="deploycc-replay-") as scratch:
        request = replace(request_of(directory), out=Path(scratch, "build"))
        _check_inputs(recorded["inputs"], digests_of(resolve(request, Silent())), directory)
        try:
            build(request, watch)
        except (BackendError, BudgetError) as error:
            if not is_build(request.directory):
                raise
            watch.warn(error.what)
        drifted = [*_outputs(directory, request.directory), *_engines(directory, request.directory)]
        notes = _differences("version of", recorded["versions"], read_json(request.directory, "manifest.json")["versions"])
        other_bytes, told = _engine_bytes(directory, request.directory)
        # Another version of a builder is another builder.
        drifted += other_bytes if not notes else []
        notes += told if notes or not other_bytes else []
    lines = drifted or ["identical: model.onnx, plan.json and scores.json have the same bytes, the engines the same size and operations"]
    return Verdict("\n".join([*lines, *notes]), DRIFTED if drifted else 0)


def _check_inputs(recorded: Mapping[str, Any], found: Mapping[str, Any], directory: Path) -> None:
    changed = [name for name in INPUTS if recorded.get(name) != found.get(name)]
    if changed:
        raise UsageError(
            f"these inputs have changed since the build: {', '.join(changed)}",
            at=str(directory),
            fix="put the files of that time back, or build again",
        )


def _outputs(old: Path, new: Path) -> list[str]:
    """Return which files differ, as they lie on disk."""
    before, after = ({name: digest_file(folder / name) for name in HASHED if (folder / name).exists()} for folder in (old, new))
    return [f"drifted: {name}{_detail(name, old, new)}" for name in HASHED if before.get(name) != after.get(name)]


def _detail(name: str, old: Path, new: Path) -> str:
    if name != "plan.json" or not (old / name).exists():
        return ""
    formats = [{r["name"]: r["format"] for r in read_json(folder, name)["regions"]} for folder in (old, new)]
    moved = [f"{region} {was} -> {formats[1].get(region, 'none')}" for region, was in formats[0].items() if formats[1].get(region) != was]
    return f" ({len(moved)} regions in another format{': ' if moved else ''}{', '.join(moved[:5])})"


def _engines(old: Path, new: Path) -> list[str]:
    """Return which engines differ in their operations, or in size by more than a builder's whim."""
    before, after = ({e["target"]: e for e in read_json(folder, "report.json")["engines"]} for folder in (old, new))
    found = [f"drifted: no engine for {target} this time" for target in before if target not in after]
    for target, engine in before.items():
        again = after.get(target, engine)
        if engine["counts"] != again["counts"]:
            found += _differences(f"drifted: {target}", engine["counts"], again["counts"])
        if abs(again["bytes"] - engine["bytes"]) > ENGINE_SIZE_SLACK * engine["bytes"]:
            found.append(f"drifted: {target} has {again['bytes']} bytes, recorded {engine['bytes']}")
    return found


def _engine_bytes(old: Path, new: Path) -> tuple[list[str], list[str]]:
    """Return which engines have other bytes although their builder is deterministic, and a note on every engine's bytes."""
    before, after = ({e["target"]: e for e in read_json(folder, "report.json")["engines"]} for folder in (old, new))
    drifted, notes = [], []
    for target, engine in before.items():
        is_same = target in after and after[target]["sha256"] == engine["sha256"]
        notes.append(f"engine for {target}: {'the same bytes' if is_same else 'other bytes (builders need not repeat themselves)'}")
        if target in after and not is_same and _is_deterministic(engine):
            drifted.append(f"drifted: {target} has other bytes, though nothing in it leaves the builder a choice")
    return drifted, notes


def _is_deterministic(engine: Mapping[str, Any]) -> bool:
    """Return whether building again gives the same bytes: copies do, and TensorRT-RTX's engines without quantized operations.

    TensorRT times kernels and may choose others; TensorRT-RTX numbers the symbols of quantized convolutions anew.
    """
    backend = engine["target"].partition(":")[0]
    is_quantized = any(kind in label for label in engine["counts"] for kind in ("int8", "fp8", "fp4"))
    return backend == "onnxruntime" or (backend == "tensorrt-rtx" and bool(engine["counts"]) and not is_quantized)


def _differences(what: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    names = sorted({*recorded, *found})
    return [f"{what} {n}: recorded {recorded.get(n, 'none')}, now {found.get(n, 'none')}" for n in names if recorded.get(n) != found.get(n)]
