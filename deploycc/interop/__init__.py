"""The doors between deploycc and other representations of a model: ONNX files, ONNX protos, onnx-graphsurgeon graphs.

``load_model`` accepts anybody's ONNX file and returns an artefact in one normal form, or refuses with a reason.
``save_model`` writes a model as the same bytes every time.
"""

from __future__ import annotations

from deploycc.interop.loading import load_model
from deploycc.interop.protos import from_proto, to_bytes, to_proto
from deploycc.interop.saving import save_model
from deploycc.interop.surgeon import from_graphsurgeon, to_graphsurgeon

__all__ = ["from_graphsurgeon", "from_proto", "load_model", "save_model", "to_bytes", "to_graphsurgeon", "to_proto"]
