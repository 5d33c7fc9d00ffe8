"""Write a model as an ONNX file: the same model gives the same bytes, and no path of the machine that exported it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from deploycc.core.errors import UsageError

EXTERNAL_ABOVE = 10**9
_SMALL = 1024
_KEPT = frozenset({"pkg.torch.onnx.name_scopes"})
_EXPORTER = ("pkg.torch.", "pkg.onnxscript.", "namespace")
_LOCAL_PATH = re.compile(r"""(?:^|[\s"'(=:])(?:file://)?/(?:[^/\s"']+/)+[^/\s"']+|\b[A-Za-z]:\\""")


def save_model(model: ir.Model, path: Path, *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write ``model`` to ``path``; weights go to ``<path>.data`` when they take more than ``external_above`` bytes together.

    Metadata of the exporter is dropped because it holds local paths (stack traces); name scopes, which say where in the
    model a node came from, and our own entries are kept. Both files appear when they are complete or not at all.

    Raises:
        UsageError: when the folder cannot be written.
    """
    path = Path(path)
    clean = model.clone()
    _drop_local_paths(clean)
    _order_initializers(clean.graph)
    total = sum(v.const_value.nbytes for v in clean.graph.initializers.values() if v.const_value is not None)
    data = path.name + ".data" if total > external_above else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".deploycc-save-", dir=path.parent) as folder:
            partial = Path(folder, path.name)
            ir.save(clean, partial, external_data=data, size_threshold_bytes=_SMALL)
            if data:
                Path(folder, data).replace(path.parent / data)
            partial.replace(path)
    except OSError as error:
        raise UsageError(
            f"the model cannot be written ({error.strerror or error})", at=f"'{path}'", fix="check permissions and free space"
        ) from error


def _drop_local_paths(model: ir.Model) -> None:
    """Drop metadata and comments that tell where on which machine the model was exported, and what only the exporter reads."""
    bearers: list[Any] = [model, model.graph, *model.functions.values(), *model.graph.inputs, *model.graph.initializers.values()]
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for owner in owners:
        for node in ir.traversal.RecursiveGraphIterator(owner):
            bearers += [node, *node.outputs]
    for bearer in bearers:
        for key in [
            k for k, text in bearer.metadata_props.items() if k not in _KEPT and (k.startswith(_EXPORTER) or _LOCAL_PATH.search(text))
        ]:
            del bearer.metadata_props[key]
        if bearer.doc_string and _LOCAL_PATH.search(bearer.doc_string):
            bearer.doc_string = None


def _order_initializers(graph: ir.Graph) -> None:
    """Bring the initializers into the order in which nodes first read them, so that equal models give equal bytes."""
    read = dict.fromkeys(v.name or "" for node in ir.traversal.RecursiveGraphIterator(graph) for v in node.inputs if v is not None)
    rank = {name: index for index, name in enumerate(read)}
    ordered = sorted(graph.initializers.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0]))
    graph.initializers.clear()
    for _, value in ordered:
        graph.register_initializer(value)
