"""Export a PyTorch model to ONNX through ``torch.export``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.core.errors import DeployccError, UsageError
from deploycc.core.shapes import parse_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deploycc.core.plugin import Plugin

DEFAULT_SIZE = (3, 224, 224)
OPSETS = range(18, 24)


def export(
    source: str,
    out: Path,
    *,
    weights: Path | None = None,
    shapes: Sequence[str] = (),
    opset: int = 20,
    plugins: Sequence[Plugin] = (),
) -> Path:
    """Write ``source`` as ONNX to ``out`` and return the path.

    Args:
        source: ``timm:NAME``, ``package.module:function`` or ``file.py:function``; the function returns an ``nn.Module``.
        out: the file to write; weights above 1 GB go to ``OUT.data``.
        weights: a safetensors file; pickled checkpoints are refused.
        shapes: ``NAME=MIN:OPT:MAX`` per input, in the order of the module's arguments. A dimension that varies becomes
            dynamic. Default: one input ``image`` of the module's own size, batch 1 to 16.
        opset: of the exported file.
        plugins: whose operators become nodes of their own, with their bodies in the file.

    Raises:
        UsageError: when the source, the weights or a shape do not fit, or ``torch.export`` refuses the model.
    """
    if out.suffix != ".onnx":
        raise UsageError(f"'{out}' does not end in .onnx", at="--out", fix="name the file MODEL.onnx")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"the folder {out.resolve().parent} does not exist", at="--out", fix="create it first")
    if opset not in OPSETS:
        what = f"PyTorch exports to opset {OPSETS[0]} to {OPSETS[-1]}, not {opset}"
        raise UsageError(what, at="--opset", fix="leave it out; deploycc build reads every opset from 7 to 23")
    module = _module(source)
    if weights is not None:
        _load_weights(module, weights)
    inputs = _inputs(module, shapes)
    _export(module.eval(), inputs, out, opset, source, plugins)
    return out


def _module(source: str) -> Any:
    kind, _, name = source.rpartition(":")
    if not kind or not name:
        raise UsageError(
            f"cannot read the source '{source}'", at="SOURCE", fix="write timm:NAME, package.module:function or file.py:function"
        )
    from torch import nn

    make = partial(_timm, name) if kind == "timm" else _function(kind, name, source)
    try:
        made = make()
    except DeployccError:
        raise
    except Exception as error:
        raise UsageError(
            f"'{source}' failed with {type(error).__name__}: {error}",
            at="SOURCE",
            fix="name a function without arguments that returns the module",
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"'{source}' gave a {type(made).__name__}, not an nn.Module",
            at="SOURCE",
            fix="name a function without arguments that returns the module",
        )
    return made


def _function(place: str, name: str, source: str) -> Callable[[], Any]:
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except DeployccError:
        raise
    except Exception as error:  # Importing runs the user's code, which may raise anything.
        raise UsageError(
            f"'{place}' cannot be imported: {error}", at=f"SOURCE {source}", fix="check the path and that its imports are installed"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise UsageError(
            f"'{place}' has no function '{name}'", at=f"SOURCE {source}", fix=f"its functions are {', '.join(names) or 'none'}"
        )
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> Any:
    if not path.exists():
        raise UsageError(f"{path} does not exist", at="SOURCE", fix="check the path")
    name = f"deploycc_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def _timm(name: str) -> Any:
    declare_torchvision_operators()
    try:
        import timm
    except ImportError as error:
        raise UsageError("timm is not installed", at=f"timm:{name}", fix="pip install 'deploycc[train]'") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise UsageError(f"timm has no model '{name}'", at="SOURCE", fix=f"for example {', '.join(near) or 'resnet50'}")
    # Weights from a hub are a download nobody asked for: give --weights instead.
    return timm.create_model(name, pretrained=False)


def declare_torchvision_operators() -> None:
    """Let torchvision import beside a CPU build of torch, whose binary lacks the operators that torchvision registers fakes for."""
    import torch

    if importlib.util.find_spec("torchvision") is None or hasattr(torch.ops.torchvision, "nms"):
        return
    global _DECLARED
    library: Any = torch.library.Library
    _DECLARED = library("torchvision", "FRAGMENT")
    _DECLARED.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_DECLARED: Any = None


def _load_weights(module: Any, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{path.name} is not a safetensors file",
            at="--weights",
            fix="convert it with safetensors.torch.save_file; pickled checkpoints run code when loaded",
        )
    if not path.exists():
        raise UsageError(f"{path} does not exist", at="--weights", fix="check the path")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        missing, unexpected = module.load_state_dict(load_file(path), strict=False)
    except (RuntimeError, SafetensorError) as error:
        first = " ".join(str(error).split())
        raise UsageError(
            f"the weights cannot be loaded: {first}", at=f"--weights {path}", fix="use weights of this very architecture"
        ) from error
    if missing or unexpected:
        raise UsageError(
            f"the weights do not fit: {len(missing)} missing (first {missing[:3]}), {len(unexpected)} unknown (first {unexpected[:3]})",
            at=f"--weights {path}",
            fix="use weights of this very architecture",
        )


def _inputs(module: Any, shapes: Sequence[str]) -> list[tuple[str, list[tuple[int, ...]]]]:
    if shapes:
        wanted = [parse_shape(text) for text in shapes]
        return [(name, given * 3 if len(given) == 1 else given) for name, given in wanted]
    config = getattr(module, "default_cfg", None) or getattr(module, "pretrained_cfg", {}) or {}
    size = tuple(config.get("input_size", DEFAULT_SIZE)) if isinstance(config, dict) else DEFAULT_SIZE
    return [("image", [(batch, *size) for batch in (1, 8, 16)])]


def _export(
    module: Any, inputs: Sequence[tuple[str, list[tuple[int, ...]]]], out: Path, opset: int, source: str, plugins: Sequence[Plugin]
) -> None:
    import torch

    arguments, dynamic = [], []
    for name, (low, usual, high) in inputs:
        axes = {
            i: torch.export.Dim(f"{name}_{i}" if i else "batch", min=low[i], max=high[i]) for i in range(len(usual)) if low[i] != high[i]
        }
        # An example of one would be specialised to a constant.
        arguments.append(torch.zeros([max(2, d) if i in axes else d for i, d in enumerate(usual)]))
        dynamic.append(axes)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".export-") as folder:
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                module,
                tuple(arguments),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                input_names=[name for name, _ in inputs],
                dynamic_shapes=tuple(dynamic),
                custom_translation_table={k: v for plugin in plugins for k, v in plugin.translations().items()},
            )
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(
                f"torch.export refused the model: {first.strip()}",
                at=f"SOURCE {source}",
                fix="check --shape against what forward() accepts; data-dependent control flow cannot be exported",
            ) from error
        for plugin in plugins:
            plugin.complete(program.model)
        program.save(Path(folder, out.name), external_data=_large(module))
        for part in Path(folder).iterdir():
            part.replace(out.resolve().parent / part.name)


def _large(module: Any) -> bool:
    return bool(sum(p.numel() * p.element_size() for p in module.parameters()) > 1_000_000_000)
