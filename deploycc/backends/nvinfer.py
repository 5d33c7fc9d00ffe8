"""Build an engine with a TensorRT module, whichever it is: TensorRT 10, TensorRT 11 or TensorRT for RTX.

The parent's half (`build`) sends a request to a child process, because the compiler can crash, hang and swallow Ctrl-C; the
child's half (`build_in_child`) parses, builds and writes the engine. Precision is in the graph, so there is no option for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.backends.memory import peak_rss_mb
from deploycc.backends.messages import clean, explain, is_harmless
from deploycc.backends.modelfile import copy_model, count_nodes
from deploycc.core import child
from deploycc.core.compatibility import AMPERE_PLUS, SAME_ARCH, VERSION
from deploycc.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from deploycc.core.backend import BuildOptions, Engine
    from deploycc.core.shapes import Profile
    from deploycc.core.target import Target

ENTRY = "deploycc.backends.nvinfer:build_in_child"
LONGEST = 6 * 3600.0


def time_budget(nodes: int, *, base: float) -> float:
    """Return the seconds a build may take: the time grows with the square of the node count.

    1000 quantized MatMul and Relu nodes took 10 s, 2000 took 34 s on two slow cores; the budget is about thirty times that.
    """
    return min(base + nodes**2 / 1000, LONGEST)


def build(
    module: str,
    model: Path,
    target: Target,
    *,
    out: Path,
    profiles: Sequence[Profile],
    options: BuildOptions,
    base: float,
    archs: tuple[str, ...] = (),
) -> Engine:
    """Build ``model`` with the TensorRT module called ``module`` into ``out``.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        model: an ONNX file, with its external data beside it.
        target: recorded in the engine.
        out: the engine file; it is written completely or not at all.
        profiles: one per input.
        options: a time-out other than the default is taken as given; the default grows with the number of nodes.
        base: seconds that even the smallest model may take.
        archs: architectures to compile for ahead of time (TensorRT-RTX only).

    Raises:
        BackendError: with the meaning of the builder's message, the ONNX node where it is known, and what to do.
    """
    # Imported here because the child imports this module too, and the graph library would cost it time and memory.
    from deploycc.core.backend import Engine

    if importlib.util.find_spec(module) is None:
        raise BackendError(
            f"the Python module '{module}' is not installed", at=f"target {target}", fix="install it, or choose another --target"
        )
    seconds = options.timeout if options.timeout is not None else time_budget(count_nodes(model), base=base)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        request = _request(module, model, Path(scratch).resolve(), profiles, options, archs)
        answer = _answer(request, model, out, target, seconds)
        Path(scratch, "engine").replace(out)
    told, version = tuple(_warnings(answer["log"])), answer["version"]
    return Engine(target, out, answer["bytes"], answer["seconds"], answer["peak_rss_mb"], warnings=told, version=version)


def _request(
    module: str, model: Path, scratch: Path, profiles: Sequence[Profile], options: BuildOptions, archs: tuple[str, ...]
) -> dict[str, Any]:
    """Return what the child needs to know, as JSON-able data."""
    return {
        "module": module,
        "model": str(model.resolve()),
        "partial": str(scratch / "engine"),
        "stderr": str(scratch / "stderr"),
        "archs": list(archs),
        "shapes": {p.name: [list(p.minimum), list(p.optimum), list(p.maximum)] for p in profiles},
        "workspace": options.workspace,
        "dcn": options.dcn if module == "tensorrt" else "body",
        "compatibility": list(options.compatibility),
    }


def _answer(request: dict[str, Any], model: Path, out: Path, target: Target, seconds: float) -> dict[str, Any]:
    """Return the child's answer, or raise what its failure means."""
    at = f"{model.name} for {target}"
    try:
        answer = child.call(ENTRY, request, timeout=seconds)
    except child.ChildTimedOut:
        fix = "raise the time-out, or build a smaller model (the time grows with the square of the node count)"
        raise BackendError(f"the build was stopped after {seconds:.0f} s", at=at, fix=fix) from None
    except child.ChildCrashed as error:
        raise _crash(error, request, model, out, at) from None
    except child.ChildError as error:
        raise BackendError(f"the build failed: {error.kind}: {error.message}", at=at, fix="report this message") from None
    if "failures" in answer:
        raise failure(answer["failures"], answer["log"], at=at)
    return answer


