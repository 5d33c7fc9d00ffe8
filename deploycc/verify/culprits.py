"""Which of many regions cause a loss? Best-first binary search, one measurement per split, then one per suspect.

The share of a group is what restoring it alone takes off the loss. Shares are taken to add up, so that of two halves one is measured and
the other inferred; suspects are measured by themselves in the end, and together, so that what is reported was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ENOUGH = 0.9
NOTABLE = 0.1
SUSPECTS = 5
Loss = Callable[[Sequence[str]], float]


@dataclass(frozen=True, slots=True)
class Suspect:
    """One region: its share of what all regions together cost (1 is all of it), and the loss with it alone restored."""

    name: str
    share: float
    loss: float


@dataclass(frozen=True, slots=True)
class Search:
    """The result: losses as built, with everything restored, and with the suspects restored; suspects by falling share."""

    built: float
    restored: float
    suspects: tuple[Suspect, ...]
    together: float
    runs: int

    @property
    def gap(self) -> float:
        """Return what restoring every region takes off the loss."""
        return self.built - self.restored

    @property
    def explained(self) -> float:
        """Return the share of the gap that the suspects explain together."""
        return (self.built - self.together) / self.gap if self.gap > 0 else 0.0


def most_runs(count: int) -> int:
    """Return how many measurements a search over ``count`` regions takes at most, unless told otherwise."""
    return 3 + SUSPECTS + 3 * max(1, math.ceil(math.log2(max(count, 2))))


def search(names: Sequence[str], loss: Loss, *, limit: int, tick: Callable[[int, int], None] = lambda done, total: None) -> Search:
    """Return the few regions whose restoration takes most off the loss.

    Args:
        names: the regions, neighbours next to each other.
        loss: measures the model with some regions restored; less is better.
        limit: the most measurements.
        tick: called with measurements done and the most there may be.
    """
    known: dict[frozenset[str], float] = {}

    def measured(group: Sequence[str]) -> float:
        key = frozenset(group)
        if key not in known:
            known[key] = loss(group)
            tick(len(known), limit)
        return known[key]

    built, restored = measured(()), measured(names)
    found = _descend(names, built, restored, measured, lambda: limit - len(known) - SUSPECTS - 1) if built > restored else []
    suspects = [Suspect(n, (built - each) / (built - restored), each) for n in found if limit > len(known) for each in [measured([n])]]
    suspects.sort(key=lambda s: -s.share)
    kept = [s for s in suspects if s.share >= NOTABLE / 2] or suspects[:1]
    together = measured([s.name for s in kept]) if kept else built
    return Search(built, restored, tuple(kept), together, len(known))


def _descend(names: Sequence[str], built: float, restored: float, measured: Loss, left: Callable[[], int]) -> list[str]:
    """Split the group of the largest share until single regions explain enough, or the measurements are used up."""
    gap, explained, found = built - restored, 0.0, list[str]()
    groups: list[tuple[float, Sequence[str]]] = [(1.0, names)]
    while groups and len(found) < SUSPECTS and explained < ENOUGH:
        groups.sort(key=lambda each: (each[0], -len(each[1])))
        share, group = groups.pop()
        if share < NOTABLE / 2 and found:
            break
        if len(group) == 1:
            found.append(group[0])
            explained += share
        elif left() > 0:
            middle = len(group) // 2
            first = (built - measured(group[:middle])) / gap
            groups += [(first, group[:middle]), (share - first, group[middle:])]
        else:
            break
    return found
