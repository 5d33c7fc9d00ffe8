"""The doors between deploycc and other representations of a model: ONNX files, ONNX protos, onnx-graphsurgeon graphs.

``load_model`` accepts anybody's ONNX file and returns an artefact in one normal form, or refuses with a reason.
``save_model`` writes a model as the same bytes every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploycc.interop.conversion import from_proto, to_bytes, to_proto
    from deploycc.interop.loading import load_model
    from deploycc.interop.saving import save_model
    from deploycc.interop.surgeon import from_graphsurgeon, to_graphsurgeon

__all__ = ["from_graphsurgeon", "from_proto", "load_model", "save_model", "to_bytes", "to_graphsurgeon", "to_proto"]

_HOMES = {
    "conversion": ("from_proto", "to_bytes", "to_proto"),
    "loading": ("load_model",),
    "saving": ("save_model",),
    "surgeon": ("from_graphsurgeon", "to_graphsurgeon"),
}


def __getattr__(name: str) -> Any:
    """Import a door when it is first used: the loader's child process starts in a third of the time that way."""
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
