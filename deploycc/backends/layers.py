"""Times of an engine's layers, measured on a GPU: Polygraphy loads and runs the engine, TensorRT's profiler times each layer."""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploycc.backends.listing import engine_version
from deploycc.core import child
from deploycc.core.errors import BackendError

ENTRY = "deploycc.backends.layers:measure_in_child"
TIMEOUT = 600.0
WARM_UP = 10
_SEPARATOR = re.compile(r"[\x1f\x1e,]| \+ ")
_TAG = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine: its name, the ONNX nodes it computes, the types the inspector shows, and its median time."""

    name: str
    nodes: tuple[str, ...]
    types: str
    microseconds: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """The layers of one engine in the order of execution, and the GPU and shapes they were timed with."""

    layers: tuple[Layer, ...]
    device: str
    shapes: Mapping[str, tuple[int, ...]]
    runs: int


def module_of(engine: Path) -> str:
    """Return the Python module that loads ``engine``: engines of TensorRT-RTX and of TensorRT begin with different letters."""
    with engine.open("rb") as stream:
        return "tensorrt_rtx" if engine_version(stream.read(64)) else "tensorrt"


def measure(engine: Path, known: Iterable[str], *, runs: int, hosts_code: bool = False, timeout: float = TIMEOUT) -> Measurement:
    """Run ``engine`` with random inputs of its usual shapes and time each layer.

    Args:
        engine: a serialized engine, ours or anybody's.
        known: names of ONNX nodes to look for in the layers' names.
        runs: timed inferences, after ten to warm up. TensorRT runs layers one by one while it times them.
        hosts_code: whether the engine may bring code of its own, as a version-compatible one of ours does.
        timeout: seconds until the child is killed.

    Raises:
        BackendError: when the engine cannot be loaded or run here.
    """
    request = {"module": module_of(engine), "engine": str(engine.resolve()), "runs": runs, "hosts_code": hosts_code}
    try:
        answer = child.call(ENTRY, request, timeout=timeout)
    except child.ChildError as error:
        what = f"the engine cannot be profiled: {error.kind}: {' '.join(error.message.split())[:400]}"
        fix = f"run on a GPU that the engine was built for, with the same version of {request['module']}"
        raise BackendError(what, at=str(engine), fix=fix) from None
    return assemble(answer, known)


def assemble(answer: Mapping[str, Any], known: Iterable[str]) -> Measurement:
    """Join times with what the inspector says of each layer."""
    nodes, details = frozenset(known), {d["Name"]: d for d in answer["layers"] if isinstance(d, dict)}
    layers = tuple(
        Layer(name, nodes_of(name, details.get(name, {}), nodes), _types(details.get(name, {})), 1e3 * statistics.median(times))
        for name, times in answer["milliseconds"].items()
    )
    return Measurement(layers, answer["device"], {k: tuple(v) for k, v in answer["shapes"].items()}, answer["runs"])


def nodes_of(name: str, details: Mapping[str, Any], known: frozenset[str]) -> tuple[str, ...]:
    """Return the ONNX nodes of a layer: from the inspector's metadata, else from the parts of its name.

    Fused layers are called ``a + b`` or ``PWN(a, b)``, large ones ``{ForeignNode[a...b]}``; parts that are no known node are left out.
    """
    tagged = _TAG.findall(str(details.get("Metadata", "")))
    parts = tagged or _SEPARATOR.split(re.sub(r"PWN\(|[(){}\[\]]|ForeignNode|\.\.\.", ",", name))
    return tuple(dict.fromkeys(part for part in (p.strip() for p in parts) if part in known))


def _types(details: Mapping[str, Any]) -> str:
    """Return the formats of a layer's inputs as the inspector writes them, shortened to their types."""
    texts = [str(t.get("Format/Datatype", t.get("Datatype", ""))) for t in details.get("Inputs", ()) if isinstance(t, Mapping)]
    return " x ".join(dict.fromkeys(t.split()[-1] if t else "?" for t in texts))


def measure_in_child(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load, run and time: the child's side of `measure`."""
    import numpy as np

    trt, engine = load_engine(request)
    from polygraphy.backend.trt import TrtRunner

    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    shapes = {n: _usual_shape(engine, n) for n in inputs}
    draw = np.random.default_rng(0)
    feeds = {n: draw.standard_normal(s).astype(trt.nptype(engine.get_tensor_dtype(n))) for n, s in shapes.items()}
    context = engine.create_execution_context()
    times: dict[str, list[float]] = {}
    context.profiler = _profiler(trt, times)
    with TrtRunner(context) as runner:
        for index in range(WARM_UP + request["runs"]):
            if index == WARM_UP:
                times.clear()
            runner.infer(feeds, check_inputs=index == 0)
    information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(information).get("Layers", [])
    return {"milliseconds": times, "layers": layers, "device": _device(), "shapes": shapes, "runs": request["runs"]}


def load_engine(request: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the TensorRT module that ``request`` names, and the engine in its file; for child processes."""
    if request["module"] == "tensorrt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # Polygraphy reads it when it is imported.
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, get_trt_logger

    trt = importlib.import_module(request["module"])
    runtime = trt.Runtime(get_trt_logger())
    runtime.engine_host_code_allowed = request.get("hosts_code", False)
    return trt, EngineFromBytes(BytesFromPath(request["engine"]), runtime=runtime)()


def run_in_child(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run an engine on the arrays of an .npz file: write its outputs, return the milliseconds of each timed run and the GPU.

    ``request``: ``module``, ``engine``, ``feeds``, ``outputs`` (both .npz), ``runs``.
    """
    import numpy as np

    _, engine = load_engine(request)
    from polygraphy.backend.trt import TrtRunner

    times = []
    with np.load(request["feeds"], allow_pickle=False) as feeds, TrtRunner(engine) as runner:
        arrays = dict(feeds)
        for _ in range(WARM_UP):
            outputs = runner.infer(arrays, copy_outputs_to_host=True)
        found: dict[str, Any] = {name: np.asarray(value) for name, value in outputs.items()}
        np.savez(request["outputs"], **found)
        for _ in range(request["runs"]):
            runner.infer(arrays, check_inputs=False)
            times.append(1e3 * runner.last_inference_time())
    return {"milliseconds": times, "device": _device()}


def _usual_shape(engine: Any, name: str) -> list[int]:
    shape = list(engine.get_tensor_shape(name))
    return list(engine.get_tensor_profile_shape(name, 0)[1]) if -1 in shape else shape


def _profiler(trt: Any, times: dict[str, list[float]]) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    return Profiler()


def _device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "GPU 0"
