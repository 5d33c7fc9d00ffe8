"""The interface of a served model: names, types and shapes of its tensors, and how requests are joined into batches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycc.core.shapes import Profile

# The names of the KServe v2 inference protocol, which Triton prefixes with TYPE_.
DATATYPES = {
    ir.DataType.FLOAT: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.DOUBLE: "FP64",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT16: "INT16",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.UINT16: "UINT16",
    ir.DataType.UINT32: "UINT32",
    ir.DataType.UINT64: "UINT64",
    ir.DataType.BOOL: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor at the border of a model: ``shape`` has -1 where a dimension is dynamic."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InputSpec(TensorSpec):
    """An input, with the shapes of its optimization profile."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Interface:
    """Inputs and outputs in the model's order; ``batch`` is the range of the first dimension that all of them share, or None."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[int, int, int] | None

    def rows(self) -> dict[str, Any]:
        """Return the part of ``bundle.json`` that says this."""
        batch = dict(zip(("minimum", "optimum", "maximum"), self.batch, strict=True)) if self.batch else None
        return {"inputs": [asdict(i) for i in self.inputs], "outputs": [asdict(o) for o in self.outputs], "batch": batch}


def interface_of(model: ir.Model, profiles: Sequence[Profile]) -> Interface:
    """Return the interface of ``model`` served in ``profiles``.

    The first dimension is the batch when every input and output has a dynamic one of the same symbol, and the profiles
    give all inputs the same range. Whether samples are independent is for the golden outputs to show.

    Raises:
        UsageError: for a tensor whose type no server transports.
    """
    ranges = {p.name: p for p in profiles}
    inputs = tuple(_input(value, ranges[value.name or ""]) for value in model.graph.inputs)
    outputs = tuple(TensorSpec(value.name or "", _datatype(value), _shape(value)) for value in model.graph.outputs)
    symbols = {str(v.shape[0]) if v.shape else "" for v in (*model.graph.inputs, *model.graph.outputs)}
    sizes = {(i.minimum[:1], i.optimum[:1], i.maximum[:1]) for i in inputs}
    is_batched = len(symbols) == len(sizes) == 1 and all(t.shape[:1] == (-1,) for t in (*inputs, *outputs))
    batch = (inputs[0].minimum[0], inputs[0].optimum[0], inputs[0].maximum[0]) if is_batched else None
    return Interface(inputs, outputs, batch)


def _input(value: ir.Value, profile: Profile) -> InputSpec:
    return InputSpec(value.name or "", _datatype(value), _shape(value), profile.minimum, profile.optimum, profile.maximum)


def _datatype(value: ir.Value) -> str:
    if value.dtype not in DATATYPES:
        raise UsageError(f"'{value.name}' is {value.dtype}, which no inference protocol transports", at="the model", fix="cast it to FP32")
    return DATATYPES[value.dtype]


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else -1 for d in value.shape) if value.shape is not None else ()
