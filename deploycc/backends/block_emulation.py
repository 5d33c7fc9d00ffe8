"""Write what TensorRT computes in blocks by standard operators, so that a CPU executes it: NVFP4 and MXFP8, stored and on the fly.

Every number is the one that the formulas of ``deploycc.core.blocks`` give: E4M3 is rounded by ``Cast``, E2M1 by ``Round`` in steps of a
half, one and two, whose ties go to even codes. ONNX Runtime executes INT4 in blocks itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from deploycc.core.blocks import DYNAMIC_OPERATORS, MX_DEQUANTIZE, is_block_operator
from deploycc.core.formats import MXFP8, NVFP4
from deploycc.core.graph import add_initializer, constant, int_attribute
from deploycc.core.quantizers import largest_code

if TYPE_CHECKING:
    from collections.abc import Iterator

_FP8_TOP = 448.0
_TYPES = {"Shape": ir.DataType.INT64, **dict.fromkeys(("Greater", "GreaterOrEqual", "Less"), ir.DataType.BOOL)}
_STORED = frozenset({ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E8M0})


def uses_blocks(model: ir.Model) -> bool:
    """Return whether ``model`` holds what `expand_blocks` rewrites."""
    return any(_is_foreign(node) for node in _nodes(model))


def expand_blocks(model: ir.Model) -> ir.Model:
    """Return a copy of ``model`` that holds standard operators and types that ONNX Runtime's CPU provider has."""
    copy = model.clone()
    for node in [n for n in _nodes(copy) if _is_foreign(n)]:
        _Expansion(node, copy.graph).replace()
    # Codes are FLOAT from here on: what still reads them multiplies.
    for node in [n for n in _nodes(copy) if _reads_floats(n)]:
        _Expansion(node, copy.graph).replace_dequantizer()
    return copy


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _is_foreign(node: ir.Node) -> bool:
    if is_block_operator(node):
        return True
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    return codes is not None and codes.dtype in _STORED


def _reads_floats(node: ir.Node) -> bool:
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    return codes is not None and codes.dtype == ir.DataType.FLOAT


