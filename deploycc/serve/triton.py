"""A Triton model repository from a bundle: ``NAME/config.pbtxt`` and ``NAME/1/`` for TensorRT, ``NAME_onnx`` for ONNX Runtime.

Shapes come from the optimization profiles of the build. One directory serves a mixed fleet: ``cc_model_filenames`` maps the
compute capability of the GPU to its engine. Triton has no backend for TensorRT-RTX engines; those are served by the C++ runner.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.core.compatibility import AMPERE_PLUS, VERSION
from deploycc.core.errors import UsageError
from deploycc.output import BuildDirectory
from deploycc.serve.pbtxt import Word, write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycc.serve.bundle import Bundled

BACKENDS = {"tensorrt": "tensorrt", "onnx": "onnxruntime"}
SCHEMA = "deploycc.bundle/1"
QUEUE_DELAY_US = 500

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """Copies of the model per device, and whether TensorRT replays CUDA graphs (for the batch sizes of the profile)."""

    instances: int = 1
    cuda_graphs: bool = True


def write_repository(bundled: Bundled, repository: Path, options: TritonOptions) -> list[Path]:
    """Write the models of a bundle into ``repository``, each complete or not at all; a model of that name written before is replaced.

    Returns:
        The directories of the models. Notes for the user are added to ``bundled.notes``.

    Raises:
        UsageError: when the bundle has nothing that Triton runs, or a directory of that name is not ours.
    """
    if options.instances < 1:
        raise UsageError(f"{options.instances} instances", at="--instances", fix="give 1 or more")
    manifest, written = bundled.manifest, []
    for kind in BACKENDS:
        variants = [v for v in manifest["variants"] if v["kind"] == kind]
        if variants:
            written.append(_write_model(bundled, repository, kind, variants, options))
    if any(v["kind"] == "tensorrt-rtx" for v in manifest["variants"]):
        bundled.notes.append("Triton has no backend for TensorRT-RTX engines: use examples/serve_cpp for them, or build for tensorrt")
    if not written:
        raise UsageError("nothing in this build runs in Triton", at="--triton", fix="build with --target tensorrt or --target onnxruntime")
    return written


def _write_model(bundled: Bundled, repository: Path, kind: str, variants: Sequence[Row], options: TritonOptions) -> Path:
    name = bundled.manifest["name"] + ("_onnx" if kind == "onnx" else "")
    place = BuildDirectory(repository / name, file="bundle.json", schema=SCHEMA)
    with place.staged() as folder:
        (folder / "1").mkdir()
        files = {v["path"]: Path(v["path"]).name for v in variants}
        for path, file in files.items():
            shutil.copyfile(bundled.directory / path, folder / "1" / file)
        for extra in _extras(bundled, variants):
            target = folder / "1" / extra.name if extra.name.endswith(".onnx.data") else folder / extra.relative_to(bundled.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(extra, target)
        (folder / "config.pbtxt").write_text(write(config(bundled.manifest, name, kind, variants, options)))
    if plugins := sorted({p for v in variants for p in v.get("requires", {}).get("plugins", [])}):
        libraries = ";".join(str(place.path / p) for p in plugins)
        bundled.notes.append(f"start Triton with --backend-config=tensorrt,plugins='{libraries}'")
    if any(VERSION in _modes(v) for v in variants):
        bundled.notes.append("start Triton with --backend-config=tensorrt,version-compatible=true, which lets engines bring their runtime")
    return place.path


def _extras(bundled: Bundled, variants: Sequence[Row]) -> list[Path]:
    """Return what lies beside a model: the bundle's manifest, labels, plugins, external weights."""
    names = ["bundle.json", bundled.manifest["labels"], *(p for v in variants for p in v.get("requires", {}).get("plugins", []))]
    names += [v["path"] + ".data" for v in variants if v["path"] + ".data" in bundled.manifest["files"]]
    return [bundled.directory / name for name in dict.fromkeys(names) if name]


