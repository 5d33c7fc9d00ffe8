"""The door to onnx-graphsurgeon, which speaks the vocabulary of TensorRT engineers and forgets some of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycc.interop.protos import to_proto

if TYPE_CHECKING:
    import onnx_graphsurgeon
    import onnx_ir as ir


def to_graphsurgeon(model: ir.Model) -> onnx_graphsurgeon.Graph:
    """Return the model as a graphsurgeon graph; the model is left as it is."""
    import onnx_graphsurgeon

    return onnx_graphsurgeon.import_onnx(to_proto(model))


def from_graphsurgeon(graph: onnx_graphsurgeon.Graph, *, like: ir.Model) -> ir.Model:
    """Return the model of an edited graphsurgeon graph, with what graphsurgeon dropped restored from ``like``."""
    raise NotImplementedError