def _crash(error: child.ChildCrashed, request: Mapping[str, Any], model: Path, out: Path, at: str) -> BackendError:
    """Write a reproducer of a crash and return the error that names it."""
    folder = out.with_name(out.name + ".reproducer")
    copy_model(model, folder / "model.onnx")
    order = {**request, "model": "model.onnx", "partial": "model.engine", "stderr": "stderr.txt"}
    (folder / "request.json").write_text(json.dumps({"entry": ENTRY, "request": order}, indent=1) + "\n")
    said = Path(request["stderr"])
    text = " ".join([error.output, said.read_text(errors="replace") if said.exists() else ""]).strip()
    (folder / "stderr.txt").write_text(text + "\n")
    last = f"; its last words were: {clean(text)[-300:]}" if text else ""
    what = f"the TensorRT compiler crashed ({error.kind}); deploycc is unharmed{last}"
    return BackendError(
        what, at=at, fix=f"check the model with onnx.checker.check_model(path, full_check=True); a reproducer is in {folder}"
    )


def failure(failures: Sequence[Mapping[str, str]], log: Sequence[Sequence[str]], *, at: str) -> BackendError:
    """Return the error that explains why the parser or the builder refused a model.

    Args:
        failures: per failure ``text`` and, from the parser, ``node``, ``op`` and ``code``.
        log: pairs of severity and line, the second source of messages.
        at: the model and the target.
    """
    texts = [{"text": line} for severity, line in log if severity != "WARNING" and clean(line)]
    explained = [(explain(f"{f.get('code', '')}: {f['text']}" if "code" in f else f["text"]), f) for f in [*failures, *texts]]
    if not explained:
        return BackendError("TensorRT failed without a message", at=at, fix="report it with the model")
    meaning, source = next((pair for pair in explained if pair[0].known), explained[0])
    said = clean(source["text"])
    said_more = f" (TensorRT says: {said})" if " " in said else ""
    what = f"{meaning.what}{said_more}" if meaning.known else f"TensorRT refused the model: {said}"
    more = f"; {len(failures) - 1} more nodes were refused" if len(failures) > 1 else ""
    place = _place(source, meaning.node, log)
    fix = meaning.fix or "the message is TensorRT's own: look the node up in report.md, and report it with the model if it is not at fault"
    return BackendError(what, at=f"{place} in {at}{more}" if place else at, fix=fix)


def _place(source: Mapping[str, str], node: str, log: Sequence[Sequence[str]]) -> str:
    """Return words for the node of a failure: its name, else the value it makes."""
    op = f" ({source['op']})" if source.get("op") else ""
    if name := source.get("node") or node:
        return f"node '{name}'{op}"
    made = re.findall(r'parsing node number (\d+) \[\S+ -> "([^"]*)"', " ".join(line for _, line in log))
    value = dict(made).get(source.get("index", ""))
    return f"the node that makes '{value}'{op}" if value else ""


def _warnings(log: Sequence[Sequence[str]]) -> list[str]:
    """Return the distinct lines worth showing: what is left after cleaning, in order."""
    lines = (clean(line) for _, line in log if not is_harmless(line))
    return list(dict.fromkeys(line for line in lines if line))


def build_in_child(request: Mapping[str, Any]) -> dict[str, Any]:
    """Parse, build and write an engine: the child's side of `build`.

    Args:
        request: ``module``, ``model``, ``partial`` (file to write), ``stderr`` (file that receives what native code prints),
            ``archs``, ``shapes`` (name to three shapes), ``workspace`` (bytes or null), ``dcn``, ``compatibility``.

    Returns:
        ``bytes``, ``seconds``, ``peak_rss_mb``, ``version`` and ``log``; or ``failures`` and ``log``.
    """
    with Path(request["stderr"]).open("ab") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())
    start = time.perf_counter()
    # The module itself, not Polygraphy: its exceptions say "see log" where the parser's errors carry the node and the reason.
    trt = importlib.import_module(request["module"])
    log: list[tuple[str, str]] = []
    failures = compile_engine(trt, request, _logger(trt, log))
    written = Path(request["stderr"]).read_text(errors="replace")
    log += [("STDERR", line) for line in written.splitlines() if line.strip()]
    if failures is not None:
        return {"failures": failures, "log": log}
    seconds, size = time.perf_counter() - start, Path(request["partial"]).stat().st_size
    return {"bytes": size, "seconds": seconds, "peak_rss_mb": peak_rss_mb(), "version": trt.__version__, "log": log}


