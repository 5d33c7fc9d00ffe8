"""Chains of convolutions: what becomes one, and what stays and why."""

from __future__ import annotations

import numpy as np
import pytest
from pass_graphs import apply, assert_close, assert_same, codes, graph, operators, record

from passes.merge_convolutions import MergeConvolutions

MERGE = MergeConvolutions()


def tensor(name: str, *shape: int, zero: bool = False) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).uniform(-1, 1, shape).round(3) * (not zero)
    return f"float{list(shape)}".replace(" ", "") + f" {name} = {{{', '.join(map(str, values.ravel()))}}}"


def chain(*layers: str, weights: str, channels: int = 4, outputs: int = 4, spatial: str = "9,7", between: str = "") -> str:
    """Return a graph of convolutions, each ``attributes(constants)``; ``between`` stands behind the first."""
    lines, value = [], "x"
    for index, layer in enumerate(layers):
        name = "y" if index == len(layers) - 1 else f"v{index}"
        attributes, constants = layer.split("(")
        lines.append(f"{name} = Conv{attributes}({value}, {constants}")
        value = name
        if index == 0 and between:
            lines.append(between)
            value = "b"
    axes = ",".join("?" * len(spatial.split(",")))
    return f"(float[N,{channels},{spatial}] x) => (float[N,{outputs},{axes}] y) <{weights}> {{ {' '.join(lines)} }}"


def test_before_and_expected() -> None:
    before = graph(
        """(float[N,1,4,4] x) => (float[N,1,2,2] y) <float[1,1,3,3] w = {1,2,3,4,5,6,7,8,9}, float[1] c = {1}, float[1,1,1,1] v = {2}>
        { a = Conv(x, w, c) y = Conv(a, v) }"""
    )
    expected = graph(
        """(float[N,1,4,4] x) => (float[N,1,2,2] y) <float[1,1,3,3] w = {2,4,6,8,10,12,14,16,18}, float[1] c = {2}>
        { y = Conv<kernel_shape=[3,3], strides=[1,1], dilations=[1,1], pads=[0,0,0,0], group=1>(x, w, c) }"""
    )
    assert_same(apply(before, MERGE), expected)


CHAINS = {
    "1x1 to 3x3": (("(w)", "<pads=[1,1,1,1]>(v, c)"), [("w", 8, 4, 1, 1), ("v", 4, 8, 3, 3), ("c", 4)]),
    "3x3 to 1x1": (("<pads=[1,1,1,1]>(w, c)", "(v, d)"), [("w", 16, 4, 3, 3), ("c", 16), ("v", 4, 16, 1, 1), ("d", 4)]),
    "padding on the first": (("<pads=[1,1,1,1]>(w, c)", "(v)"), [("w", 6, 4, 1, 1), ("c", 6), ("v", 4, 6, 3, 3)]),
    "pointwise, depthwise": (("<group=2>(w)", "<group=4, pads=[1,0,1,2]>(v)"), [("w", 4, 2, 1, 1), ("v", 4, 1, 3, 3)]),
    "pointwise, depthwise, pointwise": (
        ("<pads=[1,1,1,1]>(w, c)", "<group=24, strides=[2,2]>(v)", "(u, d)"),
        [("w", 24, 4, 1, 1), ("c", 24), ("v", 24, 1, 3, 3), ("u", 4, 24, 1, 1), ("d", 4)],
    ),
    "grouped, depthwise": (("<group=2>(w)", "<group=4>(v)"), [("w", 4, 2, 3, 3), ("v", 4, 1, 1, 1)]),
    "both strided": (("<strides=[2,2], pads=[1,1,1,1]>(w)", "<strides=[2,1]>(v)"), [("w", 12, 4, 3, 3), ("v", 4, 12, 1, 1)]),
    "dilated": (("(w)", "<dilations=[2,2], pads=[2,2,2,2]>(v)"), [("w", 4, 4, 1, 1), ("v", 4, 4, 3, 3)]),
    "separable": (("<pads=[1,0,1,0]>(w)", "<pads=[0,1,0,1]>(v)"), [("w", 8, 4, 3, 1), ("v", 4, 8, 1, 3)]),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("spatial", ["9,7", "H,W"])
def test_merges(name: str, spatial: str) -> None:
    layers, weights = CHAINS[name]
    outputs = next(w[1] for w in reversed(weights) if len(w) == 5)
    given = ", ".join(tensor(n, *shape) for n, *shape in weights)
    before = graph(chain(*layers, weights=given, outputs=outputs, spatial=spatial))
    after = apply(before, MERGE)
    assert operators(after) == ["Conv"]
    for size in [(1, 4, 9, 7)] + [(3, 4, 12, 15), (2, 4, 5, 5)] * (spatial == "H,W"):
        assert_close(before, after, size, roundings=256)
