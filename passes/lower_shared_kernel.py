"""Lower a convolution that one kernel applies to every channel by itself to a depthwise convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.between import shared
from deploycc.core.dimensions import Size, dimensions, divide, is_anonymous, product
from deploycc.core.graph import (
    add_initializer,
    constant,
    fresh_name,
    inherit_metadata,
    int_attribute,
    remove_dead_nodes,
    replace_value,
    taken_names,
)
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

_ELEMENTWISE = frozenset(
    {"Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Selu", "HardSigmoid", "HardSwish", "Softplus", "Gelu", "Neg", "Abs", "Exp", "Identity"}
)


@dataclass(frozen=True, slots=True)
class LowerSharedKernel:
    """Lower a convolution that one kernel applies to every channel by itself to a depthwise convolution.

    Why: a filter bank shared by all channels (Gabor layers) is written as a reshape of [N,C,H,W] to [N C,1,H,W], a convolution by
    [k,1,h,w] and a reshape back. The same numbers, in the same order, come from a depthwise convolution whose weight repeats the
    kernel for each channel: bit-exact, without the reshapes, and without a batch that changes in the middle of the network.

    Before / After:
        ``Reshape(Conv(Reshape(x, [N C,1,H,W]), w [k,1,h,w], b [k]), [N,C k,H',W'])`` / ``Conv<group=C>(x, w' [C k,1,h,w], b' [C k])``

    Declines when:
        NONCONST_WEIGHT: the kernel or its bias is computed at run time.
        MULTI_CONSUMER: a value between the two reshapes is read elsewhere.
        GRAPH_OUTPUT: a value between the two reshapes is an output of the graph.
        RESHAPE: the channels do not come back as they went.

    Options: none.

    See: ONNX Conv-11, Reshape-19.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity")

    def __call__(self, model: ir.Model) -> PassResult:
        """Lower every shared kernel that can be."""
        taken = taken_names(model.graph)
        results = [_lower(node, taken) for node in list(model.graph) if node.op_type == "Conv"]
        declines = tuple(r for r in results if isinstance(r, Decline))
        return PassResult(tuple(r for r in results if isinstance(r, Rewrite)), declines)


def _lower(node: ir.Node, taken: set[str]) -> Rewrite | Decline | None:
    """Lower one convolution; None where channels are not folded into the batch before it."""
    anchor, channels = node.name or "", _channels_in_batch(node)
    if channels is None:
        return None
    arrays = [constant(value) for value in node.inputs[1:]]
    if any(array is None for array in arrays):
        return Decline(anchor, "NONCONST_WEIGHT", "the kernel or its bias is computed")
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    behind, path = _way_back(node)
    if behind is None or before is None or before.inputs[0] is None:
        return Decline(anchor, "RESHAPE", "what follows does not give the channels back")
    if refusal := next((r for r in map(shared, path) if r), None):
        return Decline(anchor, refusal.code, refusal.reason)
    source, output = before.inputs[0], behind.outputs[0]
    kernels = arrays[0].shape[0] if arrays[0] is not None else 0
    sizes, inner = dimensions(source), dimensions(path[-1])
    wanted = (sizes[0], channels * kernels, *inner[2:]) if sizes is not None and inner is not None else None
    back = _settled(dimensions(output), wanted)
    if wanted is None or back != wanted:
        return Decline(anchor, "RESHAPE", f"the channels come back as {_shown(back)}")
    for position, array in enumerate(arrays, start=1):
        if array is not None:
            name = fresh_name(f"{path[0].name}_{'kernels' if position == 1 else 'bias'}", taken)
            tiled = np.tile(array, (channels, *[1] * (array.ndim - 1)))
            node.replace_input_with(position, add_initializer(_graph(node), name, tiled))
    node.replace_input_with(0, source)
    node.attributes["group"] = ir.AttrInt64("group", channels)
    for value in path:
        value.shape = output.shape
    inherit_metadata(node, [before, behind])
    replace_value(output, path[-1])
    _graph(node).remove(behind, safe=True)
    remove_dead_nodes(_graph(node), [before])
    return Rewrite(anchor, f"{kernels} shared kernels became a depthwise convolution of {channels} groups")


def _channels_in_batch(node: ir.Node) -> int | None:
    """Return the channels that the Reshape before a convolution of one input channel folds into the batch."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Reshape" or int_attribute(node, "group", 1) != 1:
        return None
    source, folded = dimensions(producer.inputs[0]), dimensions(value)
    if source is None or folded is None or len(source) < 3 or len(folded) != len(source) or folded[1] != 1:
        return None
    channels = source[1]
    if not isinstance(channels, int) or channels < 2:
        return None
    wanted = (source[0] * channels, 1, *source[2:])
    return channels if _settled(folded, wanted) == wanted else None


def _way_back(node: ir.Node) -> tuple[ir.Node | None, list[ir.Value]]:
    """Return the next Reshape behind ``node`` past what works element by element, and the values up to it."""
    path = [node.outputs[0]]
    while (reader := next(iter(path[-1].uses()), None)) is not None:
        following = reader.node
        if following.op_type == "Reshape" and reader.idx == 0 and following.graph is node.graph:
            return following, path
        if following.op_type not in _ELEMENTWISE:
            break
        path.append(following.outputs[0])
    return None, path


def _settled(sizes: tuple[Size, ...] | None, wanted: tuple[Size, ...] | None) -> tuple[Size, ...] | None:
    """Return ``sizes`` with a first dimension that shape inference left open as what is left of the elements of ``wanted``."""
    if sizes is None or wanted is None or not is_anonymous(sizes[0]):
        return sizes
    first = divide(product(wanted), product(sizes[1:]))
    return sizes if first is None else (first, *sizes[1:])


def _graph(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"'{node.name}' belongs to no graph")
    return node.graph


def _shown(sizes: tuple[Size, ...] | None) -> str:
    return "an unknown shape" if sizes is None else f"[{', '.join(map(str, sizes))}]"
