"""Chains of affine nodes: which spans of one to merge, and the merged numbers.

A chain of n links has 2^(n-1) partitions into spans. The cost of a partition is the sum over its spans, so the cheapest is found over
its last span, exactly and without listing them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.core import profit
from deploycc.core.convolution import Convolution, Geometry, Refusal, compose, compose_geometry, spreads

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from deploycc.core.affine import Link
    from deploycc.core.profit import Cost, Gate

LONGEST_SPAN = 4


@dataclass(frozen=True, slots=True)
class Span:
    """A run of links that one node is to replace, with what that costs before and after."""

    links: tuple[Link, ...]
    before: Cost
    after: Cost

    @property
    def names(self) -> str:
        """Return the names of its links for a report."""
        return ", ".join(f"'{link.name}'" for link in self.links)


def composed_geometry(geometries: Sequence[Geometry]) -> Geometry | Refusal:
    """Return the geometry of a chain, or the first refusal from left to right."""
    total = geometries[0]
    for each in geometries[1:]:
        if spreads(total, each):
            return Refusal("STRIDE_GROWTH", "the stride or dilation of one would spread the taps of the other")
        merged = compose_geometry(total, each)
        if isinstance(merged, Refusal):
            return merged
        total = merged
    return total


def composed(links: Sequence[Link]) -> Convolution | Refusal:
    """Return the numbers of a chain."""
    total: Convolution | Refusal = links[0].load()
    for each in links[1:]:
        if isinstance(total, Refusal):
            return total
        total = compose(total, each.load())
    return total


def judge(links: Sequence[Link], gate: Gate, *, times: Sequence[int]) -> Span | Refusal:
    """Return the span of ``links`` if it composes exactly and is estimated to gain, else the refusal.

    Args:
        links: two or more neighbours.
        gate: the gate, for positions of the last link of their chain.
        times: the positions of each link per position of that last one.
    """
    merged = composed_geometry([link.geometry for link in links])
    if isinstance(merged, Refusal):
        return merged
    before = profit.Cost()
    for link, each in zip(links, times, strict=True):
        before += gate.kernel(link.geometry, times=each)
    after = gate.kernel(merged, times=times[-1])
    if not merged.rank and after.macs >= before.macs:
        return Refusal("COST", f"a bottleneck: the product would multiply {before.macs:,.0f} to {after.macs:,.0f} times")
    return profit.refusal(before, after) or profit.tie(before, after) or Span(tuple(links), before, after)


def partition(chain: Sequence[Link], gate: Gate, *, refused: Collection[tuple[str, ...]] = ()) -> list[Span]:
    """Return the spans of two or more links in the cheapest partition of ``chain``; the links outside them stay as they are.

    Args:
        chain: links, each the only reader of the one before it.
        gate: the gate, for positions of the last link.
        refused: names of the links of spans that are not to be formed.
    """
    times = profit.steps_behind([link.geometry for link in chain])
    best: list[tuple[float, list[Span]]] = [(0.0, [])]
    for stop in range(1, len(chain) + 1):
        last = chain[stop - 1]
        options = [(best[-1][0] + gate.kernel(last.geometry, times=times[stop - 1]).microseconds, best[-1][1])]
        for start in range(max(0, stop - LONGEST_SPAN), stop - 1):
            links = chain[start:stop]
            span = None if tuple(link.name for link in links) in refused else judge(links, gate, times=times[start:stop])
            if isinstance(span, Span):
                options.append((best[start][0] + span.after.microseconds, [*best[start][1], span]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]
