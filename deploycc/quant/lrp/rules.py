"""How relevance passes each operator: one decorated function per rule. Every rule conserves the sum over its inputs.

``R`` is the relevance of an output, ``x`` an input. ``x+`` and ``x-`` are the positive and the negative part. Constants take no
relevance: it belongs to what was computed from the image. Sources: Chefer, Gur and Wolf 2021 (transformers), Bach et al. 2015
(alpha-beta), Montavon et al. 2017 (z^B). ``docs/relevance.md`` has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from deploycc.core.errors import UsageError
from deploycc.core.graph import attribute
from deploycc.quant.lrp.tape import Parts, Step, pull

Rule = Callable[[Step, list[Tensor]], Parts]
R = TypeVar("R", bound=Rule)
TINY = 1e-9
_RULES: dict[tuple[str, str], Rule] = {}


def rule(*names: str, domain: str = "") -> Callable[[R], R]:
    """Register a function as the rule of the operators ``names``: from a step and the relevance of its outputs to that of its inputs."""

    def register(function: R) -> R:
        _RULES.update(dict.fromkeys(((domain, name) for name in names), function))
        return function

    return register


def ruled_functions() -> frozenset[tuple[str, str]]:
    """Return the operators outside ONNX's own domain that have a rule, and so stay whole."""
    return frozenset((domain, name) for domain, name in _RULES if domain)


