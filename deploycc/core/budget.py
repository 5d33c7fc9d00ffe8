"""Budgets: comma-separated bounds such as ``sqnr>=25dB,bits<=8``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deploycc.core.errors import UsageError

_BOUND = re.compile(r"(sqnr|accuracy-drop|bits|size|bops|latency)\s*(>=|<=)\s*([0-9.]+)\s*(dB|x)?")
_FORMS = {
    "sqnr": (">=", "dB"),
    "accuracy-drop": ("<=", None),
    "bits": ("<=", None),
    "size": ("<=", "x"),
    "bops": ("<=", "x"),
    "latency": ("<=", "x"),
}


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds; None where nothing is asked.

    ``sqnr`` in dB against the FP32 original (every output), ``accuracy_drop`` in points, ``bits`` per weight on average,
    ``size`` of the weights, ``bops`` (bit operations: multiplications times the bits of both operands) and ``latency`` (estimated) as
    a share of the base format's.
    """

    sqnr: float | None = None
    accuracy_drop: float | None = None
    bits: float | None = None
    size: float | None = None
    bops: float | None = None
    latency: float | None = None

    @property
    def bounds_error(self) -> bool:
        """Return whether the budget bounds the error, so that speed is what remains to optimise."""
        return self.sqnr is not None or self.accuracy_drop is not None

    def __str__(self) -> str:
        parts = [
            f"{name}{_FORMS[name][0]}{value:.15g}{_FORMS[name][1] or ''}"
            for name in _FORMS
            if (value := getattr(self, name.replace("-", "_"))) is not None
        ]
        return ",".join(parts)


def parse_budget(text: str) -> Budget:
    """Parse ``text``.

    Raises:
        UsageError: for an unknown bound, a wrong direction, a wrong unit, or a bound given twice.
    """
    found: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = _BOUND.fullmatch(part)
        name = match[1] if match else ""
        if not match or match[2] != _FORMS[name][0] or (match[4] or _FORMS[name][1]) != _FORMS[name][1] or name in found:
            raise UsageError(
                f"cannot read the bound '{part}'",
                at="--budget",
                fix="use sqnr>=25dB, accuracy-drop<=0.5, bits<=8, size<=0.5x, bops<=0.5x or latency<=0.7x, separated by commas, each once",
            )
        try:
            found[name] = float(match[3])
        except ValueError:
            raise UsageError(f"'{match[3]}' is not a number", at=f"--budget {part}", fix="write the bound with a plain number") from None
    return Budget(**{k.replace("-", "_"): v for k, v in found.items()})
