"""The safe repairs of ``deploycc lint --fix``: each changes how a file says something, never the numbers that it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import add_initializer, is_constant, remove_dead_nodes, remove_unused_initializers, replace_value
from deploycc.lint.placement import is_weight, same_scale
from deploycc.lint.representation import zero_points_of
from deploycc.lint.subject import DEQUANTIZE, Pair, Subject, is_float_cast, settled, value_name, value_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIDDLE = 128
# By how many bits of its fraction one type is wider than another.
_FRACTION = {"BFLOAT16": 7, "FLOAT16": 10, "FLOAT": 23, "DOUBLE": 52}
_EXPONENT = {"BFLOAT16": 8, "FLOAT16": 5, "FLOAT": 8, "DOUBLE": 11}


def repair(model: ir.Model) -> list[str]:
    """Apply every safe repair in place; return what was changed, one sentence per kind of repair."""
    done = []
    for each in REPAIRS.values():
        places = list(each(Subject(model)))
        while remove_dead_nodes(model.graph):
            pass
        remove_unused_initializers(model.graph)
        if places:
            named = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
            done.append(f"{(each.__doc__ or '').rstrip('.')} ({named})")
    return done


def uint8_to_int8(subject: Subject) -> Iterator[str]:
    """UINT8 with the zero point 128 became INT8 with the zero point 0."""
    for pair in subject.pairs:
        parts = [pair.dequantize] if pair.quantize is None else [pair.quantize, *_dequantizers(pair.quantize)]
        zeros = [zero_points_of(n) for n in parts]
        if pair.kind != ir.DataType.UINT8 or any(z is None or not np.all(z == MIDDLE) for z in zeros):
            continue
        codes = pair.dequantize.inputs[0]
        if pair.quantize is None and (codes is None or codes.const_value is None or not is_constant(codes)):
            continue
        if pair.quantize is not None and any(use.node.op_type != DEQUANTIZE for use in pair.quantize.outputs[0].uses()):
            continue
        _to_int8(subject.graph, pair, parts)
        yield value_name(pair.source)


def _to_int8(graph: ir.Graph, pair: Pair, parts: list[ir.Node]) -> None:
    for node, zeros in [(n, zero_points_of(n)) for n in parts]:
        shape = () if zeros is None else zeros.shape
        node.replace_input_with(2, add_initializer(graph, f"{node.name}_zero_point", np.zeros(shape, np.int8)))
    if pair.quantize is not None:
        pair.quantize.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        pair.quantize.attributes.pop("output_dtype", None)
    elif pair.source is not None and pair.source.const_value is not None:
        shifted = (pair.source.const_value.numpy().astype(np.int16) - MIDDLE).astype(np.int8)
        pair.dequantize.replace_input_with(0, add_initializer(graph, f"{pair.source.name}_int8", shifted))


def scalar_scales(subject: Subject) -> Iterator[str]:
    """Scales of activations with the shape [1] became scalars."""
    for pair in subject.activations:
        nodes = [n for n in (pair.quantize, pair.dequantize) if n is not None]
        wrong = [n for n in nodes if any(v is not None and (a := settled(v)) is not None and a.shape == (1,) for v in n.inputs[1:3])]
        for node in wrong:
            for index in range(1, len(node.inputs)):
                array, value = settled(node.inputs[index]), node.inputs[index]
                if array is not None and value is not None and array.shape == (1,):
                    node.replace_input_with(index, add_initializer(subject.graph, f"{value.name}_scalar", array.reshape(()), value.dtype))
            node.attributes.pop("axis", None)
        if wrong:
            yield value_name(pair.source)


def fold_dequantized_constants(subject: Subject) -> Iterator[str]:
    """Quantized constants other than weights became floating point."""
    for pair in (p for p in subject.pairs if p.is_stored):
        readers = subject.readers(pair)
        if readers and not any(is_weight(n, i) for n, i in readers) and not pair.output.is_graph_output():
            array = _dequantized(pair)
            if array is not None:
                pair.output.replace_all_uses_with(add_initializer(subject.graph, f"{value_name(pair.source)}_float", array))
                yield value_name(pair.source)


def store_codes(subject: Subject) -> Iterator[str]:
    """Weights that were quantized at run time are stored as codes."""
    for pair in (p for p in subject.pairs if p.is_stored and p.quantize is not None):
        codes = _codes(pair)
        if codes is not None and pair.quantize is not None and pair.kind is not None:
            stored = add_initializer(subject.graph, f"{value_name(pair.source)}_{pair.format}", codes, pair.kind)
            pair.quantize.outputs[0].replace_all_uses_with(stored)
            yield value_name(pair.source)


def drop_repeated_pairs(subject: Subject) -> Iterator[str]:
    """Pairs that nothing reads, or that repeat the pair before them, are gone."""
    for pair in subject.activations:
        before = pair.source.producer() if pair.source is not None else None
        earlier = next((p for p in subject.pairs if p.dequantize is before), None)
        if earlier is not None and _alike(earlier, pair) and pair.source is not None:
            replace_value(pair.output, pair.source)
            yield pair.dequantize.name or ""
        elif not pair.output.uses() and not pair.output.is_graph_output():
            yield pair.dequantize.name or ""


def share_pairs(subject: Subject) -> Iterator[str]:
    """Equal pairs on one value were joined."""
    first: dict[ir.Value | None, list[Pair]] = {}
    for pair in subject.activations:
        known = first.setdefault(pair.source, [])
        same = next((p for p in known if _alike(p, pair) and value_type(p.output) == value_type(pair.output)), None)
        if same is None or pair.output.is_graph_output():
            known.append(pair)
        else:
            pair.output.replace_all_uses_with(same.output)
            if pair.quantize is not same.quantize:
                yield value_name(pair.source)


def move_pairs_behind_pooling(subject: Subject) -> Iterator[str]:
    """Pairs between a convolution and a MaxPool moved behind it."""
    for pair in subject.activations:
        uses = list(pair.output.uses())
        pool = uses[0].node if len(uses) == 1 and not pair.output.is_graph_output() else None
        quantize, scale = pair.quantize, pair.scale
        if pool is None or pool.op_type != "MaxPool" or quantize is None or scale is None or scale.size != 1 or len(pool.outputs) != 1:
            continue
        if pool.outputs[0].is_graph_output() or len(quantize.outputs[0].uses()) != 1:
            continue
        readers = [(u.node, u.idx) for u in pool.outputs[0].uses()]
        pool.replace_input_with(0, quantize.inputs[0])
        quantize.replace_input_with(0, pool.outputs[0])
        for node, index in readers:
            node.replace_input_with(index, pair.output)
        for node in (quantize, pair.dequantize):
            node.outputs[0].shape = pool.outputs[0].shape
        subject.graph.remove([quantize, pair.dequantize])
        subject.graph.insert_after(pool, [quantize, pair.dequantize])
        yield pool.name or ""


def drop_cast_pairs(subject: Subject) -> Iterator[str]:
    """Casts that only widened and were undone are gone."""
    for node in subject.graph:
        before = node.inputs[0].producer() if is_float_cast(node) and node.inputs[0] is not None else None
        source = before.inputs[0] if before is not None and is_float_cast(before) else None
        if source is None or node.outputs[0].is_graph_output() or value_type(source) != value_type(node.outputs[0]):
            continue
        narrow, wide = value_type(source), value_type(node.inputs[0])
        if _FRACTION.get(wide, 0) >= _FRACTION.get(narrow, 99) and _EXPONENT[wide] >= _EXPONENT[narrow]:
            node.outputs[0].replace_all_uses_with(source)
            yield node.name or ""


REPAIRS: dict[str, Callable[[Subject], Iterator[str]]] = {
    f.__name__: f
    for f in (
        fold_dequantized_constants,
        uint8_to_int8,
        scalar_scales,
        store_codes,
        move_pairs_behind_pooling,
        share_pairs,
        drop_repeated_pairs,
        drop_cast_pairs,
    )
}


def _alike(one: Pair, other: Pair) -> bool:
    """Return whether two pairs compute the same: type, scales and zero points."""
    zeros = [zero_points_of(p.dequantize) for p in (one, other)]
    return same_scale(one, other) and zeros[0] is not None and zeros[1] is not None and bool(np.all(zeros[0] == zeros[1]))


def _dequantizers(quantize: ir.Node) -> list[ir.Node]:
    return [use.node for use in quantize.outputs[0].uses() if use.node.op_type == DEQUANTIZE]


def _along(array: NDArray[np.float32], pair: Pair, rank: int) -> NDArray[np.float32]:
    """Return scales or zero points in a shape that broadcasts over what they scale."""
    if array.size == 1:
        return array.reshape(())
    shape = [1] * rank
    shape[pair.axis] = -1
    return array.reshape(shape)


def _dequantized(pair: Pair) -> np.ndarray | None:
    """Return what a pair on a constant computes, in the arithmetic of the operators; None where it is blocked or not constant."""
    scale, zeros, source = pair.scale, zero_points_of(pair.dequantize), settled(pair.source)
    kind = settled(pair.dequantize.inputs[1])
    if scale is None or zeros is None or source is None or kind is None or "block_size" in pair.dequantize.attributes:
        return None
    codes = source if pair.quantize is None else _codes(pair)
    if codes is None:
        return None
    shifted = codes.astype(np.int64) - _along(zeros, pair, codes.ndim).astype(np.int64) if codes.dtype.kind in "iu" else codes
    exact = shifted.astype(np.float32) * _along(scale, pair, codes.ndim)
    return np.asarray(exact.astype(kind.dtype))


def _codes(pair: Pair) -> np.ndarray | None:
    """Return the codes that a QuantizeLinear of a constant gives: rounded half to even, saturated; None for a type other than 8 bits."""
    quantize, source, scale = pair.quantize, settled(pair.source), pair.scale
    zeros = zero_points_of(quantize) if quantize is not None else None
    if source is None or scale is None or zeros is None or pair.kind not in {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN}:
        return None
    if quantize is None or "block_size" in quantize.attributes or source.dtype != np.float32:
        return None
    scaled = source / _along(scale, pair, source.ndim)
    if pair.kind == ir.DataType.FLOAT8E4M3FN:
        return np.asarray(np.clip(scaled, -448, 448), pair.kind.numpy())
    limits = np.iinfo(pair.kind.numpy())
    return np.asarray(np.clip(np.rint(scaled) + _along(zeros, pair, source.ndim), limits.min, limits.max), pair.kind.numpy())