def config(manifest: Mapping[str, Any], name: str, kind: str, variants: Sequence[Row], options: TritonOptions) -> Row:
    """Return ``config.pbtxt`` as a message of Triton's schema ``inference.ModelConfig``."""
    batch = manifest["batch"]
    outputs = [_tensor(o, batch) for o in manifest["outputs"]]
    for row, output in zip(outputs, manifest["outputs"], strict=True):
        if manifest["labels"] and len(output["shape"]) == 2:
            row["label_filename"] = manifest["labels"]
    message: Row = {
        "name": name,
        "backend": BACKENDS[kind],
        "max_batch_size": batch["maximum"] if batch else 0,
        # What serves GPUs that none of cc_model_filenames is for.
        "default_model_filename": Path(next((v for v in variants if AMPERE_PLUS in _modes(v)), variants[0])["path"]).name,
        "input": [_tensor(i, batch) for i in manifest["inputs"]],
        "output": outputs,
    }
    if kind == "tensorrt":
        message["cc_model_filenames"] = _by_capability(variants)
    if batch:
        preferred = sorted({batch["optimum"], batch["maximum"]})
        message["dynamic_batching"] = {"preferred_batch_size": preferred, "max_queue_delay_microseconds": QUEUE_DELAY_US}
    on_gpu = {"count": options.instances, "kind": Word("KIND_GPU"), "profile": ["0"]}
    message["instance_group"] = [on_gpu if kind == "tensorrt" else {"count": options.instances, "kind": Word("KIND_CPU")}]
    if kind == "tensorrt" and options.cuda_graphs:
        message["optimization"] = {"cuda": {"graphs": True, "graph_spec": [_graph(manifest, size) for size in _sizes(batch)]}}
    message["model_warmup"] = [_warmup(manifest, size) for size in _sizes(batch)]
    return message


def _tensor(spec: Mapping[str, Any], batch: Mapping[str, Any] | None) -> Row:
    dims = spec["shape"][1:] if batch else spec["shape"]
    row: Row = {"name": spec["name"], "data_type": _datatype(spec)}
    if dims:
        return row | {"dims": list(dims)}
    # A batch of scalars: Triton wants a dimension, and takes it away again.
    return row | {"dims": [1], "reshape": {}}


def _datatype(spec: Mapping[str, Any]) -> Word:
    return Word("TYPE_" + spec["datatype"])


def _modes(variant: Row) -> list[str]:
    return list(variant.get("requires", {}).get("compatible", []))


def _by_capability(variants: Sequence[Row]) -> list[Row]:
    """Return which engine serves which compute capability, written as Triton does: sm_89 is 8.9, sm_120 is 12.0."""
    pairs = [(arch.removeprefix("sm_"), Path(v["path"]).name) for v in variants for arch in v["requires"]["archs"]]
    return [{"key": f"{digits[:-1]}.{digits[-1]}", "value": file} for digits, file in pairs]


def _sizes(batch: Mapping[str, Any] | None) -> list[int]:
    """Return the batch sizes to prepare for: one request alone, the usual batch, the full one."""
    return sorted({batch["minimum"], batch["optimum"], batch["maximum"]}) if batch else [0]


def _dims(spec: Mapping[str, Any], size: int) -> list[int]:
    return list(spec["optimum"][1:] if size else spec["optimum"])


def _graph(manifest: Mapping[str, Any], size: int) -> Row:
    shapes = [{"key": i["name"], "value": {"dim": _dims(i, size)}} for i in manifest["inputs"]]
    return {"batch_size": size, "input": shapes}


def _warmup(manifest: Mapping[str, Any], size: int) -> Row:
    inputs = [
        {"key": i["name"], "value": {"data_type": _datatype(i), "dims": _dims(i, size) or [1], "zero_data": True}}
        for i in manifest["inputs"]
    ]
    return {"name": f"batch of {size}" if size else "one request", "batch_size": size, "inputs": inputs}
