"""Fragments of random graphs that the merging passes work on, with their error analysis; see ``random_graphs``.

Weights are small, so that errors do not grow much and few graphs are rejected for a bound that says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

if TYPE_CHECKING:
    from random_graphs import Builder, Draw


def gain(weight: np.ndarray) -> float:
    """Return the largest absolute row sum: what a map may grow by in the maximum norm."""
    return float(np.abs(weight).reshape(weight.shape[0], -1).sum(axis=1).max())


def convolve(b: Builder, value: str, weight: np.ndarray, *, attributes: str = "", bias: np.ndarray | None = None) -> str:
    """Append a Conv and return its output."""
    extra = "" if bias is None else f", {b.tensor(bias)}"
    return b.node(f"Conv<{attributes}>({value}, {b.tensor(weight)}{extra})" if attributes else f"Conv({value}, {b.tensor(weight)}{extra})")


def map_first(b: Builder) -> bool:
    """Bring the last value back to a map of four channels, where it is a matrix of the right size; return whether it is one."""
    return len(b.shape) == 3 and b.shape[0] == 4 and b.shape[1] >= 3 and b.shape[2] >= 3


def convolutions(b: Builder, draw: Draw) -> None:
    """Put two or three convolutions behind each other, the padding where composition is exact, or not."""
    if not map_first(b):
        return
    for kernel in draw(st.sampled_from([(1, 3), (3, 1), (1, 1, 3), (3, 1, 1), (1, 3, 1)])):  # type: ignore[attr-defined]
        groups = draw(st.sampled_from([1, 1, 2, 4]))
        weight, shift = b.weights(4, 4 // groups, kernel, kernel) / 2, b.weights(4) if draw(st.booleans()) else None  # type: ignore[operator]
        attributes = f"group={groups}, pads=[{','.join([str(int(kernel == 3))] * 4)}]"
        b.value = convolve(b, b.value, weight, attributes=attributes, bias=shift)
        size = 0.0 if shift is None else float(np.abs(shift).max())
        b.becomes(b.value, lipschitz=gain(weight), roundings=weight[0].size + 2, magnitude=gain(weight) * b.magnitude + size)


def parallel(b: Builder, draw: Draw) -> None:
    """Add up a 3x3, a 1x1 and a skip, plain, scaled or pooled."""
    if not map_first(b):
        return
    dense, point, shift = b.weights(4, 4, 3, 3) / 2, b.weights(4, 4, 1, 1) / 2, b.weights(4)
    ways = [convolve(b, b.value, dense, attributes="pads=[1,1,1,1]", bias=shift), convolve(b, b.value, point)]
    skip = draw(st.sampled_from(["none", "plain", "scaled", "pooled"]))
    if skip == "plain":
        ways.append(b.value)
    elif skip == "scaled":
        ways.append(b.node(f"Mul({b.value}, {b.tensor(b.weights(4, 1, 1))})"))
    elif skip == "pooled":
        counted = draw(st.sampled_from([1, 1, 0]))
        ways.append(b.node(f"AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad={counted}>({b.value})"))
    total = ways[0]
    for way in ways[1:]:
        total = b.node(f"Add({total}, {way})")
    # A scale drawn above is at most 1, and so is the gain of an average.
    grown = gain(dense) + gain(point) + (skip != "none")
    b.becomes(total, lipschitz=grown, roundings=42, magnitude=grown * b.magnitude + float(np.abs(shift).max()))


def layers(b: Builder, draw: Draw) -> None:
    """Put two fully connected layers behind each other, with a skip around them or not."""
    if len(b.shape) == 3:
        total = int(np.prod(b.shape))
        b.value, b.shape = b.node(f"Reshape({b.value}, {b.tensor(np.array([-1, total]), 'int64')})"), (total,)
    rows = b.shape[-1]
    outputs = rows if rows <= 8 and draw(st.booleans()) else 4
    first, second, shift = b.weights(8, rows) / 2, b.weights(outputs, 8) / 2, b.weights(8)
    grown = gain(first) * gain(second)
    size = gain(second) * float(np.abs(shift).max())
    if len(b.shape) == 1 and draw(st.booleans()):
        inner = b.node(f"Gemm<transB=1>({b.value}, {b.tensor(first)}, {b.tensor(shift)})")
        output = b.node(f"Gemm<alpha=0.5>({inner}, {b.tensor(second.T)})")
    else:
        inner = b.node(f"Add({b.node(f'MatMul({b.value}, {b.tensor(first.T)})')}, {b.tensor(shift)})")
        output = b.node(f"MatMul({inner}, {b.tensor(second.T)})")
    if outputs == rows and draw(st.booleans()):
        output, grown = b.node(f"Add({output}, {b.value})"), grown + 1
    b.shape = (*b.shape[:-1], outputs)
    b.becomes(output, lipschitz=grown, roundings=rows + 14, magnitude=grown * b.magnitude + size)


def scaled(b: Builder, draw: Draw) -> None:
    """Scale and shift the channels behind a convolution."""
    if not map_first(b):
        return
    weight, scale, shift = b.weights(4, 4, 1, 1), b.weights(4, 1, 1), b.weights(1, 4, 1, 1)
    value = b.node(f"Mul({convolve(b, b.value, weight)}, {b.tensor(scale)})")
    operator = draw(st.sampled_from(["Add", "Sub"]))
    output = b.node(f"{operator}({b.tensor(shift)}, {value})")
    b.becomes(output, lipschitz=gain(weight), roundings=8, magnitude=gain(weight) * b.magnitude + 1)


def padded(b: Builder, draw: Draw) -> None:
    """Pad the map, unevenly, before a convolution that pads as well."""
    if not map_first(b):
        return
    weight, mode = b.weights(4, 4, 3, 3), draw(st.sampled_from(["constant", "constant", "reflect"]))
    pads = b.tensor(np.array([0, 0, 1, 0, 0, 0, 0, 1]), "int64")
    value = b.node(f'Pad<mode="{mode}">({b.value}, {pads})')
    output = convolve(b, value, weight, attributes="pads=[0,1,1,0]")
    b.becomes(output, lipschitz=gain(weight), roundings=40, magnitude=gain(weight) * b.magnitude)


def bordered(b: Builder, draw: Draw) -> None:
    """Write the bias of a pointwise convolution, or something else, in front of the rows of its output."""
    if not map_first(b):
        return
    weight, shift, (_, height, width) = b.weights(4, 4, 1, 1), b.weights(4), b.shape
    inside = convolve(b, b.value, weight, bias=shift)
    padded_map = b.node(f"Pad({inside}, {b.tensor(np.array([0, 0, 1, 0, 0, 0, 0, 0]), 'int64')})")
    batch, fixed = b.node(f"Shape<start=0, end=1>({b.value})"), b.tensor(np.array([1, 4]), "int64")
    size = b.node(f"Concat<axis=0>({fixed}, {batch}, {b.tensor(np.array([width]), 'int64')})")
    value = b.tensor((shift + draw(st.sampled_from([0, 0, 1]))).reshape(1, 4, 1, 1))  # type: ignore[operator]
    rows = b.node(f"Transpose<perm=[2,1,0,3]>({padded_map})")
    written = b.node(f"ScatterND({rows}, {b.tensor(np.array([[0]]), 'int64')}, {b.node(f'Expand({value}, {size})')})")
    output = b.node(f"Transpose<perm=[2,1,0,3]>({written})")
    b.shape = (4, height + 1, width)
    b.becomes(output, lipschitz=gain(weight), roundings=6, magnitude=gain(weight) * b.magnitude + 2)


def shared(b: Builder, draw: Draw) -> None:
    """Apply one kernel to every channel by way of the batch."""
    if not map_first(b):
        return
    weight, shift, (_, height, width) = b.weights(1, 1, 3, 3), b.weights(1), b.shape
    apart = b.node(f"Reshape({b.value}, {b.tensor(np.array([-1, 1, height, width]), 'int64')})")
    output = convolve(b, apart, weight, attributes="pads=[1,1,1,1]", bias=shift)
    if draw(st.booleans()):
        output = b.node(f"Relu({output})")
    output = b.node(f"Reshape({output}, {b.tensor(np.array([-1, 4, height, width]), 'int64')})")
    b.becomes(output, lipschitz=gain(weight), roundings=11, magnitude=gain(weight) * b.magnitude + 1)


MERGEABLE = (parallel, convolutions, layers, scaled, padded, shared)
