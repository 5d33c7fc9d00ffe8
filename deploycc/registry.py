"""Find passes, backends and plugins by entry point; the compiler knows none of them by name."""

from __future__ import annotations

import dataclasses
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from deploycc.core.errors import ContractError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

PASSES, BACKENDS, PLUGINS = "deploycc.passes", "deploycc.backends", "deploycc.plugins"
PHASES = ("import", "canonicalize", "prepare", "reparameterize", "quantize", "lower")


def entries(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name, in alphabetical order.

    Raises:
        ContractError: when two distributions register one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda p: (p.name, p.value)):
        if point.name in found and found[point.name].value != point.value:
            raise ContractError(
                f"two entry points are named '{point.name}': {found[point.name].value} and {point.value}",
                at=f"entry-point group {group}",
                fix="uninstall one of the packages that provide them",
            )
        found[point.name] = point
    return found


def load(point: EntryPoint) -> Any:
    """Import what an entry point names.

    Raises:
        ContractError: when it cannot be imported, with the reason.
    """
    try:
        return point.load()
    except Exception as error:
        raise ContractError(
            f"the entry point '{point.name}' cannot be loaded: {type(error).__name__}: {error}",
            at=f"{point.group} = {point.value}",
            fix="repair or uninstall the package that provides it",
        ) from error


def passes(phase: str) -> list[tuple[str, Any]]:
    """Return ``(name, class)`` of every pass of ``phase``, each after those it names in ``after``."""
    classes = {name: load(point) for name, point in entries(PASSES).items()}
    mine = {name: cls for name, cls in classes.items() if cls.phase == phase}
    return [(name, mine[name]) for name in _ordered({name: cls.after for name, cls in mine.items()})]


def options(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of a pass, which are its options; none when it is not a dataclass."""
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _ordered(after: dict[str, Iterable[str]]) -> list[str]:
    """Return names in dependency order, alphabetical where free."""
    sorter: TopologicalSorter[str] = TopologicalSorter({n: sorted(a for a in before if a in after) for n, before in sorted(after.items())})
    try:
        sorter.prepare()
    except CycleError as error:
        raise ContractError(f"passes wait for each other: {' -> '.join(error.args[1])}", at=PASSES, fix="correct their `after`") from error
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order.extend(ready)
        sorter.done(*ready)
    return order


def plugins() -> list[Any]:
    """Return every registered plugin, in alphabetical order."""
    return [load(point)() for point in entries(PLUGINS).values()]


def backend(name: str) -> Any:
    """Return the backend registered under ``name``.

    Raises:
        UsageError: when there is none.
    """
    found = entries(BACKENDS)
    if name not in found:
        raise UsageError(f"no backend '{name}' is installed", at="--target", fix=f"installed: {', '.join(found)}")
    return load(found[name])()
