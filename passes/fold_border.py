"""Fold a border that holds the image of zero into the pointwise convolution before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.affine import Link, read_convolution, read_pointwise
from deploycc.core.borders import Stripe, carriers, folded_rows, padding, permutations, stripe
from deploycc.core.dimensions import dimensions
from deploycc.core.graph import inherit_metadata, ints_attribute, remove_dead_nodes, replace_value, sole_consumer
from deploycc.core.inference import observe
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

if TYPE_CHECKING:
    from deploycc.core.elements import Contents

_INSIDE = frozenset({"ScatterND", "Transpose", "Shape"})
_ROUNDINGS = 8  # of the model's own arithmetic from the statistics to the border: add, root, product, quotient, difference


@dataclass(frozen=True, slots=True)
class FoldBorder:
    """Fold a border that holds the image of zero into the pointwise convolution before it.

    Why: a block trained with several branches (DBB) normalizes a 1x1 convolution and writes the image of zero, one number per channel,
    around it. A 1x1 convolution that pads computes just that from zeros, W 0 + b, and then composes with the convolution behind it.

    Before / After:
        ``y = Pad(BatchNormalization(Conv(x, w [C,I,1,1])), 1)``, ``y[border] = image of zero`` /
        ``y = BatchNormalization(Conv<pads=[1,1,1,1]>(x, w))``

    Declines when:
        BORDER_VALUE: the border holds something else than the image of zero.
        BORDER_PART: what is written is not the border, all of it and nothing else.
        NOT_POINTWISE: no convolution of one tap is before the border.
        NONCONST_PADS: how much is padded is computed at run time, or the batch or the channels are padded.
        MULTI_CONSUMER: the map is read elsewhere before its border is complete.
        GRAPH_OUTPUT: the map is an output of the graph before its border is complete.

    Options: none.

    See: ONNX ScatterND-18, Pad-19, Conv-11.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity")

    def __call__(self, model: ir.Model) -> PassResult:
        """Fold every border that can be."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        if not any(node.op_type == "ScatterND" for node in model.graph):
            return PassResult()
        known: Contents = {}
        for node in model.graph:
            observe(node, known)
        for node in list(model.graph):
            found = _fold(node, known) if node.graph is not None else None
            if isinstance(found, Rewrite):
                rewrites.append(found)
            elif found is not None:
                declines.append(found)
        while names := remove_dead_nodes(model.graph):
            rewrites += [Rewrite(name, "removed: nothing reads it") for name in names]
        return PassResult(tuple(rewrites), tuple(declines))


@dataclass(frozen=True, slots=True)
class _Border:
    """A chain from a Pad to the complete map, and the two nodes that compute the map inside."""

    path: list[ir.Node]
    orders: list[tuple[int, ...]]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    links: list[Link]

    @property
    def output(self) -> ir.Value:
        return self.path[-1].outputs[0]


def _fold(node: ir.Node, known: Contents) -> Rewrite | Decline | None:
    """Fold the border that ``node`` completes, if it completes one."""
    if node.op_type not in {"ScatterND", "Transpose"}:
        return None
    output = node.outputs[0]
    if not output.is_graph_output() and all(use.node.op_type in _INSIDE for use in output.uses()):
        return None
    path = carriers(output)
    orders = permutations(path) if path is not None else None
    if path is None or orders is None or len(orders[-1]) < 3 or orders[-1] != tuple(range(len(orders[-1]))):
        return None
    found = _read(path, orders)
    if isinstance(found, Decline):
        return found
    shapes = _shapes(found)
    refusal = _written(found, known) or _shared(found) or (shapes if isinstance(shapes, tuple) else None)
    if refusal or isinstance(shapes, tuple):
        return Decline(node.name or "", *(refusal or ("", "")))
    return _apply(found, shapes)


def _read(path: list[ir.Node], orders: list[tuple[int, ...]]) -> _Border | Decline:
    pads, anchor = padding(path[0], len(orders[0])), path[-1].name or ""
    if pads is None or any((*pads[0][:2], *pads[1][:2])) or min(*pads[0], *pads[1]) < 0:
        return Decline(anchor, "NONCONST_PADS", "the map is not padded by constant numbers of rows and columns")
    value = path[0].inputs[0]
    links: list[Link] = []
    while value is not None and (producer := value.producer()) is not None and producer.graph is path[0].graph:
        link = read_convolution(producer) or read_pointwise(producer)
        if not isinstance(link, Link) or any(k != 1 for k in link.geometry.kernel):
            break
        links.insert(0, link)
        if producer.op_type == "Conv":
            return _Border(path, orders, *pads, links)
        value = link.source
    return Decline(anchor, "NOT_POINTWISE", "no convolution of one tap computes what the border is around")


def _written(border: _Border, known: Contents) -> tuple[str, str] | None:
    """Return why the stripes are not the image of zero all around, if they are not."""
    image, slack = _image_of_zero(border.links, _precision(border.output))
    sizes = dimensions(border.output) or ()
    covered: dict[int, set[int]] = {}
    for node, axes in zip(border.path, border.orders, strict=True):
        if node.op_type != "ScatterND":
            continue
        found = stripe(node, axes, image.size, known)
        if not isinstance(found, Stripe) or found.axis < 2:
            return "BORDER_PART", f"'{node.name}' does not write rows of one number per channel"
        if np.any(np.abs(found.value - image) > slack):
            far = float(np.max(np.abs(found.value - image)))
            return "BORDER_VALUE", f"'{node.name}' writes a number that is {far:.3g} away from the image of zero"
        size = sizes[found.axis] if found.axis < len(sizes) else None
        covered.setdefault(found.axis, set()).update(folded_rows(found, border.begins[found.axis], size))
    for axis in range(2, len(border.begins)):
        if covered.get(axis, set()) != set(range(-border.ends[axis], border.begins[axis])):
            return "BORDER_PART", f"what is written on axis {axis} is not its border"
    return None


def _image_of_zero(links: list[Link], precision: float) -> tuple[np.ndarray, np.ndarray]:
    """Return what the links make of zero, and how far from it the model's own arithmetic may be.

    The distance is a few roundings of the summands: the running mean times the factor may all but cancel the shift.
    """
    numbers = links[0].load()
    image: np.ndarray = numbers.bias
    size: np.ndarray = np.abs(image)
    for link in links[1:]:
        each = link.load()
        factor = each.weight.reshape(-1)
        image, size = factor * image + each.bias, np.abs(factor) * size + _magnitude(link)
    return image, _ROUNDINGS * precision * size


def _precision(value: ir.Value) -> float:
    return float(np.finfo(np.float16 if value.dtype == ir.DataType.FLOAT16 else np.float32).eps)


def _magnitude(link: Link) -> np.ndarray:
    """Return a bound of |s| + |m t| of a normalization of offset s - m t, else the size of the offset."""
    node = link.nodes[0]
    offset = link.load().bias
    if node.op_type != "BatchNormalization" or node.inputs[2] is None or node.inputs[2].const_value is None:
        return np.asarray(np.abs(offset))
    shift: np.ndarray = np.abs(node.inputs[2].const_value.numpy().astype(np.float64))
    size: np.ndarray = 2 * shift + np.abs(offset)
    return size


def _shared(border: _Border) -> tuple[str, str] | None:
    """Return why the map without its border has to stay, if it has to."""
    for link in border.links:
        if link.output.is_graph_output():
            return "GRAPH_OUTPUT", f"'{link.output.name}' is an output of the graph"
        if sole_consumer(link.output) is None:
            return "MULTI_CONSUMER", f"'{link.output.name}' is read {len(link.output.uses())} times"
    return None


def _shapes(border: _Border) -> list[ir.Node] | tuple[str, str]:
    """Return the nodes that ask for the shape of the map before its border is complete, or why something else reads it."""
    found: list[ir.Node] = []
    straight = tuple(range(len(border.begins)))
    for node, axes in zip(border.path[:-1], border.orders, strict=False):
        views = [(node.outputs[0], axes)]
        for use in node.outputs[0].uses():
            order = ints_attribute(use.node, "perm")
            if use.node.op_type == "Transpose" and order is not None and use.node not in border.path:
                views.append((use.node.outputs[0], tuple(axes[i] for i in order)))
        beside = [value.producer() for value, _ in views[1:]]
        for value, order in views:
            if value.is_graph_output():
                return "GRAPH_OUTPUT", f"'{value.name}' is an output of the graph"
            readers = [use.node for use in value.uses() if use.node not in border.path and use.node not in beside]
            if any(reader.op_type != "Shape" or order != straight for reader in readers):
                return "MULTI_CONSUMER", f"'{value.name}' is read before its border is complete"
            found += readers
    return found


def _apply(border: _Border, shapes: list[ir.Node]) -> Rewrite:
    """Let the convolution pad, and read the map it computes instead of the one with the written border."""
    first, output = border.links[0], border.output
    own, inside = first.geometry, border.links[-1].output
    begins = [p + s * q for p, s, q in zip(own.begins, own.strides, border.begins[2:], strict=True)]
    ends = [p + s * q for p, s, q in zip(own.ends, own.strides, border.ends[2:], strict=True)]
    convolution = first.nodes[0]
    convolution.attributes.pop("auto_pad", None)
    convolution.attributes["pads"] = ir.AttrInt64s("pads", [*begins, *ends])
    inherit_metadata(convolution, border.path)
    for link in border.links:
        link.output.shape = output.shape
    for node in shapes:
        node.replace_input_with(0, inside)
    replace_value(output, inside)
    return Rewrite(border.path[-1].name or "", f"'{convolution.name}' pads instead", "the border is exact, not as the model rounded it")
