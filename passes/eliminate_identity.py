"""Remove operators that give back what they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.dimensions import Size, dimensions
from deploycc.core.elements import slices
from deploycc.core.graph import attribute, can_take_name, constant, int_attribute, ints_attribute, remove_dead_nodes, replace_value
from deploycc.core.inference import output_sizes
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class EliminateIdentity:
    """Remove operators that give back what they are given.

    Why: exporters leave ``Identity`` for every clone, ``Dropout`` for every dropout and reshapes to the shape that is already
    there; each hides a producer from the patterns of later passes.

    Before / After:
        ``Relu(Dropout(Identity(x)))`` / ``Relu(x)``
        ``Transpose(Transpose(x, [0, 2, 1]), [1, 0, 2])`` / ``Transpose(x, [1, 2, 0])``
        ``Add(Mul(x, 1), 0)`` / ``x``

    Declines when:
        GRAPH_OUTPUT: the operator gives an output of the graph its name and its input cannot take that name.
        TRAINING_MODE: a Dropout is, or may be, in training mode.
        MASK_OUTPUT: the mask of a Dropout is read.

    Options: none.

    See: ONNX Identity-19, Dropout-13, Reshape-14, Transpose-13.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants",)

    def __call__(self, model: ir.Model) -> PassResult:
        """Remove and compose until nothing changes."""
        rewrites: list[Rewrite] = []
        while True:
            declines: list[Decline] = []
            found = [each for node in list(model.graph) if node.domain in {"", "ai.onnx"} for each in _visit(node, declines)]
            if not found:
                return PassResult(tuple(rewrites), tuple(declines))
            rewrites += found
            rewrites += [Rewrite(name, "removed: nothing reads it") for name in remove_dead_nodes(model.graph)]


def _visit(node: ir.Node, declines: list[Decline]) -> list[Rewrite]:
    """Remove ``node`` if it is a no-op, or read past the producer that it undoes or repeats."""
    anchor = node.name or ""
    if _is_dropout_in_use(node, declines):
        return []
    reason = _NO_OPS[node.op_type](node) if node.op_type in _NO_OPS else None
    if reason is None:
        what = _compose(node)
        return [Rewrite(anchor, what)] if what else []
    source, output = node.inputs[_kept(node)], node.outputs[0]
    if source is None:
        return []
    if output.is_graph_output() and not can_take_name(source):
        declines.append(Decline(anchor, "GRAPH_OUTPUT", f"'{source.name}' cannot take the name of the output '{output.name}'"))
        return []
    if source.shape is None or _dynamic(source) > _dynamic(output):
        source.shape = output.shape
    replace_value(output, source)
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    return [Rewrite(anchor, reason)]


def _dynamic(value: ir.Value) -> int:
    sizes = dimensions(value)
    return 99 if sizes is None else sum(not isinstance(d, int) for d in sizes)


def _is_dropout_in_use(node: ir.Node, declines: list[Decline]) -> bool:
    if node.op_type != "Dropout":
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    mode = constant(training)
    if training is not None and (mode is None or bool(mode.any())):
        declines.append(
            Decline(node.name or "", "TRAINING_MODE", "training_mode is set" if mode is not None else "training_mode is computed")
        )
        return True
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        declines.append(Decline(node.name or "", "MASK_OUTPUT", f"the mask '{node.outputs[1].name}' is read"))
        return True
    return False


def _shapes(node: ir.Node) -> tuple[tuple[Size, ...], tuple[Size, ...]] | None:
    source, output = dimensions(node.inputs[0]), output_sizes(node, {})
    return None if source is None or output is None else (source, output)


def _keeps_shape(node: ir.Node) -> str | None:
    # Row-major order is the same on both sides, so equal shapes make the index map the identity.
    shapes = _shapes(node)
    return f"{node.op_type} to the shape that is there" if shapes and shapes[0] == shapes[1] else None


def _keeps_type(node: ir.Node) -> str | None:
    source = node.inputs[0].dtype if node.inputs[0] is not None else None
    return f"Cast from {source} to {source}" if source is not None and attribute(node, "to") == source else None


def _keeps_order(node: ir.Node) -> str | None:
    """Recognise a transposition that moves no axis longer than one past another."""
    sizes = dimensions(node.inputs[0])
    order = _order(node)
    if order is None:
        return None
    if order == sorted(order):
        return "Transpose that moves no axis"
    if sizes is None or dimensions(node.outputs[0]) != sizes:
        return None
    moved = [axis for axis in order if sizes[axis] != 1]
    return "Transpose that moves axes of size 1 only" if moved == sorted(moved) else None


