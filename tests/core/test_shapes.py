"""Profiles: what is read, what is assumed, and what is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from deploycc.core.errors import UsageError
from deploycc.core.shapes import Profile, parse_shape, profiles_for


def value(name: str, shape: list[int | str] | None) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


IMAGE = value("image", ["batch", 3, 8, 8])
FREE = value("image", ["batch", 3, "h", "w"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image=1x3x8x8", ("image", [(1, 3, 8, 8)])),
        ("image=1:8:16", ("image", [(1,), (8,), (16,)])),
        ("a=b=1x2:2x2:4x2", ("a=b", [(1, 2), (2, 2), (4, 2)])),
    ],
)
def test_shapes_are_read(text: str, expected: object) -> None:
    assert parse_shape(text) == expected


@pytest.mark.parametrize("text", ["image", "image=", "=1x3", "image=1,3", "image=1x3:", "image=-1x3", "image=1x3:2x3:4x3:8x3", "image=axb"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_shape(text)
    assert text in str(caught.value)
    assert caught.value.at == "--shape"
    assert "NAME=MIN:OPT:MAX" in caught.value.fix


def test_an_input_with_two_requests_is_refused() -> None:
    with pytest.raises(UsageError, match=r"two shapes are given for the input 'image'\. Where: --shape image=4\. Fix:"):
        profiles_for([IMAGE], ["image=1:2:4", "image=4"])


def test_a_tensor_beyond_32_bits_is_refused() -> None:
    with pytest.raises(UsageError, match=r"more than 2\^31 elements\. Where: --shape\. Fix: lower MAX"):
        profiles_for([IMAGE], ["image=1:8:99999999999"])


def test_two_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"has two shapes\. Where: --shape\. Fix: give one shape, or the three"):
        parse_shape("image=1x3:2x3")


def test_a_dynamic_batch_has_a_default_and_a_note() -> None:
    profiles, notes = profiles_for([IMAGE], [])
    assert profiles == [Profile("image", (1, 3, 8, 8), (8, 3, 8, 8), (16, 3, 8, 8))]
    assert "the engine serves 1 to 16" in notes[0]
    assert f"--shape {profiles[0]}" in notes[0]


def test_static_shapes_need_nothing() -> None:
    assert profiles_for([value("x", [4, 5])], []) == ([Profile("x", (4, 5), (4, 5), (4, 5))], [])


def test_one_number_is_the_batch() -> None:
    profiles, notes = profiles_for([IMAGE], ["image=2:4:8"])
    assert str(profiles[0]) == "image=2x3x8x8:4x3x8x8:8x3x8x8"
    assert notes == []


def test_one_shape_fixes_the_engine() -> None:
    profiles, _ = profiles_for([FREE], ["image=2x3x32x48"])
    assert profiles[0].minimum == profiles[0].optimum == profiles[0].maximum == (2, 3, 32, 48)


def test_a_profile_reads_back() -> None:
    profile = Profile("image", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    assert profiles_for([FREE], [str(profile)])[0] == [profile]


@pytest.mark.parametrize(
    ("inputs", "requested", "what", "fix"),
    [
        ([FREE], [], "dynamic dimensions besides the batch (axes 2, 3)", "--shape image=1x3x224x224:8x3x224x224:16x3x224x224"),
        ([IMAGE], ["picture=1x3x8x8"], "no input 'picture'", "its inputs are image"),
        ([IMAGE], ["image=1x3x8"], "has 3 dimensions, the input has 4", "give every dimension"),
        ([IMAGE], ["image=1x1x8x8"], "dimension 1 of 'image' is fixed to 3, not 1", "use 3 there"),
        ([IMAGE], ["image=4:2:8"], "is not ordered", "MIN <= OPT <= MAX"),
        ([IMAGE], ["image=0:2:8"], "is not ordered", "1 <= MIN"),
        ([value("image", None)], [], "no declared rank", "--shape image=MIN:OPT:MAX"),
    ],
)
def test_refusals(inputs: list[ir.Value], requested: list[str], what: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        profiles_for(inputs, requested)
    assert what in caught.value.what
    assert caught.value.at
    assert fix in caught.value.fix
