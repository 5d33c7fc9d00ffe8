"""How many bits each layer gets in paper mode: all the same, or LRP-QViT's rule from relevance.

The rule (LRP-QViT, arXiv 2401.11243, section 3): the layers of the first two blocks get one bit more; to keep the average, of each kind
of layer the least relevant ones in the other blocks get one bit less. Blocks of one width are exchanged one for one; where widths
differ, layers are lowered until they make up for the raised ones in parameters (attention, which has none, in MACs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.core.formats import SIMULATED, Format
from deploycc.core.plan import Assignment, Region

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EDGE_BITS = 8
PROTECTED = 2
KINDS = ("qkv", "attention", "proj", "fc1", "fc2")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a region stands: its kind, and the number of its block from 0; None outside the blocks. ``is_edge``: before or behind all."""

    kind: str
    block: int | None
    is_edge: bool


def places_of(regions: Sequence[Region], kinds: Mapping[str, str]) -> dict[str, Place]:
    """Return the place of every region; one attention core makes a block. Without any, the first and the last region are edges.

    What is no layer of a block by its kind, or the second of its kind there (an MLP as head), stands outside.
    """
    cores = -1
    blocks: dict[str, int | None] = {}
    taken: set[tuple[str, int]] = set()
    for region in regions:
        kind = kinds[region.name]
        cores += kind == "attention"
        block = cores + (kind == "qkv")
        is_layer = kind in KINDS and block >= 0 and (kind == "qkv" or (kind, block) not in taken)
        blocks[region.name] = block if is_layer else None
        taken.add((kind, block))
    inside = [i for i, region in enumerate(regions) if blocks[region.name] is not None]
    first, last = (inside[0], inside[-1]) if inside else (1, len(regions) - 2)
    return {r.name: Place(kinds[r.name], blocks[r.name], not first <= i <= last) for i, r in enumerate(regions)}


def uniform_bits(regions: Sequence[Region], places: Mapping[str, Place], base: int) -> tuple[Assignment, ...]:
    """Return ``base`` bits everywhere but at the edges."""
    return tuple(_assignment(region, places[region.name], base, base, "--precision asks for it") for region in regions)


def relevance_bits(
    regions: Sequence[Region], places: Mapping[str, Place], base: int, relevance: Mapping[str, float]
) -> tuple[Assignment, ...]:
    """Return the bits of LRP-QViT's rule.

    Args:
        regions: the decision units, in the order of the graph.
        places: of every region.
        base: the bits that are kept on average.
        relevance: of every region; only regions of one kind are compared.
    """
    bits: dict[str, int] = {}
    for kind in KINDS:
        same = [r for r in regions if places[r.name].kind == kind]
        raised = [r for r in same if (places[r.name].block or 0) < PROTECTED]
        owed = sum(_weight(r) for r in raised)
        bits.update({r.name: base + 1 for r in raised})
        for region in sorted((r for r in same if r not in raised), key=lambda r: relevance[r.name]):
            if owed <= 0:
                break
            bits[region.name] = base - 1
            owed -= _weight(region)
    reasons = {base: f"it keeps the {base} bits of most layers", base + 1: "the first two blocks get one bit more"}
    found = []
    for region in regions:
        chosen = bits.get(region.name, base)
        why = reasons.get(chosen, f"among the least relevant of its kind ({relevance.get(region.name, 0):.3g} of the kind's mean)")
        found.append(_assignment(region, places[region.name], base, chosen, why))
    return tuple(found)


def _weight(region: Region) -> int:
    return region.parameters or region.macs


def _assignment(region: Region, place: Place, base: int, bits: int, why: str) -> Assignment:
    if place.is_edge:
        return Assignment(region, _format(max(base, EDGE_BITS)), f"patch embedding and head keep {EDGE_BITS} bits (simulated)")
    where = f"{place.kind} of block {place.block + 1}" if place.block is not None else f"{place.kind} between the blocks"
    return Assignment(region, _format(bits), f"{where}: {why} (simulated)")


def _format(bits: int) -> Format:
    return SIMULATED[f"w{bits}a{bits}"]
