"""What a plugin is to the compiler: how its operator leaves PyTorch, and what a model that uses it must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import ModuleType

    import onnx_ir as ir


class Plugin(Protocol):
    """An operator that TensorRT lacks; found by entry point (group ``deploycc.plugins``)."""

    name: str

    def translations(self) -> Mapping[Any, Callable[..., Any]]:
        """Return the ONNX exporter's table: an operator of PyTorch, and the function that makes nodes of it."""
        ...

    def compile_ahead(self, trtp: ModuleType, *, arch: str) -> None:
        """Register with ``tensorrt.plugin``, so that the plugin's kernels become part of an engine for ``arch``."""
        ...

    def complete(self, model: ir.Model) -> None:
        """Give ``model`` the function bodies of the plugin's nodes, so that runtimes without the plugin can execute it."""
        ...
