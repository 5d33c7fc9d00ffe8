"""The algebra of convolutions in float64: composition, sums of parallel branches, and what can be written as a convolution.

A convolution here is y[o, t] = b[o] + sum over i, v of W[o, i, v] x[i, s t - p + d v], cross-correlation as in ONNX, for each spatial
axis by itself; without spatial axes it is a fully connected layer. Geometry is apart from the numbers, so that candidates can be
judged without computing them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why two convolutions do not make one."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a convolution; ``begins`` and ``ends`` are its zero padding before and behind each axis."""

    outputs: int
    inputs: int
    kernel: Ints
    strides: Ints
    dilations: Ints
    begins: Ints
    ends: Ints
    groups: int = 1
    biased: bool = False

    @property
    def rank(self) -> int:
        """Return the number of spatial axes."""
        return len(self.kernel)

    @property
    def extents(self) -> Ints:
        """Return how many input positions the kernel spans on each axis: d (k - 1) + 1."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def macs(self) -> int:
        """Return the multiplications per output position, which is also the number of weights: O I/g prod k."""
        return self.outputs * self.inputs // self.groups * math.prod(self.kernel)

    @property
    def parameters(self) -> int:
        """Return the number of weights and biases."""
        return self.macs + (self.outputs if self.biased else 0)

    @property
    def weight_shape(self) -> Ints:
        """Return the shape of the weight, O x I/g x k."""
        return (self.outputs, self.inputs // self.groups, *self.kernel)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution with its numbers, both arrays in float64."""

    geometry: Geometry
    weight: np.ndarray
    bias: np.ndarray


