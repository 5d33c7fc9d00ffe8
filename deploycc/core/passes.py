"""What a pass is, what it returns, and the runner that makes it a transaction.

A pass is a frozen dataclass whose fields are its options. Calling it edits the given model in place and returns evidence:
every rewrite with its proof obligation, and every place it declined, with a reason code. The runner hands it a clone, so
that a failing pass changes nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from deploycc.core.contract import SOUND, Contract, violations
from deploycc.core.errors import ContractError, DeployccError
from deploycc.core.graph import remove_unused_initializers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

Phase = Literal["import", "canonicalize", "prepare", "reparameterize", "quantize", "lower"]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One place that a pass changed; ``proof`` is ``exact`` or the error bound it claims."""

    anchor: str
    what: str
    proof: str = "exact"


@dataclass(frozen=True, slots=True)
class Decline:
    """One place that a pass recognised and left alone, with the reason."""

    anchor: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class PassResult:
    """The evidence of one run of a pass."""

    rewrites: tuple[Rewrite, ...] = ()
    declines: tuple[Decline, ...] = ()

    @property
    def modified(self) -> bool:
        """Return whether the pass changed anything; derived, never claimed."""
        return bool(self.rewrites)


@runtime_checkable
class Pass(Protocol):
    """A graph pass; ``repr`` is its spec, its cache key and its line in the report."""

    phase: ClassVar[Phase]
    after: ClassVar[tuple[str, ...]]

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model`` in place and return what was done."""
        ...


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What the report says of one pass; ``rolled_back`` says why its rewrites were undone, if they were."""

    spec: str
    seconds: float
    nodes_before: int
    nodes_after: int
    rewrites: tuple[Rewrite, ...] = field(default=())
    declines: tuple[Decline, ...] = field(default=())
    rolled_back: str = ""


class Instrument(Protocol):
    """Watches passes from outside: writes graphs down, or compares them."""

    def after(self, each: Pass, before: ir.Model, result: ir.Model) -> str:
        """Look at one modified graph; return why it must be rolled back, or an empty string."""
        ...


class PassCrashed(ContractError):
    """A pass raised an exception; ``each`` and ``model`` (the graph it was given) reproduce it."""

    def __init__(self, each: Pass, model: ir.Model, error: Exception) -> None:
        super().__init__(
            f"the pass {each!r} failed with {type(error).__name__}: {error}",
            at=f"a graph of {model.graph.num_nodes()} nodes",
            fix="report it with the model; the build directory was left as it was",
        )
        self.each, self.model = each, model


def run(
    model: ir.Model, passes: Sequence[Pass], *, contract: Contract, instruments: Sequence[Instrument] = ()
) -> tuple[ir.Model, list[PassRecord]]:
    """Apply ``passes`` in order to a clone of ``model`` and check ``contract`` on the result.

    Each pass is a transaction: what it did stays only if it reports rewrites, the result is sound, and no instrument objects. Otherwise
    it is rolled back, and its record says why. Passes are deterministic, so the graph before a pass is made again, where it is needed,
    by the passes that were kept; only instruments, which compare, have it cloned each time.

    Raises:
        PassCrashed: if a pass raises; the given model is untouched.
        ContractError: if the final graph breaks ``contract``.
    """
    current, records = model.clone(), []
    kept: list[Pass] = []
    for each in passes:
        before = current.clone() if instruments else None
        nodes, start = current.graph.num_nodes(), time.perf_counter()
        try:
            result = _apply(each, current)
        except DeployccError:
            raise
        except Exception as error:
            raise PassCrashed(each, before or _again(model, kept), error) from error
        seconds, objection = time.perf_counter() - start, _objection(each, before, current, instruments) if result.modified else ""
        if objection:
            current = before or _again(model, kept)
        elif result.modified:
            kept.append(each)
        rewrites = () if objection else result.rewrites
        records.append(PassRecord(repr(each), seconds, nodes, current.graph.num_nodes(), rewrites, result.declines, objection))
    final = current if kept else model
    check(final, contract, at=f"the result of {len(passes)} passes")
    return final, records


def _apply(each: Pass, model: ir.Model) -> PassResult:
    result = each(model)
    if result.modified:
        model.graph.sort()
        remove_unused_initializers(model.graph)
    return result


def _again(model: ir.Model, kept: Sequence[Pass]) -> ir.Model:
    """Return what ``kept`` make of ``model``."""
    clone = model.clone()
    for each in kept:
        _apply(each, clone)
    return clone


def _objection(each: Pass, before: ir.Model | None, result: ir.Model, instruments: Sequence[Instrument]) -> str:
    """Return why a modified graph must be rolled back, or an empty string."""
    found = "; ".join(violations(result, SOUND))
    if found or before is None:
        return found
    return next(filter(None, (i.after(each, before, result) for i in instruments)), "")


def check(model: ir.Model, contract: Contract, *, at: str) -> None:
    """Raise ContractError listing the violations of ``contract``, if there are any."""
    found = list(violations(model, contract))
    if found:
        shown = "; ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise ContractError(
            f"the {contract.name} contract is broken: {shown}", at=at, fix="this is a defect of deploycc; report it with the model"
        )
