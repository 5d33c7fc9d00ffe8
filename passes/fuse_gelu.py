"""Fuse the erf and the tanh form of GELU into ``Gelu``."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from deploycc.core.graph import escapes, opset, rank, scalar, substitute
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

if TYPE_CHECKING:
    from collections.abc import Iterator

# A polynomial in x and t, the output of Erf or Tanh: {(power of x, power of t): coefficient}.
Polynomial = dict[tuple[int, int], float]

_ERF_ARGUMENT: Polynomial = {(1, 0): math.sqrt(0.5)}
_TANH_ARGUMENT: Polynomial = {(1, 0): math.sqrt(2 / math.pi), (3, 0): 0.044715 * math.sqrt(2 / math.pi)}
_HALVES: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Neg"})
_DEPTH = 8


@dataclass(frozen=True, slots=True)
class FuseGelu:
    """Fuse the erf and the tanh form of GELU into ``Gelu``.

    Why: one kernel for five, and one region for the precision plan.

    Before / After:
        ``Mul(Mul(x, Add(Erf(Div(x, 1.4142135)), 1)), 0.5)`` / ``Gelu(x)``
        ``0.5 x (1 + Tanh(0.79788 (x + 0.044715 x^3)))`` / ``Gelu(x, approximate="tanh")``
        The arithmetic may be written in any order: both sides are compared as polynomials in x and in the Erf or Tanh.

    Declines when:
        OPSET: the model is below opset 20, which has no Gelu.
        MULTI_CONSUMER: a value inside the pattern is read elsewhere or is a graph output.
        CONSTANTS: the form is that of GELU, the constants are not.

    Options:
        tolerance: the relative error allowed in a coefficient; the default is what two constants rounded to FP16 cost.

    See: ONNX Gelu-20; Hendrycks and Gimpel, arXiv 1606.08415.
    """

    tolerance: float = 2.0**-10

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity")

    def __call__(self, model: ir.Model) -> PassResult:
        """Fuse every GELU of the graph."""
        rewrites, declines = [], []
        for node in [n for n in model.graph if n.op_type in {"Erf", "Tanh"}]:
            match self.recognise(node, opset(model)):
                case Decline() as declined:
                    declines.append(declined)
                case _Match(source=source, region=region, last=last):
                    form = "none" if node.op_type == "Erf" else "tanh"
                    substitute(last, "Gelu", [source], attributes=[ir.AttrString("approximate", form)], absorbed=region)
                    rewrites.append(
                        Rewrite(last.name or "", f"{len(region) + 1} nodes became Gelu", f"constants within {self.tolerance:g}")
                    )
        return PassResult(tuple(rewrites), tuple(declines))

    def recognise(self, node: ir.Node, version: int) -> _Match | Decline | None:
        """Return the GELU around an Erf or Tanh node, why it is not fused, or None if there is none."""
        form = _ERF_ARGUMENT if node.op_type == "Erf" else _TANH_ARGUMENT
        for source in _sources(node.inputs[0]):
            argument = _expand(node.inputs[0], source, None)
            if argument is None or argument.keys() != form.keys():
                continue
            last = _climb(node, source)
            if last is None:
                continue
            anchor, region = last.name or "", [n for n in _between(last, source) if n is not last]
            whole = _expand(last.outputs[0], source, node.outputs[0])
            if not self.equal(argument, form) or whole is None or not self.equal(whole, _HALVES):
                return Decline(anchor, "CONSTANTS", f"the argument is {_show(argument)} and the result {_show(whole or {})}")
            if version < 20:
                return Decline(anchor, "OPSET", f"Gelu came with opset 20, the model is at {version}")
            if (value := escapes(region, last)) is not None:
                return Decline(anchor, "MULTI_CONSUMER", f"'{value.name}' is read outside the pattern")
            return _Match(source, region, last)
        return None

    def equal(self, found: Polynomial, expected: Polynomial) -> bool:
        """Return whether two polynomials have the same terms and nearly the same coefficients."""
        return found.keys() == expected.keys() and all(math.isclose(found[k], expected[k], rel_tol=self.tolerance) for k in expected)


@dataclass(frozen=True, slots=True)
class _Match:
    source: ir.Value
    region: list[ir.Node]
    last: ir.Node


def _show(polynomial: Polynomial) -> str:
    return " + ".join(f"{c:g} x^{p} t^{q}" for (p, q), c in sorted(polynomial.items())) or "something else"


def _operands(value: ir.Value | None) -> list[ir.Value]:
    """Return the computed operands of the arithmetic node that gives ``value``."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in _ARITHMETIC:
        return []
    return [v for v in node.inputs if v is not None and scalar(v) is None]