def _order(node: ir.Node) -> list[int] | None:
    given = ints_attribute(node, "perm")
    if given is not None:
        return [int(a) for a in given]
    sizes = dimensions(node.inputs[0])
    return None if sizes is None else list(reversed(range(len(sizes))))


def _takes_all(node: ir.Node) -> str | None:
    sizes = dimensions(node.inputs[0])
    bounds = None if sizes is None else slices(node, len(sizes), {})
    if sizes is None or bounds is None:
        return None
    for axis, bound in bounds.items():
        size = sizes[axis]
        whole = bound.step == 1 and bound.start == 0 and bound.stop >= 2**31 - 1
        if not whole and not (isinstance(size, int) and range(size)[bound] == range(size)):
            return None
    return "Slice that takes everything"


def _pads_nothing(node: ir.Node) -> str | None:
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return "Pad by nothing" if pads is not None and not np.any(pads) else None


def _repeats_once(node: ir.Node) -> str | None:
    repeats = constant(node.inputs[1])
    return "Tile once" if repeats is not None and bool(np.all(repeats == 1)) else None


def _neutral(node: ir.Node) -> int | None:
    """Return the position of an operand that is the neutral element of a sum or product, all of it."""
    wanted = 0 if node.op_type in {"Add", "Sub"} else 1
    for position in (1, 0) if node.op_type in {"Add", "Mul"} else (1,):
        array = constant(node.inputs[position])
        if array is not None and array.size and bool(np.all(array == wanted)):
            return position
    return None


def _kept(node: ir.Node) -> int:
    """Return the position of the input that a no-op gives back."""
    neutral = _neutral(node) if node.op_type in _ARITHMETIC else None
    return 0 if neutral is None else 1 - neutral


def _changes_nothing(node: ir.Node) -> str | None:
    neutral = _neutral(node)
    if neutral is None:
        return None
    sizes, output = dimensions(node.inputs[1 - neutral]), output_sizes(node, {})
    return f"{node.op_type} of its neutral element" if sizes is not None and sizes == output else None


def _has_one_input(node: ir.Node) -> str | None:
    return f"{node.op_type} of one" if len(node.inputs) == 1 else None


_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})
_NO_OPS: dict[str, Callable[[ir.Node], str | None]] = {
    **dict.fromkeys(_ARITHMETIC, _changes_nothing),
    "Cast": _keeps_type,
    "Concat": _has_one_input,
    "Dropout": lambda _: "Dropout in inference",
    "Expand": _keeps_shape,
    "Flatten": _keeps_shape,
    "Identity": lambda _: "Identity",
    "Max": _has_one_input,
    "Mean": _has_one_input,
    "Min": _has_one_input,
    "Pad": _pads_nothing,
    "Reshape": _keeps_shape,
    "Slice": _takes_all,
    "Squeeze": _keeps_shape,
    "Sum": _has_one_input,
    "Tile": _repeats_once,
    "Transpose": _keeps_order,
}


def _compose(node: ir.Node) -> str | None:
    """Let a Reshape or a Transpose read past a producer of the same kind."""
    source = node.inputs[0] if node.inputs else None
    producer = source.producer() if source is not None else None
    if producer is None or producer.op_type != node.op_type or producer.graph is not node.graph or producer.inputs[0] is None:
        return None
    if node.op_type == "Transpose":
        return _compose_transposes(node, producer)
    return _compose_reshapes(node, producer) if node.op_type == "Reshape" else None


def _compose_transposes(node: ir.Node, producer: ir.Node) -> str | None:
    first, second = _order(producer), _order(node)
    if first is None or second is None:
        return None
    node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
    node.replace_input_with(0, producer.inputs[0])
    return f"took over the permutation of '{producer.name}'"


def _compose_reshapes(node: ir.Node, producer: ir.Node) -> str | None:
    target = constant(node.inputs[1])
    # A zero takes its size from the intermediate shape, unless allowzero makes it a size of its own.
    if target is None or (not int_attribute(node, "allowzero", 0) and 0 in target):
        return None
    node.replace_input_with(0, producer.inputs[0])
    return f"reads past the Reshape '{producer.name}'"