def propagator(*, fallback: str | None = None) -> Rule:
    """Return the function that applies each node's rule.

    Args:
        fallback: ``gradient`` for ``x * dy/dx * R/y`` where an operator has no rule, None to refuse it: the returned function
            then raises a UsageError that names the node.
    """

    def propagate(step: Step, relevance: list[Tensor]) -> Parts:
        found = _RULES.get((step.node.domain, step.node.op_type))
        if found is None and fallback is None:
            raise UsageError(
                f"relevance cannot pass the operator {step.node.op_type}, which has no rule",
                at=f"node '{step.node.name}'",
                fix="use --relevance-fallback gradient, or register a rule with deploycc.quant.lrp.rules.rule",
            )
        return (found or bilinear)(step, relevance)

    return propagate


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / (max(b, t) + min(b, t))`` with ``t`` = 1e-9, that is ``a / (b + t)``, and 0 where ``b`` is zero."""
    divisor = b + TINY
    return (a / divisor).masked_fill_((b == 0).logical_or_(divisor == 0), 0.0)


def placed(step: Step, position: int, part: Tensor) -> Parts:
    """Return a list with ``part``, summed to the shape of that input, at ``position``."""
    shape = step.inputs[position].shape  # type: ignore[union-attr]
    return [part.sum_to_size(shape) if i == position else None for i in range(len(step.inputs))]


@rule(
    *("Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "PRelu"),
    *("Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "Pow", "Cos", "Sin"),
    *("BatchNormalization", "Dropout", "GroupNormalization", "Identity", "InstanceNormalization", "LayerNormalization"),
    *("LogSoftmax", "LpNormalization", "RMSNormalization", "Softmax", "Div"),
)
def identity(step: Step, relevance: list[Tensor]) -> Parts:
    """``R_x = R``: activations, normalisations, and quotients (to the numerator) are scales that pass relevance on."""
    return placed(step, step.carrying[0], relevance[0])


@rule(
    *("Cast", "CastLike", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "GlobalMaxPool"),
    *("MaxPool", "Pad", "ReduceMax", "ReduceMin", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose"),
    *("Trilu", "Unsqueeze", "Where", "Resize"),
)
def routing(step: Step, relevance: list[Tensor]) -> Parts:
    """``R_x = J^T R``: each element goes back where it came from; an interpolated one in proportion to the weights, which sum to 1."""
    return step.pull(list(relevance))


@rule("GridSample")
def sampling(step: Step, relevance: list[Tensor]) -> Parts:
    """``R_x = J_x^T R``: to the sampled map, in proportion to the interpolation; the grid says where, and takes none."""
    return [step.pull(list(relevance))[0] if step.carries[0] else None, None]


@rule("Max", "Min")
def winner(step: Step, relevance: list[Tensor]) -> Parts:
    """A bound by a constant is an activation; of two computed operands the larger (smaller) one takes all."""
    return identity(step, relevance) if len(step.carrying) == 1 else routing(step, relevance)


@rule("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")
def linear(step: Step, relevance: list[Tensor]) -> Parts:
    """Alpha-beta with alpha 1 and beta 0; z^B at the image; a product of two computed operands is bilinear. The bias takes none.

    ``S = R / (x+ W+ + x- W-)`` and ``R_x = x+ (S W+) + x- (S W-)``, written for any linear ``f(x, W)`` with ``S W`` its
    vector-Jacobian product. One divisor for both signs, so that relevance is not counted twice where ``x`` has both.
    """
    operands = [i for i in step.carrying if i < 2]
    if len(step.inputs) > 2 and step.carries[2] and step.node.op_type == "Gemm":
        raise UsageError(
            "relevance cannot pass a Gemm whose third operand is computed",
            at=f"node '{step.node.name}'",
            fix="write the sum as an Add",
        )
    if len(operands) != 1:
        return bilinear(step, relevance)
    (position,) = operands
    x, weight = step.inputs[position], step.inputs[1 - position]
    if x is None or weight is None:
        raise TypeError(f"'{step.node.name}' lacks an operand")
    x = x.detach()
    if step.at_image:
        return placed(step, position, _bounded(step, x, weight, relevance[0]))
    if step.node.op_type == "MatMul" and position == 0 and weight.ndim == 2:
        return placed(step, position, _shared_product(x, weight, step.outputs[0].detach(), relevance[0]))
    return placed(step, position, _shared(step, position, x, weight, relevance[0]))


def _shared_product(x: Tensor, weight: Tensor, y: Tensor, relevance: Tensor) -> Tensor:
    """Return the alpha-beta rule of ``y = x W`` with three products: ``x+ W+ + x- W- = (y + |x| |W|) / 2``.

    Where nothing is positive this is zero exactly, since both sums then have the same terms but for the sign.
    """
    share = safe_divide(relevance, torch.matmul(x.abs(), weight.abs()).add_(y))
    result = x.clamp(min=0).mul_(torch.matmul(share, weight.clamp(min=0).mul_(2).mT))
    return result.addcmul_(x.clamp(max=0), torch.matmul(share, weight.clamp(max=0).mul_(2).mT))


def _shared(step: Step, position: int, x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Return ``sum_k x_k J_k^T (R / sum_k f(x_k, W_k))`` over the two signs ``k`` that ``x`` has."""
    low, high = (v.item() for v in x.aminmax())
    pairs = [(x.clamp(min=0), weight.clamp(min=0))] if high > 0 else []
    pairs += [(x.clamp(max=0), weight.clamp(max=0))] if low < 0 else []
    leaves = [x.detach().requires_grad_() for x, _ in pairs]
    with torch.enable_grad():
        outputs = [_product(step, position, leaf, weight) for leaf, (_, weight) in zip(leaves, pairs, strict=True)]
    if not outputs:
        return torch.zeros_like(x)
    share = safe_divide(relevance, _sum(y.detach() for y in outputs))
    grads = torch.autograd.grad(outputs, leaves, [share] * len(outputs))
    return _sum(x.detach() * g for x, g in zip(leaves, grads, strict=True))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _product(step: Step, position: int, x: Tensor, weight: Tensor) -> Tensor:
    """Return the linear node without its bias for other operands."""
    result = step.compute(step.node, [x, weight] if position == 0 else [weight, x])
    return result if isinstance(result, Tensor) else result[0]


