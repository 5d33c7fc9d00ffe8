"""The algebra of convolutions against direct convolution in float64, exhaustively over small parameters."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deploycc.core.chains import composed_geometry
from deploycc.core.convolution import (
    Convolution,
    Geometry,
    Refusal,
    add,
    add_geometry,
    average,
    compose,
    compose_geometry,
    diagonal,
    embed,
    identity,
    regroup,
    respond,
    spreads,
)

RNG = np.random.default_rng(0)
# A relative error of float64 arithmetic over a few hundred products; anything wrong is off by about 1.
EXACT = 1e-12
KERNELS = (1, 2, 3)
STRIDES = (1, 2)
PADS = ((0, 0), (1, 1), (0, 1))
DILATIONS = (1, 2)
GROUPS = (1, 2, 4)


def shape(
    outputs: int,
    inputs: int,
    kernel: int,
    stride: int,
    pads: tuple[int, int],
    dilation: int,
    groups: int = 1,
    *,
    biased: bool,
    axes: int = 1,
) -> Geometry:
    return Geometry(
        outputs, inputs, (kernel,) * axes, (stride,) * axes, (dilation,) * axes, (pads[0],) * axes, (pads[1],) * axes, groups, biased
    )


def random(geometry: Geometry) -> Convolution:
    bias = RNG.standard_normal(geometry.outputs) if geometry.biased else np.zeros(geometry.outputs)
    return Convolution(geometry, RNG.standard_normal(geometry.weight_shape), bias)


def direct(convolution: Convolution, images: np.ndarray) -> np.ndarray:
    """Convolve with torch, which knows nothing of the algebra."""
    own = convolution.geometry
    pads = [p for axis in reversed(range(own.rank)) for p in (own.begins[axis], own.ends[axis])]
    padded = torch.nn.functional.pad(torch.from_numpy(images), pads)
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d)[own.rank - 1]
    return function(
        padded, torch.from_numpy(convolution.weight), torch.from_numpy(convolution.bias), own.strides, 0, own.dilations, own.groups
    ).numpy()


def assert_equal(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.max(np.abs(found - wanted), initial=0.0) <= EXACT * max(1.0, np.max(np.abs(wanted), initial=0.0))


def sides(geometry: Geometry) -> list[tuple[int, int]]:
    return list(zip(geometry.begins, geometry.ends, strict=True))


def sweep(axes: int) -> list[tuple[Geometry, Geometry]]:
    """Return every pair of the parameters above: 15,552 in one dimension, and some 1,500 of them in two."""
    first = itertools.product(KERNELS, STRIDES, PADS, DILATIONS, GROUPS, (False, True))
    second = list(itertools.product((1, 3), STRIDES, ((0, 0), (1, 1), (0, 1)), DILATIONS, GROUPS[: 3 if axes == 1 else 2]))
    pairs = [
        (shape(4, 4, *one[:5], biased=one[5], axes=axes), shape(4, 4, *two, biased=True, axes=axes)) for one in first for two in second
    ]
    return pairs if axes == 1 else pairs[::7]


@pytest.mark.parametrize(("axes", "least"), [(1, 10_000), (2, 1_000)])
def test_every_pair_composes_exactly_or_is_refused(axes: int, least: int) -> None:
    """Merged where the algebra says so and nowhere else, odd and even sizes, every border row compared."""
    torch.set_num_threads(1)
    pairs, merged, refused = sweep(axes), 0, 0
    sizes = ((17,), (20,)) if axes == 1 else ((17, 20),)
    images = [RNG.standard_normal((1, 4, *size)) for size in sizes]
    for first, second in pairs:
        one, two = random(first), random(second)
        found = compose(one, two)
        allowed = second.begins == second.ends == (0,) * axes or (first.kernel == (1,) * axes and not first.biased)
        assert isinstance(found, Convolution) == allowed
        if isinstance(found, Refusal):
            assert found.code == "PAD2_NONZERO"
            refused += 1
            continue
        merged += 1
        assert found.geometry == compose_geometry(first, second)
        assert found.geometry.groups == math.gcd(first.groups, second.groups)
        for image in images:
            assert_equal(direct(found, image), direct(two, direct(one, image)))
    assert len(pairs) == merged + refused >= least
    assert min(merged, refused) > len(pairs) // 5


def test_a_refused_pair_would_have_been_wrong_at_the_border_only() -> None:
    """What is refused is refused for a reason: the composed kernel is right inside and wrong at the border."""
    for kernel, biased in ((1, True), (3, False)):
        one, two = (
            random(shape(4, 4, kernel, 1, (0, 0), 1, biased=biased, axes=2)),
            random(shape(4, 4, 3, 1, (1, 1), 1, biased=True, axes=2)),
        )
        bare = replace(two.geometry, begins=(0, 0), ends=(0, 0))
        inner = compose(one, Convolution(bare, two.weight, two.bias))
        assert isinstance(inner, Convolution)
        widened = replace(inner.geometry, begins=(1, 1), ends=(1, 1))
        image = RNG.standard_normal((1, 4, 9, 9))
        wanted, found = direct(two, direct(one, image)), direct(Convolution(widened, inner.weight, inner.bias), image)
        assert_equal(found[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1])
        assert np.max(np.abs(found - wanted)) > 0.1


def test_axes_are_judged_apart() -> None:
    """A column and a row kernel compose although the second pads: the first has one tap on that axis."""
    rows = random(Geometry(4, 4, (3, 1), (1, 1), (1, 1), (1, 0), (1, 0)))
    columns = random(Geometry(4, 4, (1, 3), (1, 1), (1, 1), (0, 1), (0, 2), biased=True))
    found = compose(rows, columns)
    assert isinstance(found, Convolution)
    assert (found.geometry.kernel, found.geometry.begins, found.geometry.ends) == ((3, 3), (1, 1), (1, 2))
    image = RNG.standard_normal((2, 4, 7, 8))
    assert_equal(direct(found, image), direct(columns, direct(rows, image)))


@pytest.mark.parametrize(("one", "two"), [(1, 1), (1, 6), (6, 1), (2, 6), (6, 2), (3, 3), (12, 12), (12, 4), (12, 1), (1, 12)])
def test_nested_groups_and_unequal_widths(one: int, two: int) -> None:
    first = random(shape(12, 24, 3, 2, (1, 0), 1, one, biased=True, axes=2))
    second = random(shape(36, 12, 3, 1, (0, 0), 2, two, biased=True, axes=2))
    found = compose(first, second)
    assert isinstance(found, Convolution)
    image = RNG.standard_normal((1, 24, 19, 16))
    assert_equal(direct(found, image), direct(second, direct(first, image)))


@pytest.mark.parametrize(("one", "two"), [(2, 3), (4, 6), (6, 4)])
def test_groups_that_do_not_nest_are_refused(one: int, two: int) -> None:
    found = compose(random(shape(12, 12, 1, 1, (0, 0), 1, one, biased=False)), random(shape(12, 12, 1, 1, (0, 0), 1, two, biased=False)))
    assert isinstance(found, Refusal)
    assert found.code == "GROUP_MISMATCH"


def test_composition_is_associative() -> None:
    chain = [
        random(shape(8, 3, 1, 1, (1, 1), 1, biased=True, axes=2)),
        random(shape(8, 8, 3, 2, (0, 0), 1, 8, biased=True, axes=2)),
        random(shape(4, 8, 1, 1, (0, 0), 1, biased=True, axes=2)),
    ]
    left, right = compose(compose(chain[0], chain[1]), chain[2]), compose(chain[0], compose(chain[1], chain[2]))  # type: ignore[arg-type]
    assert isinstance(left, Convolution)
    assert isinstance(right, Convolution)
    assert left.geometry == right.geometry
    assert_equal(left.weight, right.weight)
    assert_equal(left.bias, right.bias)


def test_without_axes_it_is_a_product_of_matrices() -> None:
    first, second = (Geometry(*size, (), (), (), (), (), biased=True) for size in ((5, 3), (2, 5)))
    one, two = random(first), random(second)
    found = compose(one, two)
    assert isinstance(found, Convolution)
    assert_equal(found.weight, two.weight @ one.weight)
    assert_equal(found.bias, two.weight @ one.bias + two.bias)


@pytest.mark.parametrize(
    ("first", "second", "grows"),
    [
        ((3, 2, 1), (3, 1, 1), True),
        ((3, 2, 1), (1, 1, 1), False),
        ((1, 2, 1), (3, 1, 1), False),
        ((3, 1, 1), (3, 1, 1), False),
        ((2, 1, 1), (3, 1, 5), True),
        ((3, 1, 2), (3, 1, 2), False),
    ],
)
def test_strides_and_dilations_that_spread(first: tuple[int, ...], second: tuple[int, ...], *, grows: bool) -> None:
    """Each is kernel, stride, dilation."""
    one, two = (shape(4, 4, k, s, (0, 0), d, biased=False, axes=2) for k, s, d in (first, second))
    assert spreads(one, two) == grows
    found = composed_geometry([one, two])
    assert (isinstance(found, Refusal) and found.code == "STRIDE_GROWTH") == grows


# Branches

BRANCHES = {
    "1x1 in 3x3": [(3, 1, (1, 1), 1, 1), (1, 1, (0, 0), 1, 1)],
    "1x1 in 3x3, stride 2": [(3, 2, (1, 1), 1, 1), (1, 2, (0, 0), 1, 1)],
    "depthwise and dense": [(3, 1, (1, 1), 1, 4), (3, 1, (1, 1), 1, 1)],
    "groups 2 and 4": [(3, 1, (1, 1), 1, 4), (5, 1, (2, 2), 1, 2)],
    "dilations 1 and 2": [(3, 1, (1, 1), 1, 1), (3, 1, (2, 2), 2, 1)],
    "dilation 2 and one tap": [(3, 1, (2, 2), 2, 1), (1, 1, (0, 0), 1, 1)],
    "dilations 2 and 3": [(3, 1, (2, 2), 2, 1), (3, 1, (3, 3), 3, 1)],
    "even and odd": [(2, 1, (0, 1), 1, 1), (2, 1, (1, 0), 1, 1), (3, 1, (1, 1), 1, 1)],
    "shifted apart": [(1, 1, (2, 0), 1, 1), (1, 1, (0, 2), 1, 1)],
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_add_up(name: str) -> None:
    given = [random(shape(4, 4, *b, biased=i == 0, axes=2)) for i, b in enumerate(BRANCHES[name])]
    found = add(given)
    assert isinstance(found, Convolution)
    assert found.geometry.groups == math.gcd(*(b.geometry.groups for b in given))
    for size in ((9, 12), (7, 5)):
        image = RNG.standard_normal((2, 4, *size))
        assert_equal(direct(found, image), np.sum([direct(b, image) for b in given], axis=0))


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ((3, 2, (1, 1), 1), (3, 1, (1, 1), 1), "stride"),
        ((3, 1, (1, 1), 1), (3, 1, (0, 0), 1), "size"),
        ((3, 2, (0, 1), 1), (1, 2, (0, 0), 1), "size"),
    ],
)
def test_branches_that_do_not_add_up(first: tuple[int, ...], second: tuple[int, ...], text: str) -> None:
    found = add_geometry([shape(4, 4, *b, biased=False, axes=2) for b in (first, second)])  # type: ignore[arg-type]
    assert isinstance(found, Refusal)
    assert found.code == "GEOMETRY"
    assert text in found.reason


def test_branches_of_other_channels_do_not_add_up() -> None:
    found = add([random(shape(o, 4, 1, 1, (0, 0), 1, biased=False)) for o in (4, 8)])
    assert isinstance(found, Refusal)
    assert "channels" in found.reason


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_an_identity_joins_a_grouped_kernel_at_its_centre(groups: int) -> None:
    kernel = random(shape(6, 6, 3, 1, (1, 1), 1, groups, biased=True, axes=2))
    found = add([kernel, identity(6, rank=2)])
    assert isinstance(found, Convolution)
    assert found.geometry == kernel.geometry
    difference = found.weight - kernel.weight
    channels = np.arange(6)
    assert_equal(difference[channels, channels % (6 // groups), 1, 1], np.ones(6))
    assert np.count_nonzero(np.abs(difference) > EXACT) == 6


def test_a_diagonal_scales_and_shifts() -> None:
    factor, offset, image = RNG.standard_normal(4), RNG.standard_normal(4), RNG.standard_normal((1, 4, 3, 5))
    found = direct(diagonal(factor, offset, rank=2), image)
    assert_equal(found, image * factor[:, None, None] + offset[:, None, None])


def test_an_average_is_a_depthwise_convolution() -> None:
    pooling = average(4, Geometry(4, 4, (3, 2), (2, 1), (1, 1), (1, 0), (1, 0), 4))
    image = RNG.standard_normal((1, 4, 9, 6))
    wanted = torch.nn.functional.avg_pool2d(torch.from_numpy(image), (3, 2), (2, 1), (1, 0), count_include_pad=True).numpy()
    assert_equal(direct(pooling, image), wanted)


def test_embedding_keeps_the_map() -> None:
    small = random(shape(4, 4, 2, 1, (0, 1), 2, 2, biased=True, axes=2))
    wide = add_geometry([small.geometry, shape(4, 4, 5, 1, (2, 2), 1, biased=True, axes=2)])
    if isinstance(wide, Refusal):
        wide = add_geometry([small.geometry, shape(4, 4, 4, 1, (1, 1), 1, biased=True, axes=2)])
    assert isinstance(wide, Geometry)
    image = RNG.standard_normal((1, 4, 8, 9))
    assert_equal(direct(embed(small, wide), image), direct(small, image))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_regrouping_keeps_the_map(groups: int) -> None:
    given = random(shape(8, 4, 3, 1, (1, 1), 1, 4, biased=True, axes=2))
    image = RNG.standard_normal((1, 4, 6, 5))
    found = regroup(given, groups)
    assert found.weight.shape == (8, 4 // groups, 3, 3)
    assert_equal(direct(found, image), direct(given, image))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_response_to_one_image(groups: int) -> None:
    given = random(Geometry(8, 4, (3, 2), (2, 1), (1, 2), (1, 0), (0, 2), groups, biased=True))
    image = RNG.standard_normal((4, 9, 7))
    assert_equal(respond(given, image), direct(given, image[None])[0])


def test_cost_is_counted_per_position() -> None:
    geometry = shape(8, 4, 3, 1, (1, 1), 1, 2, biased=True, axes=2)
    assert (geometry.macs, geometry.parameters, geometry.extents) == (8 * 2 * 9, 8 * 2 * 9 + 8, (3, 3))
