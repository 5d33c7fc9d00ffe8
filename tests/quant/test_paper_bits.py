"""The paper's rule of bits on networks whose relevance is written down."""

from __future__ import annotations

from itertools import pairwise

import pytest

from deploycc.core.plan import Assignment, Region
from deploycc.quant.paper_bits import KINDS, places_of, relevance_bits, uniform_bits


def network(*widths: int, merging: int | None = None) -> tuple[tuple[Region, ...], dict[str, str]]:
    """Return an embedding, one block per width, a head, and a layer between two blocks where widths change; and the kinds."""
    regions, kinds = [Region("embed", "conv", ("embed",), ("embed",), (), parameters=7)], {"embed": "conv", "head": "linear"}
    for block, (before, width) in enumerate(pairwise((widths[0], *widths))):
        if before != width:
            regions.append(Region("merging", "linear", ("merging",), ("merging",), (), parameters=merging or 0))
            kinds["merging"] = "linear"
        for kind in KINDS:
            parameters = 0 if kind == "attention" else width
            regions.append(Region(f"{kind}{block}", kind, (), (), (), parameters=parameters, macs=10 * width))
            kinds[f"{kind}{block}"] = kind
    return (*regions, Region("head", "linear", ("head",), ("head",), (), parameters=9)), kinds


def bits_of(assignments: tuple[Assignment, ...]) -> dict[str, int]:
    return {a.region.name: a.format.bits for a in assignments}


class TestPlaces:
    def test_blocks_and_edges(self) -> None:
        places = places_of(*network(4, 4, 8))
        assert [places[f"{kind}1"].block for kind in KINDS] == [1] * 5
        assert {name for name, place in places.items() if place.is_edge} == {"embed", "head"}
        assert (places["merging"].block, places["merging"].is_edge) == (None, False)

    def test_without_blocks_the_first_and_the_last_are_edges(self) -> None:
        regions = tuple(Region(f"c{i}", "conv", (), (), ()) for i in range(4))
        places = places_of(regions, {r.name: "conv" for r in regions})
        assert [places[r.name].is_edge for r in regions] == [True, False, False, True]

    def test_an_mlp_without_attention_is_no_block(self) -> None:
        kinds = {"c0": "conv", "c1": "conv", "f1": "fc1", "f2": "fc2"}
        places = places_of(tuple(Region(name, kind, (), (), ()) for name, kind in kinds.items()), kinds)
        assert [(p.block, p.is_edge) for p in places.values()] == [(None, True), (None, False), (None, False), (None, True)]

    def test_an_mlp_behind_the_last_block_is_the_head(self) -> None:
        regions, kinds = network(4, 4)
        head = [Region("h1", "linear", (), (), ()), Region("h2", "linear", (), (), ())]
        places = places_of((*regions[:-1], *head), kinds | {"h1": "fc1", "h2": "fc2"})
        assert [(places[h].block, places[h].is_edge) for h in ("h1", "h2")] == [(None, True), (None, True)]
        assert places["fc21"].block == 1


@pytest.mark.parametrize("base", [4, 6])
def test_uniform(base: int) -> None:
    regions, kinds = network(4, 4, 8)
    bits = bits_of(uniform_bits(regions, places_of(regions, kinds), base))
    assert {name for name, n in bits.items() if n == 8} == {"embed", "head"}
    assert {n for name, n in bits.items() if name not in {"embed", "head"}} == {base}


class TestRule:
    def allocated(self, widths: tuple[int, ...], relevance: dict[str, float], base: int = 4) -> dict[str, int]:
        regions, kinds = network(*widths)
        figures = {r.name: relevance.get(r.name, 1.0) for r in regions}
        return bits_of(relevance_bits(regions, places_of(regions, kinds), base, figures))

    def test_by_hand(self) -> None:
        """Five blocks: of each kind the first two rise, and the two least relevant of the other three fall."""
        low = {
            "qkv2": 0.1,
            "qkv4": 0.2,
            "attention3": 0.1,
            "attention4": 0.2,
            "proj2": 0.5,
            "proj3": 0.4,
            "fc11": 0.0,
            "fc22": 0.1,
            "fc24": 0.3,
        }
        bits = self.allocated((6,) * 5, low)
        assert [bits[f"qkv{b}"] for b in range(5)] == [5, 5, 3, 4, 3]
        assert [bits[f"attention{b}"] for b in range(5)] == [5, 5, 4, 3, 3]
        assert [bits[f"proj{b}"] for b in range(5)] == [5, 5, 3, 3, 4]
        assert [bits[f"fc2{b}"] for b in range(5)] == [5, 5, 3, 4, 3]
        assert (bits["embed"], bits["head"]) == (8, 8)

    @pytest.mark.parametrize("base", [4, 6])
    def test_the_average_of_equal_blocks_is_kept(self, base: int) -> None:
        bits = self.allocated((6,) * 7, {f"{kind}{b}": (b * 7 + i) % 5 for b in range(7) for i, kind in enumerate(KINDS)}, base)
        for kind in KINDS:
            found = [bits[f"{kind}{b}"] for b in range(7)]
            assert sum(found) == 7 * base
            assert set(found) == {base - 1, base, base + 1}

    def test_widths_are_weighed_by_parameters(self) -> None:
        """Two raised layers of 4 parameters are made up for by one of 16: the least relevant."""
        bits = self.allocated((4, 4, 16, 16), {f"{kind}3": 0.5 for kind in KINDS})
        for kind in KINDS:
            assert [bits[f"{kind}{b}"] for b in range(4)] == [5, 5, 4, 3]
        assert bits["merging"] == 4

    def test_narrow_layers_need_more_of_them(self) -> None:
        """Two of 16 parameters are worth eight of 4; there are three, and no more can fall."""
        bits = self.allocated((16, 16, 4, 4, 4), {})
        assert [bits[f"fc1{b}"] for b in range(5)] == [5, 5, 3, 3, 3]

    def test_every_choice_has_its_reason(self) -> None:
        regions, kinds = network(6, 6, 6, 6)
        found = relevance_bits(regions, places_of(regions, kinds), 4, {r.name: 0.25 for r in regions})
        reasons = {a.region.name: a.reason for a in found}
        assert reasons["qkv0"] == "qkv of block 1: the first two blocks get one bit more (simulated)"
        assert reasons["fc13"] == "fc1 of block 4: among the least relevant of its kind (0.25 of the kind's mean) (simulated)"
        assert reasons["head"] == "patch embedding and head keep 8 bits (simulated)"
