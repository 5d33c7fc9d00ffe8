"""Sessions of ONNX Runtime. The child that tries out a file imports this and nothing of ours that takes long to load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from deploycc.backends.memory import peak_rss_mb

# From 1.31 it reports each session to its makers unless told otherwise, and leaves a file in the temporary folder to do so.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Of QuantizeLinear to FP8 these know nothing (seen in 1.31): the first removes a Relu before it, the second refuses a Clip before it.
WRONG_OPTIMIZERS = ["ReluQuantRewrite", "ClipQuantRewrite"]


def session(model: str | bytes, options: Any) -> Any:
    """Return a session on the CPU of a file, or of a model in bytes."""
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=WRONG_OPTIMIZERS)


def session_options() -> Any:
    """Return options under which Q/DQ is computed where it stands."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = os.cpu_count() or 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # A pattern of one run's memory is laid out anew for the second, and few runs never earn back what it costs to touch its pages.
    options.enable_mem_pattern = False
    return options


def load_in_child(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load a file as it will be deployed: the child's side of `OnnxRuntime.build`."""
    session(request["model"], session_options())
    return {"peak_rss_mb": peak_rss_mb()}