def compose_geometry(first: Geometry, second: Geometry) -> Geometry | Refusal:
    """Return the geometry of ``second`` behind ``first``, or why they do not compose exactly.

    With positions written for one axis: tap v of the second reads the first's output s2 t - p2 + d2 v, whose tap u reads the input
    s1 (s2 t - p2 + d2 v) - p1 + d1 u. So s = s1 s2, p = p1 + s1 p2 on either side, taps at s1 d2 v + d1 u, and d is their greatest
    common divisor. This holds where the second reads inside the first's output. Outside it reads zero, which is what the first would
    have computed from zeros if it has one tap on that axis and no bias; else p2 must be 0 on that axis.
    """
    for axis in range(first.rank):
        padded = second.begins[axis] or second.ends[axis]
        if padded and (first.kernel[axis] > 1 or first.biased):
            why = "has a bias" if first.kernel[axis] == 1 else f"has {first.kernel[axis]} taps there"
            return Refusal("PAD2_NONZERO", f"the second pads axis {axis + 2} with zeros and the first {why}, so borders would differ")
    if first.groups % second.groups and second.groups % first.groups:
        return Refusal("GROUP_MISMATCH", f"{first.groups} and {second.groups} groups do not nest")
    spread = tuple(s * d for s, d in zip(first.strides, second.dilations, strict=True))
    steps = [_step((first.kernel[a], first.dilations[a]), (second.kernel[a], spread[a])) for a in range(first.rank)]
    extents = [e + n * (k - 1) for e, n, k in zip(first.extents, spread, second.kernel, strict=True)]
    return Geometry(
        outputs=second.outputs,
        inputs=first.inputs,
        kernel=tuple((e - 1) // d + 1 for e, d in zip(extents, steps, strict=True)),
        strides=tuple(s * t for s, t in zip(first.strides, second.strides, strict=True)),
        dilations=tuple(steps),
        begins=tuple(p + s * q for p, s, q in zip(first.begins, first.strides, second.begins, strict=True)),
        ends=tuple(p + s * q for p, s, q in zip(first.ends, first.strides, second.ends, strict=True)),
        groups=math.gcd(first.groups, second.groups),
        biased=first.biased or second.biased,
    )


def compose(first: Convolution, second: Convolution) -> Convolution | Refusal:
    """Return the one convolution that equals ``second`` behind ``first`` everywhere, borders included, or why there is none.

    K[o, i, s1 d2 v + d1 u] += sum over m of W2[o, m, v] W1[m, i, u] and b = b2 + sum over m, v of W2[o, m, v] b1[m], within each of
    the common groups.
    """
    geometry = compose_geometry(first.geometry, second.geometry)
    if isinstance(geometry, Refusal):
        return geometry
    one, two = first.geometry, second.geometry
    kernel = np.zeros(geometry.weight_shape)
    for tap in np.ndindex(*two.kernel):
        starts = [s * d * v // step for s, d, v, step in zip(one.strides, two.dilations, tap, geometry.dilations, strict=True)]
        kernel[_at(_taps(one, starts, geometry.dilations))] += _product(first, second, tap, geometry.groups)
    total = second.weight.reshape(two.groups, two.outputs // two.groups, two.inputs // two.groups, -1).sum(axis=3)
    shift = (total @ first.bias.reshape(two.groups, -1, 1)).reshape(-1)
    return Convolution(geometry, kernel, second.bias + shift)


def spreads(first: Geometry, second: Geometry) -> bool:
    """Return whether the stride or dilations of a pair grow its kernel: a stride between two kernels, or more holes than taps."""
    if any(s > 1 and k > 1 and n > 1 for s, k, n in zip(first.strides, first.kernel, second.kernel, strict=True)):
        return True
    merged = compose_geometry(first, second)
    if isinstance(merged, Refusal):
        return False
    reached = 1
    for k, d, n, e in zip(first.kernel, first.dilations, second.kernel, second.dilations, strict=True):
        reached *= len({d * u + e * v for u in range(k) for v in range(n)})
    return 2 * reached < math.prod(merged.kernel)


def add_geometry(branches: Sequence[Geometry]) -> Geometry | Refusal:
    """Return the geometry of the sum of ``branches`` over one input, or why they do not make one convolution.

    Relative to the output position, branch j reads the input at d v - p. The common kernel spans all those taps, at a dilation that is
    the greatest common divisor of their distances, and its padding begins where the first of them lies.
    """
    one = branches[0]
    if any((b.outputs, b.inputs, b.rank) != (one.outputs, one.inputs, one.rank) for b in branches):
        return Refusal("GEOMETRY", "the branches differ in channels")
    if any(b.strides != one.strides for b in branches):
        return Refusal("GEOMETRY", "the branches differ in stride")
    reach = [tuple(p + q - e for p, q, e in zip(b.begins, b.ends, b.extents, strict=True)) for b in branches]
    if len(set(reach)) > 1:
        return Refusal("GEOMETRY", "the branches differ in the size of their output")
    begins, steps, extents = [], [], []
    for axis in range(one.rank):
        taps = {b.dilations[axis] * v - b.begins[axis] for b in branches for v in range(b.kernel[axis])}
        low = min(taps)
        begins.append(-low)
        steps.append(math.gcd(*(t - low for t in taps)) or 1)
        extents.append(max(taps) - low + 1)
    return Geometry(
        outputs=one.outputs,
        inputs=one.inputs,
        kernel=tuple((e - 1) // d + 1 for e, d in zip(extents, steps, strict=True)),
        strides=one.strides,
        dilations=tuple(steps),
        begins=tuple(begins),
        ends=tuple(r + e - p for r, e, p in zip(reach[0], extents, begins, strict=True)),
        groups=math.gcd(*(b.groups for b in branches)),
        biased=any(b.biased for b in branches),
    )


def embed(branch: Convolution, into: Geometry) -> Convolution:
    """Return ``branch`` as a convolution of the wider geometry ``into``: its taps at offset (P - p) / D, zeros elsewhere."""
    lifted, own = regroup(branch, into.groups), branch.geometry
    weight = np.zeros(into.weight_shape)
    starts = [(wide - p) // step for wide, p, step in zip(into.begins, own.begins, into.dilations, strict=True)]
    weight[_at(_taps(own, starts, into.dilations))] = lifted.weight
    return Convolution(replace(into, biased=own.biased), weight, branch.bias)


def add(branches: Sequence[Convolution]) -> Convolution | Refusal:
    """Return the one convolution that equals the sum of ``branches`` over one input: K = sum embed(K_j), b = sum b_j."""
    geometry = add_geometry([b.geometry for b in branches])
    if isinstance(geometry, Refusal):
        return geometry
    embedded = [embed(b, geometry) for b in branches]
    weight = np.sum([e.weight for e in embedded], axis=0)
    return Convolution(geometry, weight, np.sum([e.bias for e in embedded], axis=0))


def regroup(convolution: Convolution, groups: int) -> Convolution:
    """Return the same map written with fewer groups, a divisor of what it has; with one group the weight is dense."""
    own = convolution.geometry
    if own.groups == groups:
        return convolution
    each = own.groups // groups
    rows, columns = own.outputs // own.groups, own.inputs // own.groups
    weight = np.zeros((groups, each, rows, each, columns, *own.kernel))
    given = convolution.weight.reshape(groups, each, rows, columns, *own.kernel)
    for index in range(each):
        weight[:, index, :, index] = given[:, index]
    geometry = replace(own, groups=groups)
    return Convolution(geometry, weight.reshape(geometry.weight_shape), convolution.bias)


def respond(convolution: Convolution, image: np.ndarray) -> np.ndarray:
    """Return the output (O, ...) for one image (I, ...), tap by tap; for constant maps, not for speed."""
    own = convolution.geometry
    padded = np.pad(image, [(0, 0), *zip(own.begins, own.ends, strict=True)])
    sizes = [(n - e) // s + 1 for n, e, s in zip(padded.shape[1:], own.extents, own.strides, strict=True)]
    total = np.zeros((own.groups, own.outputs // own.groups, math.prod(sizes)))
    for tap in np.ndindex(*own.kernel):
        starts = [d * v for d, v in zip(own.dilations, tap, strict=True)]
        window = (slice(None), *(slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, own.strides, sizes, strict=True)))
        read = padded[window].reshape(own.groups, own.inputs // own.groups, -1)
        taps = convolution.weight[_at(tap)].reshape(own.groups, -1, own.inputs // own.groups)
        total += taps @ read
    response: np.ndarray = total.reshape(own.outputs, *sizes) + convolution.bias.reshape(-1, *[1] * own.rank)
    return response


def diagonal(factor: np.ndarray, offset: np.ndarray, *, rank: int) -> Convolution:
    """Return y = factor x + offset per channel as a depthwise convolution of one tap."""
    channels, ones, none = factor.size, (1,) * rank, (0,) * rank
    geometry = Geometry(channels, channels, ones, ones, ones, none, none, channels, bool(np.any(offset)))
    return Convolution(geometry, factor.astype(np.float64).reshape(channels, 1, *ones), offset.astype(np.float64).reshape(-1))


def identity(channels: int, *, rank: int) -> Convolution:
    """Return y = x as a depthwise convolution of one tap."""
    return diagonal(np.ones(channels), np.zeros(channels), rank=rank)


def average(channels: int, geometry: Geometry) -> Convolution:
    """Return the average over the windows of ``geometry``, padding counted, as a depthwise convolution by 1 / prod k."""
    shape = replace(geometry, outputs=channels, inputs=channels, groups=channels, biased=False)
    return Convolution(shape, np.full(shape.weight_shape, 1 / math.prod(shape.kernel)), np.zeros(channels))


def _step(*axes: tuple[int, int]) -> int:
    """Return the dilation of taps that are sums of multiples, one (count, distance) for each kernel."""
    return math.gcd(*(distance for count, distance in axes if count > 1)) or 1


def _at(taps: Iterable[slice | int]) -> tuple[slice | int, ...]:
    """Return the index of taps of a weight."""
    return (slice(None), slice(None), *taps)


def _taps(own: Geometry, starts: Iterable[int], steps: Ints) -> tuple[slice, ...]:
    """Return where the taps of ``own`` lie in a kernel of dilations ``steps`` if the first is at ``starts``."""
    apart = [d // step if k > 1 else 1 for d, step, k in zip(own.dilations, steps, own.kernel, strict=True)]
    return tuple(slice(a, a + n * (k - 1) + 1, n) for a, n, k in zip(starts, apart, own.kernel, strict=True))


def _product(first: Convolution, second: Convolution, tap: tuple[int, ...], groups: int) -> np.ndarray:
    """Return sum over m of W2[o, m, tap] W1[m, i, u] as an O x I/G x u array; one of the two is dense within a common group."""
    one, two = first.geometry, second.geometry
    parts = max(one.groups, two.groups) // groups
    middle = one.outputs // groups // parts
    before = first.weight.reshape(groups, parts, middle, -1)
    behind: np.ndarray = second.weight[_at(tap)]
    if two.groups >= one.groups:  # each part of the second reads channels of its own
        found = np.matmul(behind.reshape(groups, parts, -1, middle), before)
    else:
        found = np.matmul(behind.reshape(groups, -1, parts, middle).swapaxes(1, 2), before).swapaxes(1, 2)
    return np.reshape(found, (two.outputs, one.inputs // groups, *one.kernel))
