"""Every error that deploycc raises on purpose.

    DeployccError
    ├── UsageError       exit 2: the request cannot be met (bad input, bad option)
    ├── ContractError    exit 3: a stage produced a graph that breaks its contract, or a pass broke a law
    ├── BackendError     exit 4: a backend failed to build or to run an engine
    └── BudgetError      exit 5: everything worked, but a bound of the budget is missed

The text of an error says what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class DeployccError(Exception):
    """An error with a place (``at``) and a remedy (``fix``)."""

    exit_code = 1

    def __init__(self, what: str, *, at: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.at, self.fix = what, at, fix

    def __str__(self) -> str:
        parts = [self.what]
        if self.at:
            parts.append(f"Where: {self.at}.")
        if self.fix:
            parts.append(f"Fix: {self.fix}.")
        head = parts[0] if parts[0].endswith((".", "!", "?")) else parts[0] + "."
        return " ".join([head, *parts[1:]])


class UsageError(DeployccError):
    """The request cannot be met: bad input or a bad option."""

    exit_code = 2


class ContractError(DeployccError):
    """A graph breaks the contract of its stage."""

    exit_code = 3


class BackendError(DeployccError):
    """A backend failed to build or to run an engine."""

    exit_code = 4


class BudgetError(DeployccError):
    """The result is sound but misses a bound of the budget."""

    exit_code = 5
