"""Arithmetic of dimensions that are partly known: integer polynomials over the names of dynamic dimensions.

A shape ``[batch, 197, 3 * 64]`` and the integer tensors that a graph computes from it are NumPy arrays of objects whose
elements are integers or ``Dim``, so that Gather, Slice or Concat over them are plain NumPy indexing.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Monomial = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dim:
    """A polynomial with integer coefficients over symbols, each of which stands for a dimension and is never negative."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Size) -> Size:
        return _polynomial([*self.terms, *_terms(other)])

    def __mul__(self, other: Size) -> Size:
        return _polynomial([(tuple(sorted((*m, *n))), c * d) for m, c in self.terms for n, d in _terms(other)])

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + (-other)

    def __rsub__(self, other: int) -> Size:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __str__(self) -> str:
        return " + ".join("*".join([*([str(c)] if c != 1 or not m else []), *m]) for m, c in self.terms)

    @property
    def is_nonnegative(self) -> bool:
        """Return whether no value of the symbols makes this negative, as far as the signs of the coefficients tell."""
        return all(coefficient >= 0 for _, coefficient in self.terms)


Size = int | Dim


def symbol(name: str) -> Dim:
    """Return the dimension called ``name``."""
    return Dim((((name,), 1),))


def divide(total: Size, part: Size) -> Size | None:
    """Return the quotient if ``part`` is a single term that divides ``total`` whatever the symbols are, else None."""
    terms = _terms(part)
    if len(terms) != 1 or not terms[0][1]:
        return None
    (divisor, number), quotient = terms[0], []
    for monomial, coefficient in _terms(total):
        rest = Counter(monomial)
        rest.subtract(divisor)
        if coefficient % number or min(rest.values(), default=0) < 0:
            return None
        quotient.append((tuple(sorted(rest.elements())), coefficient // number))
    return _polynomial(quotient)


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of ``sizes``, 1 if there are none."""
    return math.prod(sizes, start=1)


def dimensions(value: ir.Value | None) -> tuple[Size, ...] | None:
    """Return the shape of ``value`` with a symbol for every dynamic dimension, or None if its rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(_parse(dim, f"?{value.name}.{axis}") for axis, dim in enumerate(value.shape))


def to_shape(sizes: Sequence[Size]) -> ir.Shape:
    """Return ``sizes`` as a shape of onnx_ir; a dimension without a name of its own stays unnamed."""
    return ir.Shape([d if isinstance(d, int) else None if "?" in str(d) else str(d) for d in sizes])


def is_anonymous(size: Size) -> bool:
    """Return whether a dimension is known by nothing but a placeholder."""
    return isinstance(size, Dim) and any(name.startswith(("?", "unk__")) for monomial, _ in size.terms for name in monomial)


def _parse(dim: int | ir.SymbolicDim, fallback: str) -> Size:
    if isinstance(dim, int):
        return dim
    text = dim.value
    if not text:
        return symbol(fallback)
    if text.isidentifier():
        return symbol(text)
    try:
        return _expression(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        return symbol(text)


def _expression(node: ast.expr) -> Size:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_expression(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _expression(left) + _expression(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _expression(left) - _expression(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _expression(left) * _expression(right)
    raise ValueError(ast.dump(node))


def _terms(size: Size) -> tuple[tuple[Monomial, int], ...]:
    return size.terms if isinstance(size, Dim) else (((), size),)


def _polynomial(terms: Iterable[tuple[Monomial, int]]) -> Size:
    total: Mapping[Monomial, int] = Counter()
    for monomial, coefficient in terms:
        total[monomial] += coefficient  # type: ignore[index]
    kept = sorted((m, c) for m, c in total.items() if c)
    if all(not m for m, _ in kept):
        return kept[0][1] if kept else 0
    return Dim(tuple(kept))