class _Expansion:
    """Replaces one node by standard ones right before it; constants go into the main graph, which every body sees."""

    def __init__(self, node: ir.Node, main: ir.Graph) -> None:
        self.node, self.main, self.count = node, main, 0

    def replace(self) -> None:
        """Replace the node, or the codes that it reads where those are stored."""
        if self.node.op_type in DYNAMIC_OPERATORS:
            codes, scale = self._dynamic()
            self._give(0, codes)
            self._give(1, scale)
        elif self.node.op_type == MX_DEQUANTIZE:
            self._give(0, self._as(self._product(*map(self._wide, self.node.inputs)), self.node.outputs[0].dtype))
        else:
            self.node.replace_input_with(0, self._wide(self.node.inputs[0]))
            return
        self._remove()

    def replace_dequantizer(self) -> None:
        """Replace ``DequantizeLinear`` of codes that are FLOAT by their product with the scale."""
        codes, scale = (self._wide(v) for v in self.node.inputs[:2])
        self._give(0, self._as(self._product(codes, scale), self.node.outputs[0].dtype))
        self._remove()

    def _dynamic(self) -> tuple[ir.Value, ir.Value]:
        """Return codes and scales, both as FLOAT, of what the engine quantizes as it runs."""
        value = self._wide(self.node.inputs[0])
        size = int_attribute(self.node, "block_size", 0)
        blocks = self._op("Reshape", value, self._split(value, size))
        limit = self._op("ReduceMax", self._op("Abs", blocks), self._ints([-1]), keepdims=1)
        if self.node.op_type == MX_DEQUANTIZE or len(self.node.inputs) == 1:
            scale = self._power_above(self._op("Div", limit, self._number(largest_code(MXFP8))))
            codes = self._eight_bits(self._op("Div", blocks, scale))
        else:
            whole = self._wide(self.node.inputs[1])
            scale = self._eight_bits(self._op("Div", limit, self._op("Mul", whole, self._number(largest_code(NVFP4)))))
            codes = self._four_bits(blocks, self._op("Mul", scale, whole))
        return self._op("Reshape", codes, self._op("Shape", value)), self._op("Squeeze", scale, self._ints([-1]))

    def _power_above(self, ratio: ir.Value) -> ir.Value:
        """Return the least power of two that is no smaller than ``ratio``, 1 for 0; the logarithm is right to one, and then corrected."""
        one, two = self._number(1.0), self._number(2.0)
        safe = self._op("Where", self._op("Greater", ratio, self._number(0.0)), ratio, one)
        guess = self._op("Pow", two, self._op("Ceil", self._op("Div", self._op("Log", safe), self._number(float(np.log(2.0))))))
        half = self._op("Div", guess, two)
        lower = self._op("Where", self._op("GreaterOrEqual", half, safe), half, guess)
        return self._op("Where", self._op("Less", lower, safe), self._op("Mul", lower, two), lower)

    def _eight_bits(self, value: ir.Value) -> ir.Value:
        clipped = self._op("Clip", value, self._number(-_FP8_TOP), self._number(_FP8_TOP))
        return self._as(self._as(clipped, ir.DataType.FLOAT8E4M3FN), ir.DataType.FLOAT)

    def _four_bits(self, blocks: ir.Value, scale: ir.Value) -> ir.Value:
        """Return ``blocks / scale`` on the grid of E2M1; nothing where the scale is nothing."""
        top, one, two, four = (self._number(v) for v in (largest_code(NVFP4), 1.0, 2.0, 4.0))
        positive = self._op("Greater", scale, self._number(0.0))
        ratio = self._op("Div", blocks, self._op("Where", positive, scale, one))
        ratio = self._op("Clip", ratio, self._op("Neg", top), top)
        size = self._op("Abs", ratio)
        coarse = self._op("Where", self._op("Less", size, four), one, two)
        step = self._op("Where", self._op("Less", size, two), self._number(0.5), coarse)
        rounded = self._op("Mul", self._op("Round", self._op("Div", ratio, step)), step)
        return self._op("Where", positive, rounded, self._number(0.0))

    def _product(self, codes: ir.Value, scale: ir.Value) -> ir.Value:
        size = int_attribute(self.node, "block_size", 0)
        if not size:
            return self._op("Mul", codes, scale)
        rank = len(codes.shape) if codes.shape is not None else 0
        axis = int_attribute(self.node, "axis", 1) % max(rank, 1)
        blocks = self._op("Reshape", codes, self._split(codes, size, axis=axis))
        return self._op("Reshape", self._op("Mul", blocks, self._op("Unsqueeze", scale, self._ints([axis + 1]))), self._op("Shape", codes))

    def _split(self, value: ir.Value, size: int, axis: int = -1) -> ir.Value:
        """Return the shape of ``value`` with the blocks along ``axis`` as an axis of their own behind it."""
        shape = value.shape
        if shape is None:
            raise TypeError(f"the rank of '{value.name}' is not known")
        place = axis % len(shape)
        if place == len(shape) - 1:
            return self._ints([*([0] * place), -1, size])
        return self._ints([*(int(d) for d in shape[:place]), -1, size, *(int(d) for d in shape[place + 1 :])])  # type: ignore[arg-type]

    def _wide(self, value: ir.Value | None) -> ir.Value:
        """Return ``value`` as FLOAT; stored codes and scales become constants."""
        if value is None:
            raise TypeError(f"'{self.node.name}' lacks an operand")
        array = constant(value)
        if array is None:
            return value if value.dtype == ir.DataType.FLOAT else self._as(value, ir.DataType.FLOAT)
        is_exponent = self.node.op_type == MX_DEQUANTIZE and array.dtype == np.uint8
        wide = array.view(ml_dtypes.float8_e8m0fnu) if is_exponent else array
        return add_initializer(self.main, f"{value.name}_wide", np.ascontiguousarray(wide.astype(np.float32)))

    def _as(self, value: ir.Value, kind: ir.DataType | None) -> ir.Value:
        wanted = kind or ir.DataType.FLOAT
        if value.dtype == wanted:
            return value
        cast = self._op("Cast", value, to=int(wanted))
        cast.type = ir.TensorType(wanted)
        return cast

    def _op(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes, name=f"{self.node.name}/{self.count}")
        self.count += 1
        out = node.outputs[0]
        out.name, out.type = f"{node.name}_out", ir.TensorType(_TYPES.get(operator, ir.DataType.FLOAT))
        graph = self.node.graph
        if graph is None:
            raise TypeError(f"'{self.node.name}' belongs to no graph")
        graph.insert_before(self.node, node)
        return out

    def _number(self, value: float) -> ir.Value:
        return add_initializer(self.main, f"{self.node.name}/number", np.array(value, np.float32))

    def _ints(self, values: list[int]) -> ir.Value:
        return add_initializer(self.main, f"{self.node.name}/ints", np.array(values, np.int64))

    def _give(self, position: int, value: ir.Value) -> None:
        """Let every reader of an output read ``value`` instead."""
        old = self.node.outputs[position]
        value.shape = old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)

    def _remove(self) -> None:
        graph = self.node.graph
        if graph is not None:
            graph.remove(self.node, safe=True)