def _bounded(step: Step, x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Return the z^B rule, with the bounds l and h of each sample.

    ``S = R / (x W - l W+ - h W-)`` and ``R_x = x (S W) - l (S W+) - h (S W-) = (x - l) (S W+) + (x - h) (S W-)``.
    """
    low, high = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in (x.flatten(1).amin(1), x.flatten(1).amax(1)))
    parts, leaves = [weight.clamp(min=0), weight.clamp(max=0)], [x.clone().requires_grad_() for _ in range(2)]
    with torch.enable_grad():
        outputs = [_product(step, 0, leaf, part) for leaf, part in zip(leaves, parts, strict=True)]
    floor, roof = (bound * _product(step, 0, torch.ones_like(x[:1]), part) for bound, part in zip((low, high), parts, strict=True))
    share = safe_divide(relevance, outputs[0].detach() + outputs[1].detach() - floor - roof)
    grads = torch.autograd.grad(outputs, leaves, [share, share])
    return (x - low) * grads[0] + (x - high) * grads[1]


@rule("Add", "Sub", "Sum", "Mean")
def addition(step: Step, relevance: list[Tensor]) -> Parts:
    """``a = u R/(u+v)`` and ``b = v R/(u+v)``, rescaled per sample so that each keeps a share of ``sum R`` by ``|sum a| : |sum b|``.

    A constant operand (a bias, a position embedding) takes none.
    """
    positions = step.carrying
    if len(positions) == 1:
        return identity(step, relevance)
    shape = step.outputs[0].shape
    operands = [step.inputs[i].detach().expand(shape) for i in positions]  # type: ignore[union-attr]
    if step.node.op_type == "Sub":
        operands[1] = -operands[1]
    ratio = safe_divide(relevance[0], _sum(operands))
    parts = [u * ratio for u in operands]
    sums = [step.totals(a) for a in parts]
    whole, wanted = _sum(s.abs() for s in sums), step.totals(relevance[0])
    result: Parts = [None] * len(step.inputs)
    for i, part, total in zip(positions, parts, sums, strict=True):
        kept = part * safe_divide(safe_divide(total.abs(), whole) * wanted, total)
        result[i] = kept.sum_to_size(step.inputs[i].shape)  # type: ignore[union-attr]
    return result


@rule("Mul")
def product(step: Step, relevance: list[Tensor]) -> Parts:
    """A scale passes relevance on; of two computed operands (a gate) each takes half, as in a matrix product."""
    result: Parts = [None] * len(step.inputs)
    for i in step.carrying:
        result[i] = (relevance[0] / len(step.carrying)).sum_to_size(step.inputs[i].shape)  # type: ignore[union-attr]
    return result


@rule("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum")
def averaging(step: Step, relevance: list[Tensor]) -> Parts:
    """Alpha-beta for equal positive weights: ``R_x = x+ J^T (R / f(x+))``; a window without a positive element shares by ``x`` itself."""
    x = step.inputs[0].detach()  # type: ignore[union-attr]
    leaf = x.clamp(min=0).requires_grad_()
    with torch.enable_grad():
        found = step.compute(step.node, [leaf, *step.inputs[1:]])
    positive = found if isinstance(found, Tensor) else found[0]
    dark = positive.detach() == 0
    (gradient,) = torch.autograd.grad([positive], [leaf], [safe_divide(relevance[0], positive.detach())])
    result = leaf.detach() * gradient
    if bool(dark.any()):
        rest = step.pull([torch.where(dark, safe_divide(relevance[0], step.outputs[0].detach()), 0.0)])[0]
        result = result if rest is None else result + x * rest
    return placed(step, 0, result)


def bilinear(step: Step, relevance: list[Tensor]) -> Parts:
    """``R_u = u J_u^T (R/y)`` for every computed operand, divided by their number, since each alone conserves."""
    shares = [safe_divide(r, y.detach()) for r, y in zip(relevance, step.outputs, strict=True)]
    found, count = pull(step.outputs, step.inputs, step.carries, shares), len(step.carrying)
    return [None if g is None or x is None else x.detach() * g / count for g, x in zip(found, step.inputs, strict=True)]


@rule("DCNv3", "DCNv3Center", domain="deploycc")
def deformable(step: Step, relevance: list[Tensor]) -> Parts:
    """Bilinear in the values and the mask, each half, as ``A V`` of an attention; the offsets say where, and take none.

    The operator is linear in the values alone where the mask holds logits or a center is blended in: then they take all.
    """
    shares = [safe_divide(r, y.detach()) for r, y in zip(relevance, step.outputs, strict=True)]
    linear_in_mask = step.node.op_type == "DCNv3" and not any(attribute(step.node, name, 0) for name in ("softmax", "record"))
    found, sharing = step.pull(shares), [i for i in ((0, 2) if linear_in_mask else (0,)) if step.carries[i]]
    return [
        None if g is None or x is None or i not in sharing else x.detach() * g / len(sharing)
        for i, (g, x) in enumerate(zip(found, step.inputs, strict=True))
    ]
