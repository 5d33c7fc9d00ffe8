"""Fold padding by zeros into the convolutions behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from deploycc.core.graph import attribute, constant, inherit_metadata, ints_attribute, rank, replace_value
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class FoldPad:
    """Fold padding by zeros into the convolutions behind it.

    Why: some exporters write uneven padding as a node of its own, which copies the image; a convolution pads for free, each side by
    itself, so p' = p + pad is exact.

    Before / After:
        ``Conv(Pad(x, [0,0,0,0,0,0,1,1]), w)`` / ``Conv<pads=[0,0,1,1]>(x, w)``

    Declines when:
        NON_ZERO_PAD_MODE: the padding reflects or repeats the image, or its value is not a constant zero.
        NONCONST_PADS: how much is padded is computed at run time.
        AXIS: the batch or the channels are padded.
        CROP: the padding is negative.
        MULTI_CONSUMER: the padded image is read by something other than convolutions.
        GRAPH_OUTPUT: the padded image is an output of the graph.
        DYNAMIC_SHAPE: the padding of a convolution behind it depends on the size of the image.

    Options: none.

    See: ONNX Pad-19, Conv-11.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity")

    def __call__(self, model: ir.Model) -> PassResult:
        """Fold every padding that can be, until nothing changes."""
        rewrites: list[Rewrite] = []
        while True:
            results = [_fold(node) for node in list(model.graph) if node.op_type == "Pad"]
            found = [r for r in results if isinstance(r, Rewrite)]
            rewrites += found
            if not found:
                return PassResult(tuple(rewrites), tuple(r for r in results if isinstance(r, Decline)))


def _fold(node: ir.Node) -> Rewrite | Decline | None:
    """Fold one padding; None where no convolution reads it."""
    value, source = node.outputs[0], node.inputs[0]
    readers = [use.node for use in value.uses() if use.node.op_type == "Conv" and use.idx == 0]
    axes = rank(source)
    if not readers or source is None or axes is None or any(reader.graph is not node.graph for reader in readers):
        return None
    pads = _pads(node, axes)
    if refusal := _refusal(node, pads, axes, readers):
        return Decline(node.name or "", *refusal)
    for reader in readers:
        given = ints_attribute(reader, "pads") if attribute(reader, "auto_pad", "NOTSET") == "NOTSET" else None
        own = given or (0,) * (2 * (axes - 2))
        added = [*pads[2:axes], *pads[axes + 2 :]] if pads is not None else []
        reader.attributes.pop("auto_pad", None)
        reader.attributes["pads"] = ir.AttrInt64s("pads", [p + q for p, q in zip(own, added, strict=True)])
        inherit_metadata(reader, [node])
    replace_value(value, source)
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    return Rewrite(node.name or "", f"folded into {', '.join(repr(reader.name) for reader in readers)}")


def _refusal(node: ir.Node, pads: list[int] | None, axes: int, readers: list[ir.Node]) -> tuple[str, str] | None:
    value = node.outputs[0]
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if attribute(node, "mode", "constant") != "constant":
        return "NON_ZERO_PAD_MODE", f"it pads by '{attribute(node, 'mode')}'"
    if fill is not None and not _is_zero(constant(fill)):
        return "NON_ZERO_PAD_MODE", f"it pads with '{fill.name}', which is no constant zero"
    if pads is None:
        return "NONCONST_PADS", "how much is padded is computed"
    if any([*pads[:2], *pads[axes : axes + 2]]):
        return "AXIS", "the batch or the channels are padded"
    if min(pads) < 0:
        return "CROP", "a negative padding crops the image"
    if value.is_graph_output():
        return "GRAPH_OUTPUT", f"'{value.name}' is an output of the graph"
    if len(readers) < len(value.uses()):
        return "MULTI_CONSUMER", f"'{value.name}' is also read by something other than a convolution"
    if any(attribute(reader, "auto_pad", "NOTSET") not in {"NOTSET", "VALID"} for reader in readers):
        return "DYNAMIC_SHAPE", "the padding of the convolution depends on the size of its input"
    return None


def _is_zero(fill: np.ndarray | None) -> bool:
    return fill is not None and not fill.any()


def _pads(node: ir.Node, axes: int) -> list[int] | None:
    """Return the padding of every axis, all begins and then all ends."""
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    chosen = node.inputs[3] if len(node.inputs) > 3 else None
    which = range(axes) if chosen is None else constant(chosen)
    if given is None or which is None:
        return None
    pads, places = [0] * (2 * axes), [int(a) % axes for a in which]
    for index, axis in enumerate(places):
        pads[axis], pads[axes + axis] = int(given[index]), int(given[len(places) + index])
    return pads
