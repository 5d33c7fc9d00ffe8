"""Does the data fit the model? Names, shapes, types, numbers and labels of samples, checked when a dataset is opened."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx_ir as ir

    from deploycc.core.columns import Column
    from deploycc.core.shapes import Profile

LABELS = "labels"
UNBOUNDED = 2**31


def match_names(table: Mapping[str, Column], inputs: Sequence[ir.Value], spec: str) -> dict[str, Column]:
    """Return the columns of the inputs, in the order of the inputs.

    Raises:
        UsageError: when an input has no column, or a column has no input.
    """
    wanted = [value.name or "" for value in inputs]
    missing = [name for name in wanted if name not in table]
    extra = [name for name in table if name not in wanted and name != LABELS]
    has = ", ".join(f"'{name}'" for name in table) or "nothing"
    needs = ", ".join(f"'{name}'" for name in wanted)
    if missing:
        raise UsageError(
            f"the data has no array '{missing[0]}'",
            at=f"'{spec}' holds {has}; the model's inputs are {needs}",
            fix=f"save it as np.savez(path, {missing[0]}=...)",
        )
    if extra:
        raise UsageError(
            f"the data has an array '{extra[0]}' that is no input of the model",
            at=f"'{spec}' holds {has}; the model's inputs are {needs}",
            fix="leave it out, or give it the name of an input (class indices are named 'labels')",
        )
    return {name: table[name] for name in wanted}


def check_column(column: Column, value: ir.Value, profile: Profile | None, spec: str) -> None:
    """Check the type and shape of one column against an input and its profile.

    Raises:
        UsageError: when they differ; nothing is converted silently.
    """
    name = value.name or ""
    at = f"'{name}' in '{spec}'"
    _check_type(column, value, at)
    if len(column.shape) == 0:
        raise UsageError(f"the array '{name}' is a single number", at=at, fix="give an array whose first dimension counts the samples")
    declared = list(value.shape) if value.shape is not None else None
    if declared is not None and len(declared) != len(column.shape):
        raise UsageError(
            f"the array '{name}' has shape {_shown(column.shape)}, and the input has {len(declared)} dimensions {_shown(declared)}",
            at=at,
            fix="the first dimension counts the samples, the others are those of one sample",
        )
    for axis, size in enumerate(column.shape[1:], start=1):
        dim = declared[axis] if declared is not None else None
        if isinstance(dim, int) and dim != size:
            raise UsageError(
                f"dimension {axis} of '{name}' is {size}, and the input takes {dim}",
                at=f"{at}: {_shown(column.shape)} against {_shown(declared or ())}",
                fix="resize or transpose the samples (the usual layout is [N, C, H, W])",
            )
    if profile is not None and len(profile.minimum) == len(column.shape):
        _check_range(column, profile, at)


def _check_type(column: Column, value: ir.Value, at: str) -> None:
    name = value.name or ""
    expected = value.dtype.numpy() if value.dtype is not None else column.dtype
    if column.dtype != expected:
        found = column.dtype.name if column.dtype.isnative else column.dtype.str
        hint = ".astype(np.float32)" if expected == np.float32 else f".astype('{np.dtype(expected).name}')"
        raise UsageError(
            f"the array '{name}' is {found}, and the input takes {np.dtype(expected).name}",
            at=at,
            fix=f"save {name}{hint}, preprocessed as the model expects",
        )


def _check_range(column: Column, profile: Profile, at: str) -> None:
    for axis, size in enumerate(column.shape[1:], start=1):
        low, high = profile.minimum[axis], profile.maximum[axis]
        if not low <= size <= high:
            raise UsageError(
                f"dimension {axis} of '{profile.name}' is {size}, outside the profile's {low} to {high}",
                at=at,
                fix=f"widen --shape {profile}, or resize the samples",
            )


def batch_limits(inputs: Sequence[ir.Value], profiles: Mapping[str, Profile]) -> tuple[int, int]:
    """Return the smallest and the largest batch that all inputs take.

    Raises:
        UsageError: when an input has no batch dimension, or the inputs agree on no batch.
    """
    low, high = 1, UNBOUNDED
    for value in inputs:
        name = value.name or ""
        if value.shape is not None and len(value.shape) == 0:
            raise UsageError(
                f"the input '{name}' is a single number, without a batch dimension",
                at=f"input '{name}'",
                fix="make it a constant of the model",
            )
        first = value.shape[0] if value.shape is not None else None
        if isinstance(first, int):
            low, high = max(low, first), min(high, first)
        elif name in profiles:
            low, high = max(low, profiles[name].minimum[0]), min(high, profiles[name].maximum[0])
    if low > high:
        sizes = ", ".join(f"'{value.name}' {_shown(value.shape or ())}" for value in inputs)
        raise UsageError("the inputs agree on no batch", at=sizes, fix="all inputs need the same first dimension")
    return low, high


def count_samples(columns: Mapping[str, Column], labels: np.ndarray | None, spec: str) -> int:
    """Return the number of samples.

    Raises:
        UsageError: when there is none, or the arrays differ in their number.
    """
    counts = {name: column.shape[0] for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"'{name}' has {count}" for name, count in counts.items())
        raise UsageError(
            "the arrays have different numbers of samples", at=f"'{spec}': {told}", fix="give every input the same number of samples"
        )
    count = next(iter(counts.values()))
    if count == 0:
        raise UsageError("the data has no samples", at=f"'{spec}'", fix="give at least one batch")
    if labels is not None and len(labels) != count:
        raise UsageError(
            f"there are {len(labels)} labels for {count} samples", at=f"'{LABELS}' in '{spec}'", fix="give one class index per sample"
        )
    return count


def read_labels(table: Mapping[str, Column], inputs: Sequence[ir.Value], spec: str) -> np.ndarray | None:
    """Return class indices as int64 of shape [samples], boolean masks of shape [samples, ...], or None.

    Raises:
        UsageError: when they are neither, or an index is negative.
    """
    if LABELS not in table or any(value.name == LABELS for value in inputs):
        return None
    column = table[LABELS]
    at = f"'{LABELS}' in '{spec}'"
    if column.dtype.kind == "b" and len(column.shape) > 1:
        return np.concatenate([np.zeros((0, *column.shape[1:]), bool), *column.blocks()])
    if column.dtype.kind not in "iu":
        raise UsageError(
            f"the labels are {column.dtype.name}, not integers",
            at=at,
            fix="give class indices, labels.astype(np.int64), or masks of an output's shape, labels.astype(bool)",
        )
    if len(column.shape) != 1:
        raise UsageError(
            f"the labels have shape {_shown(column.shape)}",
            at=at,
            fix="give one class index per sample, shape [samples]; for one-hot rows use labels.argmax(1)",
        )
    labels = np.concatenate([np.zeros(0, np.int64), *(block.astype(np.int64) for block in column.blocks())])
    if labels.size and labels.min() < 0:
        raise UsageError(
            f"label {int(labels.argmin())} is negative ({labels.min()})",
            at=at,
            fix="class indices start at 0; leave unlabelled samples out",
        )
    return labels


def check_numbers(columns: Mapping[str, Column], labels: np.ndarray | None, spec: str) -> str:
    """Read everything once: refuse NaN and infinity, and return the SHA-256 of names, types, shapes and numbers.

    Raises:
        UsageError: for NaN or infinity, naming the array and the first index.
    """
    sha = hashlib.sha256()
    for name in sorted(columns):
        column, start = columns[name], 0
        sha.update(f"{name}:{column.dtype.str}:{column.shape};".encode())
        for block in column.blocks():
            if column.dtype.kind not in "biu" and not np.isfinite(block).all():
                first = np.argwhere(~np.isfinite(block))[0]
                index = (start + int(first[0]), *(int(i) for i in first[1:]))
                raise UsageError(
                    f"the array '{name}' holds {block[tuple(first)]} at index {list(index)}",
                    at=f"'{name}' in '{spec}'",
                    fix="correct the preprocessing, or leave the sample out",
                )
            sha.update(np.ascontiguousarray(block).tobytes())
            start += len(block)
    if labels is not None:
        sha.update(labels.tobytes())
    return sha.hexdigest()


def _shown(shape: Iterable[object]) -> str:
    return "[" + ", ".join(str(d) for d in shape) + "]"
