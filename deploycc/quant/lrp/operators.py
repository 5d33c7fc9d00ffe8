"""How operators compute in torch: one decorated function per operator, and the elementwise ones.

An operator takes a node and its inputs (None where an optional one is absent) and returns its outputs. Floating-point values are
of torch's default type, float32 unless it was set, whatever the model stores; integers and booleans keep their types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from deploycc.core.graph import attribute, float_attribute

if TYPE_CHECKING:
    import onnx_ir as ir

Inputs = Sequence[Tensor | None]
Compute = Callable[["ir.Node", Inputs], "Tensor | tuple[Tensor, ...]"]
C = TypeVar("C", bound=Compute)
_OPERATORS: dict[tuple[str, str], Compute] = {}


def operator(*names: str, domain: str = "") -> Callable[[C], C]:
    """Register a function as the computation of the operators ``names``."""

    def register(compute: C) -> C:
        _OPERATORS.update(dict.fromkeys(((domain, name) for name in names), compute))
        return compute

    return register


def computation(node: ir.Node) -> Compute | None:
    """Return how ``node`` computes, or None when torch has not been taught."""
    return _OPERATORS.get((node.domain, node.op_type))


def given(inputs: Inputs, position: int) -> Tensor | None:
    """Return an optional input, None where it is absent."""
    return inputs[position] if len(inputs) > position else None


def present(inputs: Inputs) -> list[Tensor]:
    """Return the inputs that are there."""
    return [x for x in inputs if x is not None]


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x.view_as(x),
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}

_PAIRWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Pow": lambda x, exponent: torch.pow(x, exponent.to(x.dtype)),
    "Sub": torch.sub,
    "Sum": torch.add,
    "Xor": torch.logical_xor,
}


@operator(*_UNARY)
def _unary(node: ir.Node, inputs: Inputs) -> Tensor:
    return _UNARY[node.op_type](present(inputs)[0])


@operator("Dropout")
def _dropout(node: ir.Node, inputs: Inputs) -> Tensor:
    x = present(inputs)[0]
    return x.view_as(x)


@operator(*_PAIRWISE)
def _pairwise(node: ir.Node, inputs: Inputs) -> Tensor:
    return reduce(_PAIRWISE[node.op_type], present(inputs))


@operator("Mean")
def _mean(node: ir.Node, inputs: Inputs) -> Tensor:
    return reduce(torch.add, present(inputs)) / len(present(inputs))


@operator("Div")
def _div(node: ir.Node, inputs: Inputs) -> Tensor:
    x, y = present(inputs)
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


@operator("Mod")
def _mod(node: ir.Node, inputs: Inputs) -> Tensor:
    x, y = present(inputs)
    return torch.fmod(x, y) if attribute(node, "fmod", 0) else torch.remainder(x, y)


@operator("Where")
def _where(node: ir.Node, inputs: Inputs) -> Tensor:
    condition, x, y = present(inputs)
    return torch.where(condition, x, y)


@operator("Clip")
def _clip(node: ir.Node, inputs: Inputs) -> Tensor:
    x, low, high = present(inputs)[0], given(inputs, 1), given(inputs, 2)
    return x.view_as(x) if low is None and high is None else torch.clamp(x, low, high)


@operator("Gelu")
def _gelu(node: ir.Node, inputs: Inputs) -> Tensor:
    return functional.gelu(present(inputs)[0], approximate=str(attribute(node, "approximate", "none")))


@operator("LeakyRelu")
def _leaky_relu(node: ir.Node, inputs: Inputs) -> Tensor:
    return functional.leaky_relu(present(inputs)[0], float_attribute(node, "alpha", 0.01))


@operator("Elu")
def _elu(node: ir.Node, inputs: Inputs) -> Tensor:
    return functional.elu(present(inputs)[0], float_attribute(node, "alpha", 1.0))


@operator("HardSigmoid")
def _hard_sigmoid(node: ir.Node, inputs: Inputs) -> Tensor:
    slope, offset = float_attribute(node, "alpha", 0.2), float_attribute(node, "beta", 0.5)
    return torch.clamp(present(inputs)[0] * slope + offset, 0, 1)


@operator("Swish")
def _swish(node: ir.Node, inputs: Inputs) -> Tensor:
    x = present(inputs)[0]
    return x * torch.sigmoid(float_attribute(node, "alpha", 1.0) * x)