def compile_engine(trt: ModuleType, request: Mapping[str, Any], logger: Any) -> list[dict[str, str]] | None:
    """Write the engine to ``request["partial"]``; return None, or the failures (an empty list when only the log knows)."""
    builder = trt.Builder(logger)
    flags, dcn = network_flags(trt), request.get("dcn", "body")
    if dcn == "aot":
        flags |= compile_plugins_ahead(trt)
    elif dcn != "body" and not load_library(trt, dcn):
        return [{"text": f"the plugin library {dcn} was not loaded"}]
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        return [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
    allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    set_archs(trt, config, request["archs"])
    set_compatibility(trt, config, request.get("compatibility", ()))
    add_profile(builder, network, config, request["shapes"])
    with Path(request["partial"]).open("wb") as stream:
        # The stream form saves one copy of the weights in memory; early releases of TensorRT 10 lack it.
        if hasattr(builder, "build_serialized_network_to_stream"):
            is_built = builder.build_serialized_network_to_stream(network, config, _writer(trt, stream))
        else:
            is_built = (serialized := builder.build_serialized_network(network, config)) is not None and stream.write(serialized)
    return None if is_built else []


def network_flags(trt: ModuleType) -> int:
    """Return the creation flags of a strongly typed network: a flag in TensorRT 10, the only kind since 11."""
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    is_ten = trt.__name__ == "tensorrt" and trt.__version__.split(".")[0] == "10"
    return 1 << int(strongly_typed) if is_ten and strongly_typed is not None else 0


def load_library(trt: ModuleType, path: str) -> bool:
    """Register the plugins of a library; return whether there are more than before."""
    registry = trt.get_plugin_registry()
    before = len(registry.all_creators)
    registry.load_library(path)
    return len(registry.all_creators) > before


def compile_plugins_ahead(trt: ModuleType) -> int:
    """Register every plugin that can be compiled into the engine, and return the creation flag that prefers them."""
    from deploycc.backends.tensorrt import present_arch

    for point in importlib.metadata.entry_points(group="deploycc.plugins"):
        point.load()().compile_ahead(importlib.import_module(f"{trt.__name__}.plugin"), arch=f"sm_{present_arch()}")
    return 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)


def set_archs(trt: ModuleType, config: Any, archs: Sequence[str]) -> None:
    """Let ``config`` compile for ``archs``, each written ``sm_89``."""
    if archs:
        config.num_compute_capabilities = len(archs)
    for index, arch in enumerate(archs):
        config.set_compute_capability(getattr(trt.ComputeCapability, arch.replace("sm_", "SM")), index)


def set_compatibility(trt: ModuleType, config: Any, modes: Sequence[str]) -> None:
    """Let the engine run under later versions of TensorRT or on other GPUs (``deploycc.core.compatibility``)."""
    if VERSION in modes:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    for mode, level in ((AMPERE_PLUS, "AMPERE_PLUS"), (SAME_ARCH, "SAME_COMPUTE_CAPABILITY")):
        if mode in modes:
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)


def add_profile(builder: Any, network: Any, config: Any, shapes: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Add one optimization profile with the shapes of every dynamic input of ``network``."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape) and tensor.name in shapes]
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name in dynamic:
        profile.set_shape(name, *(tuple(shape) for shape in shapes[name]))
    config.add_optimization_profile(profile)


def allow_decomposed_attention(trt: ModuleType, network: Any) -> None:
    """Let TensorRT fall back to separate kernels where the ONNX op ``Attention`` has no fused one."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    layers = (network.get_layer(i) for i in range(network.num_layers)) if kind is not None else ()
    for layer in layers:
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _parser_error(error: Any) -> dict[str, str]:
    place = {"node": error.node_name(), "op": error.node_operator(), "index": str(error.node())}
    return {"text": error.desc(), "code": error.code().name, **place}


def _logger(trt: ModuleType, log: list[tuple[str, str]]) -> Any:
    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (self.WARNING, self.ERROR, self.INTERNAL_ERROR):
                log.append((severity.name, message))

    return Collector()


def _writer(trt: ModuleType, stream: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return int(stream.write(data))

    return Writer()
