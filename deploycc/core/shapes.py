"""Optimization profiles: for every dynamic input the smallest, the usual and the largest shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from deploycc.core.errors import UsageError

Shape = tuple[int, ...]
DEFAULT_BATCH = (1, 8, 16)
MOST_ELEMENTS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes of one input."""

    name: str
    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __str__(self) -> str:
        return f"{self.name}=" + ":".join("x".join(map(str, s)) for s in (self.minimum, self.optimum, self.maximum))


def parse_shape(text: str) -> tuple[str, list[Shape]]:
    """Parse ``NAME=MIN:OPT:MAX`` or ``NAME=SHAPE``, each shape like ``1x3x224x224``.

    Raises:
        UsageError: when the text has another form.
    """
    match = re.fullmatch(r"(.+?)=(\d+(?:x\d+)*(?::\d+(?:x\d+)*){0,2})", text)
    if not match:
        raise UsageError(
            f"cannot read the shape '{text}'", at="--shape", fix="write NAME=MIN:OPT:MAX, e.g. image=1x3x224x224:8x3x224x224:16x3x224x224"
        )
    shapes = [tuple(int(d) for d in part.split("x")) for part in match[2].split(":")]
    if len(shapes) == 2:
        raise UsageError(f"'{text}' has two shapes", at="--shape", fix="give one shape, or the three MIN:OPT:MAX")
    return match[1], shapes


def profiles_for(inputs: Sequence[ir.Value], requested: Sequence[str]) -> tuple[list[Profile], list[str]]:
    """Return one profile per input, and notes on defaults that were chosen.

    A dynamic first dimension defaults to a batch of 1:8:16. Any other dynamic dimension must be requested; a request of
    plain numbers (``image=1:8:16``) means the batch.

    Raises:
        UsageError: for an unknown input, a wrong rank, a contradiction with a static dimension, or a missing profile.
    """
    wanted: dict[str, list[Shape]] = {}
    for text in requested:
        name, shapes = parse_shape(text)
        if wanted.setdefault(name, shapes) is not shapes:
            raise UsageError(f"two shapes are given for the input '{name}'", at=f"--shape {text}", fix="give MIN:OPT:MAX once per input")
    names = {v.name: v for v in inputs}
    for name in wanted:
        if name not in names:
            raise UsageError(
                f"the model has no input '{name}'", at=f"--shape {name}=...", fix=f"its inputs are {', '.join(sorted(filter(None, names)))}"
            )
    profiles, notes = [], []
    for value in inputs:
        profile, note = _profile(value, wanted)
        profiles.append(profile)
        notes.extend(note)
    return profiles, notes


def probe_shapes(inputs: Sequence[ir.Value], profiles: Sequence[Profile]) -> tuple[list[dict[str, Shape]], list[dict[str, Shape]]]:
    """Return the shapes at which a rewrite is tried: the smallest and the largest of every profile, and odd sizes in between.

    Odd sizes concern dynamic dimensions besides the batch; dimensions of one symbol get one size, different symbols differ.
    """
    corners = [{p.name: p.minimum for p in profiles}, {p.name: p.maximum for p in profiles}]
    declared = {v.name: v.shape for v in inputs}
    sizes: dict[str, int] = {}
    odd = {p.name: _odd_shape(p, declared.get(p.name), sizes) for p in profiles}
    return [c for i, c in enumerate(corners) if c not in corners[:i]], [odd] if odd not in corners else []


def _odd_shape(profile: Profile, declared: ir.Shape | None, sizes: dict[str, int]) -> Shape:
    shape = list(profile.minimum)
    for axis, (low, high) in enumerate(zip(profile.minimum, profile.maximum, strict=True)):
        if axis == 0 or low == high:
            continue
        symbol = str(declared[axis]) if declared is not None and str(declared[axis]) != "None" else f"{profile.name}.{axis}"
        wanted = low + 1 - low % 2 + 2 * len(sizes)
        shape[axis] = sizes.setdefault(symbol, wanted if wanted <= high else low)
    return tuple(shape)


def _profile(value: ir.Value, wanted: Mapping[str, list[Shape]]) -> tuple[Profile, list[str]]:
    name = value.name or ""
    dims = [d if isinstance(d, int) and d > 0 else None for d in value.shape] if value.shape is not None else None
    if dims is None:
        if name not in wanted:
            raise UsageError(
                f"the input '{name}' has no declared rank", at=f"input '{name}'", fix=f"give --shape {name}=MIN:OPT:MAX with full shapes"
            )
        shapes = wanted[name]
        return Profile(name, *(shapes * 3 if len(shapes) == 1 else shapes)), []
    if name in wanted:
        shapes = [_expand(shape, dims, name) for shape in wanted[name]]
        shapes = shapes * 3 if len(shapes) == 1 else shapes
        return _checked(Profile(name, *shapes)), []
    if None not in dims:
        fixed = tuple(d for d in dims if d is not None)
        return Profile(name, fixed, fixed, fixed), []
    if None in dims[1:]:
        shown = ":".join("x".join(str(d if d is not None else (b if i == 0 else 224)) for i, d in enumerate(dims)) for b in DEFAULT_BATCH)
        axes = ", ".join(str(i) for i, d in enumerate(dims) if d is None and i)
        raise UsageError(
            f"the input '{name}' has dynamic dimensions besides the batch (axes {axes}) and no profile",
            at=f"input '{name}' {value.shape}",
            fix=f"give their range, for example --shape {name}={shown}",
        )
    rest = tuple(d for d in dims[1:] if d is not None)
    profile = Profile(name, *((batch, *rest) for batch in DEFAULT_BATCH))
    low, usual, high = DEFAULT_BATCH
    return profile, [
        f"the batch of '{name}' is dynamic: the engine serves {low} to {high} (best at {usual}); change it with --shape {profile}"
    ]


def _expand(shape: Shape, dims: Sequence[int | None], name: str) -> Shape:
    if len(shape) == 1 and len(dims) > 1 and None not in dims[1:]:
        shape = (shape[0], *(d for d in dims[1:] if d is not None))
    if len(shape) != len(dims):
        raise UsageError(
            f"the shape {'x'.join(map(str, shape))} has {len(shape)} dimensions, the input has {len(dims)}",
            at=f"--shape {name}=...",
            fix="give every dimension",
        )
    for axis, (asked, declared) in enumerate(zip(shape, dims, strict=True)):
        if declared is not None and asked != declared:
            raise UsageError(
                f"dimension {axis} of '{name}' is fixed to {declared}, not {asked}",
                at=f"--shape {name}=...",
                fix=f"use {declared} there, or export the model with that dimension dynamic",
            )
    return shape


def _checked(profile: Profile) -> Profile:
    for low, usual, high in zip(profile.minimum, profile.optimum, profile.maximum, strict=True):
        if not 1 <= low <= usual <= high:
            raise UsageError(f"the profile {profile} is not ordered", at="--shape", fix="need 1 <= MIN <= OPT <= MAX in every dimension")
    if prod(profile.maximum) > MOST_ELEMENTS:
        raise UsageError(
            f"the profile {profile} has more than 2^31 elements", at="--shape", fix="lower MAX; TensorRT takes no larger tensor"
        )
    return profile
