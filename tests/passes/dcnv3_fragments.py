"""Fragments of random graphs for the passes on DCNv3: as a node with what surrounds it, and as the decomposition around GridSample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st
from merge_fragments import gain

if TYPE_CHECKING:
    from random_graphs import Builder, Draw

# A kernel of one row: onnx's reference implementation of GridSample is slow.
GROUP, POINTS = 2, 3
TARGETS = {
    "five": [-1, 4, 4, GROUP, POINTS],
    "masks": [-1, 4, 4, GROUP * POINTS],
    "six": [-1, 4, 4, GROUP, POINTS, 2],
    "grid": [-1, 16, POINTS, 2],
    "groups": [-1, 4, 4, GROUP, 2],
    "image": [-1, 2, 4, 4],
    "weights": [-1, 1, 16, POINTS],
    "sums": [-1, GROUP, 2, 4, 4],
    "whole": [-1, 4, 4, 4],
    "spread": [1, 1, 1, 1, 2],
}


def deformable(b: Builder, draw: Draw) -> None:
    """Sample a 4x4 map of 4 channels by a node of DCNv3 whose masks are a softmax, perhaps with a blend behind it."""
    _sampled(b, draw, as_node=True)


def decomposed(b: Builder, draw: Draw) -> None:
    """The same, with the node written out around GridSample."""
    _sampled(b, draw, as_node=False)


def _sampled(b: Builder, draw: Draw, *, as_node: bool) -> None:
    if b.shape != (4, 4, 4):
        b.value = b.node(f"Relu({b.value})")
        return
    source = b.node(f"Transpose<perm=[0,2,3,1]>({b.value})")
    (v, *value), (o, *offset), (m, *logits) = (_projection(b, source, width) for width in (4, GROUP * POINTS * 2, GROUP * POINTS))
    shapes = SimpleNamespace(**{name: b.tensor(np.array(shape), "int64") for name, shape in TARGETS.items()})
    if draw(st.integers(0, 4)) == 0:
        b.taps.append(f"{m}:4")
    five = b.node(f"Softmax<axis=-1>({b.node(f'Reshape({m}, {shapes.five})')})")
    write = _node if as_node else _decomposition
    output = write(b, v, o, five, shapes)
    if draw(st.booleans()):
        output = _blend(b, output, v, source, shapes)
    # A sample moves by at most twice the largest value per pixel of its position, along two axes. Positions are rounded to a few units
    # of the size of the map, products of four terms to six units of themselves, a softmax of nine to two dozen of its weights.
    reach, largest, shift = 4 * value[1], value[1], offset[1]
    for_position = reach * (8 + 6 * shift)
    b.becomes(
        b.node(f"Transpose<perm=[0,3,1,2]>({output})"),
        lipschitz=value[0] + reach * offset[0] + 2 * logits[0] * largest + 2 * largest,
        roundings=1,
        magnitude=largest,
        inner=for_position + 12 * logits[1] * largest + 32 * largest,
    )


def _projection(b: Builder, source: str, width: int) -> tuple[str, float, float]:
    """Return a product with a weight and a bias, its gain, and its largest value."""
    weight, bias = b.weights(width, 4) / 8, b.weights(width) / 16
    output = b.node(f"Add({b.node(f'MatMul({source}, {b.tensor(weight.T)})')}, {b.tensor(bias)})")
    return output, gain(weight), gain(weight) * b.magnitude + float(np.abs(bias).max())


def _node(b: Builder, value: str, offset: str, five: str, shapes: SimpleNamespace) -> str:
    return b.node(f"deploycc.DCNv3<group={GROUP}, kernel_h=1, pad_h=0>({value}, {offset}, {b.node(f'Reshape({five}, {shapes.masks})')})")


def _decomposition(b: Builder, value: str, offset: str, five: str, shapes: SimpleNamespace) -> str:
    k = np.arange(POINTS)
    place = np.stack([k - 1, np.zeros_like(k)], -1)
    pixel = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1)
    base = b.tensor((pixel[:, :, None] + place).reshape(1, 4, 4, 1, POINTS, 2).astype(float))
    position = b.node(f"Add({b.node(f'Reshape({offset}, {shapes.six})')}, {base})")
    doubled = b.node(f"Add({b.node(f'Mul({position}, {b.number(2.0, 0)})')}, {b.number(1.0, 0)})")
    normal = b.node(f"Sub({b.node(f'Div({doubled}, {b.tensor(np.array([4.0, 4.0]))})')}, {b.number(1.0, 0)})")
    grid = b.node(f"Reshape({b.node(f'Transpose<perm=[0,3,1,2,4,5]>({normal})')}, {shapes.grid})")
    split = b.node(f"Transpose<perm=[0,3,4,1,2]>({b.node(f'Reshape({value}, {shapes.groups})')})")
    samples = b.node(f"GridSample({b.node(f'Reshape({split}, {shapes.image})')}, {grid})")
    weights = b.node(f"Reshape({b.node(f'Transpose<perm=[0,3,1,2,4]>({five})')}, {shapes.weights})")
    total = b.node(f"ReduceSum<keepdims=0>({b.node(f'Mul({samples}, {weights})')}, {b.node('Constant<value_ints=[3]>()')})")
    turned = b.node(f"Transpose<perm=[0,3,4,1,2]>({b.node(f'Reshape({total}, {shapes.sums})')})")
    return b.node(f"Reshape({turned}, {shapes.whole})")


def _blend(b: Builder, output: str, value: str, source: str, shapes: SimpleNamespace) -> str:
    """Blend the result with its own input by a share per group."""
    share = b.node(f"Sigmoid({_projection(b, source, GROUP)[0]})")
    apart = b.node(f"Unsqueeze({share}, {b.node('Constant<value_ints=[-1]>()')})")
    spread = b.node(f"Reshape({b.node(f'Expand({apart}, {shapes.spread})')}, {shapes.whole})")
    kept = b.node(f"Mul({output}, {b.node(f'Sub({b.number(1.0, 0)}, {spread})')})")
    return b.node(f"Add({kept}, {b.node(f'Mul({value}, {spread})')})")