def _sources(value: ir.Value | None, depth: int = _DEPTH) -> Iterator[ir.Value]:
    """Yield what might be x: the operands below ``value``, the nearest first."""
    level = _operands(value)
    for _ in range(depth):
        yield from dict.fromkeys(level)
        level = [v for each in dict.fromkeys(level) for v in _operands(each)]


def _expand(value: ir.Value | None, x: ir.Value, t: ir.Value | None, depth: int = _DEPTH) -> Polynomial | None:
    """Return ``value`` as a polynomial in ``x`` and ``t``, or None if it is none."""
    if value is x:
        return {(1, 0): 1.0}
    if t is not None and value is t:
        return {(0, 1): 1.0}
    number = scalar(value)
    if number is not None:
        return {(0, 0): number} if _broadcasts_into(value, x) else None
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in _ARITHMETIC or not depth:
        return None
    parts = [_expand(v, x, t, depth - 1) for v in node.inputs]
    known = [p for p in parts if p is not None]
    return _combine(node.op_type, known) if len(known) == len(parts) else None


def _broadcasts_into(number: ir.Value | None, x: ir.Value) -> bool:
    own, other = rank(number), rank(x)
    return own == 0 or (own is not None and other is not None and own <= other)


def _combine(operator: str, parts: list[Polynomial]) -> Polynomial | None:
    first, second = parts[0], parts[-1]
    match operator:
        case "Add":
            return _sum(first, second, 1.0)
        case "Sub":
            return _sum(first, second, -1.0)
        case "Neg":
            return _sum({}, first, -1.0)
        case "Mul":
            return _product(first, second)
        case "Div" if second.keys() == {(0, 0)} and second[0, 0]:
            return {k: c / second[0, 0] for k, c in first.items()}
        case "Pow" if second in ({(0, 0): 2.0}, {(0, 0): 3.0}):
            square = _product(first, first)
            return square if second[0, 0] == 2 else _product(square, first)
    return None


def _sum(first: Polynomial, second: Polynomial, sign: float) -> Polynomial:
    return {k: first.get(k, 0.0) + sign * second.get(k, 0.0) for k in {**first, **second}}


def _product(first: Polynomial, second: Polynomial) -> Polynomial:
    result: Counter[tuple[int, int]] = Counter()
    for (p, q), c in first.items():
        for (r, s), d in second.items():
            result[p + r, q + s] += c * d  # type: ignore[assignment]
    return dict(result)


def _climb(node: ir.Node, x: ir.Value) -> ir.Node | None:
    """Return the first node above ``node`` whose output has the terms of x/2 + x t/2."""
    current: ir.Node | None = node
    found = None
    for _ in range(4):
        current = _next_reader(current, x, node.outputs[0]) if current is not None else None
        if current is None:
            break
        terms = _expand(current.outputs[0], x, node.outputs[0])
        if terms is not None and terms.keys() == _HALVES.keys():
            found = current
            if math.isclose(terms[1, 1], 0.5, rel_tol=1e-2):
                break
    return found


def _next_reader(node: ir.Node, x: ir.Value, t: ir.Value) -> ir.Node | None:
    readers = [use.node for use in node.outputs[0].uses() if use.node.op_type in _ARITHMETIC and use.node.graph is node.graph]
    readable = [n for n in readers if _expand(n.outputs[0], x, t) is not None]
    return readable[0] if readable else None


def _between(last: ir.Node, source: ir.Value) -> list[ir.Node]:
    """Return the nodes from ``last`` down to ``source``, readers first."""
    found: dict[ir.Node, None] = {}
    stack = [last]
    while stack:
        node = stack.pop()
        found[node] = None
        for value in node.inputs:
            producer = value.producer() if value is not None and value is not source else None
            if producer is not None and producer not in found:
                stack.append(producer)
    return list(found)
