"""Load an ONNX file as an artefact in one normal form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deploycc.core import child
from deploycc.core.artefact import Artefact, Stage
from deploycc.core.contract import OWN_DOMAINS
from deploycc.core.errors import UsageError
from deploycc.interop.admission import check_admissible, check_types, check_zero_points
from deploycc.interop.conversion import from_proto
from deploycc.interop.damage import check_whole
from deploycc.interop.external import check_external_data
from deploycc.interop.numbers import check_numbers
from deploycc.interop.protos import parse_proto
from deploycc.interop.reading import read_proto
from deploycc.interop.weights import attach, detach

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
from onnx_ir.serde import SerdeError

OPSET = 20
TIMEOUT = 120.0


def load_model(path: Path, *, opset: int = OPSET, timeout: float = TIMEOUT) -> Artefact:
    """Return the model at ``path`` as an artefact at ``Stage.IMPORTED``.

    The model has functions inlined (except those of the domain ``deploycc``), nodes in topological order with unique
    names, opset ``opset`` or the file's own if that is newer, inferred types and shapes, and large constants as
    initializers. Names, order, types and symbolic dimensions of its inputs and outputs are those of the file. Weights in
    external data stay on disk and are mapped on first use.

    Args:
        path: an ONNX file of opset 7 to 23.
        opset: older models are converted to this opset.
        timeout: seconds that checking, conversion and shape inference may take together.

    Raises:
        UsageError: when the file is missing, is not ONNX, or holds a model that cannot be compiled.
    """
    path = Path(path)
    proto = read_proto(path)
    check_whole(proto, path)
    check_admissible(proto, path)
    check_external_data(proto, path)
    held = detach(proto, path.parent.resolve())
    model = _normalized(proto, path, opset=opset, timeout=timeout)
    del proto
    attach(model, held)
    check_types(model, path)
    check_numbers(model, path)
    check_zero_points(model, path)
    return Artefact(model, Stage.IMPORTED)


def _normalized(skeleton: onnx.ModelProto, path: Path, *, opset: int, timeout: float) -> ir.Model:
    """Let a child process check, inline, convert and infer, because onnx may abort or hang on a malformed model."""
    with tempfile.TemporaryDirectory(prefix="deploycc-load-") as folder:
        file = Path(folder, "skeleton.onnx")
        file.write_bytes(skeleton.SerializeToString())
        request = {"skeleton": str(file), "opset": opset, "path": str(path), "own": sorted(OWN_DOMAINS)}
        try:
            answer = child.call("deploycc.interop.frontend:normalize", request, timeout=timeout)
        except child.ChildTimedOut as error:
            raise UsageError(
                f"checking the model took longer than {timeout:.0f} s",
                at=f"'{path}'",
                fix="simplify the model; usually a function expands without end or a constant Range is huge",
            ) from error
        except child.ChildCrashed as error:
            raise UsageError(
                f"the onnx library crashed on this model ({error.kind})",
                at=f"'{path}'",
                fix="the model is malformed; run onnx.checker.check_model(path, full_check=True) on it",
            ) from error
        except child.ChildError as error:
            raise UsageError(
                f"the onnx library refused this model with {error.kind}: {_first_lines(error.message)}",
                at=f"'{path}'",
                fix="export the model again",
            ) from error
        if "refused" in answer:
            raise UsageError(**answer["refused"])
        try:
            return from_proto(parse_proto(file.read_bytes()))
        except SerdeError as error:
            raise UsageError(
                f"the model cannot be represented: {_first_lines(str(error))}", at=f"'{path}'", fix="export the model again"
            ) from error


def _first_lines(text: str, limit: int = 400) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[:limit] + "..."
