"""ONNX Runtime on the CPU: a deployment target, and the reference that calibration and verification execute.

Q/DQ is simulated in floating point exactly where the file places it (``session.disable_quant_qdq``): TensorRT's semantics,
and the only way in which the CPU provider runs FP8.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycc.backends.modelfile import copy_model
from deploycc.backends.sessions import session, session_options
from deploycc.core import child
from deploycc.core.backend import BuildOptions, Engine, Executor, Feeds, Realised
from deploycc.core.errors import BackendError
from deploycc.core.formats import BF16, FORMATS, MXFP8, NVFP4, Format

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from deploycc.core.shapes import Profile
    from deploycc.core.target import Target

# Protobuf refuses messages of 2 GiB; larger constants travel through a file.
INLINE_LIMIT = 1_500_000_000
_NODE_IN_ERROR = (
    r"[Nn]ode\s*\(([^)\s]+)\)",
    r"Name:'([^']*)'",
    r"node with name '([^']*)'",
    r"for the node (\S+?):",
    r"[Nn]ode:\s*([^\s,]+)",
    r"operator \(\w+\) in node \(([^)]*)\)",
)

LOAD_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """The CPU provider of ONNX Runtime: the ONNX file is the engine."""

    name: str = "onnxruntime"

    def resolve(self, target: Target) -> Target:
        """Return ``target``: the CPU needs no architecture."""
        return target

    def formats(self, target: Target) -> frozenset[Format]:
        """Return every format whose files the CPU loads; FP16, FP8 and INT4 are emulated, never faster."""
        return frozenset(FORMATS.values()) - {BF16, NVFP4, MXFP8}

    def unsupported_reason(self, target: Target, wanted: Format) -> str:
        """Return why ``target`` does not compute in ``wanted``, or an empty string."""
        if wanted in (NVFP4, MXFP8):
            return f"ONNX Runtime does not have the operators in which {wanted} is written on the CPU"
        return "ONNX Runtime has no BF16 convolution on the CPU" if wanted == BF16 else ""

    def unsupported_mode(self, target: Target, mode: str) -> str:
        """Return an empty string: what is built is an ONNX file, which is bound to no version and no machine."""
        return ""

    def build(self, model: Path, target: Target, *, out: Path, profiles: Sequence[Profile], options: BuildOptions) -> Engine:
        """Copy ``model`` (and its external data) to ``out`` after a child process has loaded it.

        Raises:
            BackendError: when the file does not load, with the node that is at fault.
        """
        start, seconds = time.perf_counter(), options.timeout or LOAD_TIMEOUT
        try:
            answer = child.call("deploycc.backends.sessions:load_in_child", {"model": str(model)}, timeout=seconds)
        except child.ChildTimedOut:
            what = f"ONNX Runtime did not load the model within {seconds:.0f} s"
            raise BackendError(what, at=str(model), fix="raise --timeout") from None
        except child.ChildCrashed as error:
            fix = "check the file with onnx.checker.check_model(path, full_check=True)"
            raise BackendError(f"ONNX Runtime crashed while loading the model ({error.kind})", at=str(model), fix=fix) from None
        except child.ChildError as error:
            raise _translated(error.message, at=str(model)) from None
        size = copy_model(model, out)
        realised = Realised(source="ONNX file", note="the file is executed as written; its Q/DQ nodes are simulated in floating point")
        return Engine(target, out, size, time.perf_counter() - start, answer["peak_rss_mb"], realised)

    def executor(self, model: ir.Model, *, simulate: bool = False) -> Executor:
        """Return an executor of ``model``; with ``simulate``, 16-bit types, NVFP4 and MXFP8 are emulated.

        See `deploycc.backends.emulation` and `deploycc.backends.block_emulation`.

        Raises:
            BackendError: when ONNX Runtime refuses the model, naming the node where it is known.
        """
        from deploycc.backends import block_emulation, emulation

        feeds = {value.name or "": value.dtype for value in model.graph.inputs}
        if simulate and emulation.uses_emulated_types(model):
            model = emulation.emulate(model)
        if simulate and block_emulation.uses_blocks(model):
            model = block_emulation.expand_blocks(model)
        with _translating(f"model '{model.graph.name}'"):
            return _Session(_session(model), feeds)

    def doctor(self) -> Mapping[str, Any]:
        """Return the version of ONNX Runtime and its providers."""
        try:
            import onnxruntime
        except ImportError as error:
            return {"available": False, "reason": str(error)}
        return {"available": True, "version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}


@dataclass(frozen=True, slots=True)
class _Session:
    """An executor: converts feeds to the types the session takes, names the node of an error."""

    session: Any
    kinds: Mapping[str, ir.DataType | None]

    def __call__(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        names = list(outputs) if outputs is not None else [o.name for o in self.session.get_outputs()]
        if not names:
            return {}  # The session takes an empty list for all outputs.
        wide = {i.name for i in self.session.get_inputs() if i.type == "tensor(float)"}
        cast = {n: np.asarray(v, np.float32) if n in wide and _is_float(v) else v for n, v in feeds.items()}
        with _translating("this batch"):
            return dict(zip(names, self.session.run(names, cast), strict=True))


def _session(model: ir.Model) -> Any:
    """Return a CPU session of ``model``; constants that lie in files stay there and are memory-mapped."""
    options = session_options()
    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values() if v.const_value is not None]
    external = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
    folders = {str(Path(t.base_dir).resolve()) for t in external}
    inline = sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor))
    if inline < INLINE_LIMIT and len(folders) <= 1:
        for folder in folders:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return session(ir.to_proto(model).SerializeToString(), options)
    with tempfile.TemporaryDirectory(prefix="deploycc-reference-") as scratch:
        path = Path(scratch, "model.onnx")
        ir.save(model, path, external_data="model.onnx.data")
        return session(str(path), options)


@contextlib.contextmanager
def _translating(at: str) -> Iterator[None]:
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    kinds = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NotImplemented, ort.RuntimeException, ort.EPFail)
    try:
        yield
    except (*kinds, ValueError, RuntimeError) as error:
        raise _translated(str(error), at=at) from error


def _translated(message: str, *, at: str) -> BackendError:
    node = next((found[1] for pattern in _NODE_IN_ERROR if (found := re.search(pattern, message)) and found[1]), None)
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message).strip()
    text = re.sub(r"/\S+/(?=\S+\.(?:cc|h)\b)", "", text)
    fix = "check the node against the ONNX operator's definition, or keep it in a type that the CPU provider implements (FP32)"
    return BackendError(f"ONNX Runtime refused the model: {text}", at=f"node '{node}' of {at}" if node else at, fix=fix)


def _is_float(array: object) -> bool:
    dtype = np.asarray(array).dtype
    return dtype.kind == "f" or dtype.name == "bfloat16"
