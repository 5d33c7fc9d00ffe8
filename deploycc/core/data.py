"""Streamed batches of named arrays, for calibration and evaluation.

A dataset is checked once when it is opened: names, shapes, types, and every number. After that it can be read as often as
needed, batch by batch, and never lies in memory as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.columns import ChainedColumn, Column, SyntheticColumn, open_npy, open_npz, regroup
from deploycc.core.errors import UsageError
from deploycc.core.fitting import batch_limits, check_column, check_numbers, count_samples, match_names, read_labels
from deploycc.core.images import IMAGE_SUFFIXES, image_table

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.shapes import Profile

Table = Mapping[str, Column]
_FORMS = "give a .npz, a .npy, a directory of them, a directory of images, or synthetic:N"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples for every input of a model, in a fixed order.

    Attributes:
        source: where the samples come from, as the user wrote it.
        samples: how many there are.
        synthetic: whether they were generated.
        labels: class indices of shape [samples], masks of shape [samples, ...], or None.
        digest: SHA-256 over names, types, shapes and numbers, whatever file they came in.
        limits: the smallest and the largest batch that the model takes.
        notes: what the user should know, e.g. samples that were left out.
    """

    source: str
    samples: int
    synthetic: bool
    labels: np.ndarray | None
    digest: str
    columns: Table = field(repr=False)
    limits: tuple[int, int]
    notes: tuple[str, ...] = ()

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the samples in order, ``size`` at a time, or as near to it as the model's batch allows.

        The last batch may be smaller. Samples left over that would make a batch smaller than the model takes are not
        yielded, so the number of samples yielded may fall short of ``samples`` when the smallest batch is above one.
        """
        low, high = self.limits
        step = min(max(size, low), high)
        sizes = [min(step, self.samples - start) for start in range(0, self.samples, step)]
        sizes = [s for s in sizes if s >= low]
        streams = {name: regroup(column.blocks(), sizes) for name, column in self.columns.items()}
        for _ in sizes:
            yield {name: next(stream) for name, stream in streams.items()}

    def take(self, count: int) -> Dataset:
        """Return the first ``count`` samples, or all when there are fewer; at least one batch, and whole ones if it is fixed."""
        low, high = self.limits
        kept = min(max(count, low), self.samples)
        kept -= kept % high if low == high else 0
        if kept == self.samples:
            return self
        digest = hashlib.sha256(f"{self.digest}[:{kept}]".encode()).hexdigest()
        return replace(self, samples=kept, digest=digest, labels=self.labels[:kept] if self.labels is not None else None)


def open_data(
    spec: str,
    inputs: Sequence[ir.Value],
    profiles: Sequence[Profile],
    *,
    seed: int,
    preprocessing: Mapping[str, Any] | None = None,
) -> Dataset:
    """Open the samples that ``spec`` names and check them against the inputs of a model.

    Args:
        spec: a ``.npz`` whose keys are input names (and optionally ``labels``), a ``.npy`` for a model of one input, a
            directory of such files or of images, or ``synthetic:N``.
        inputs: the model's inputs.
        profiles: the shapes that the engine will serve, one per input.
        seed: determines synthetic samples.
        preprocessing: ``size``, ``mean``, ``std``, ``scale``, ``channels`` for a directory of images.

    Raises:
        UsageError: when the data is missing, cannot be read, or does not fit the model.
    """
    ranges = {profile.name: profile for profile in profiles}
    limits = batch_limits(inputs, ranges)
    if spec.partition(":")[0] == "synthetic":
        return _synthetic(spec, inputs, ranges, limits, seed)
    return _recorded(spec, _table(Path(spec), inputs, preprocessing), inputs, ranges, limits)


def _recorded(spec: str, table: Table, inputs: Sequence[ir.Value], ranges: Mapping[str, Profile], limits: tuple[int, int]) -> Dataset:
    columns = match_names(table, inputs, spec)
    for value in inputs:
        check_column(columns[value.name or ""], value, ranges.get(value.name or ""), spec)
    labels = read_labels(table, inputs, spec)
    samples = count_samples(columns, labels, spec)
    usable, notes = _usable(samples, limits, spec)
    return Dataset(
        source=spec,
        samples=usable,
        synthetic=False,
        labels=labels[:usable] if labels is not None else None,
        digest=check_numbers(columns, labels, spec),
        columns=columns,
        limits=limits,
        notes=notes,
    )


def _usable(samples: int, limits: tuple[int, int], spec: str) -> tuple[int, tuple[str, ...]]:
    low, high = limits
    if samples < low:
        raise UsageError(
            f"the data has {samples} samples, and one batch of the model takes {low}",
            at=f"'{spec}'",
            fix=f"give at least {low} samples, or export the model with a dynamic batch",
        )
    left = samples % high if low == high else 0
    if not left:
        return samples, ()
    return samples - left, (f"{left} of {samples} samples of '{spec}' are left out: the model's batch is fixed to {high}",)


def _table(path: Path, inputs: Sequence[ir.Value], preprocessing: Mapping[str, Any] | None) -> Table:
    if path.is_dir():
        return _folder_table(path, inputs, preprocessing)
    if path.suffix == ".npz":
        return open_npz(path)
    if path.suffix == ".npy":
        return {_only(inputs, path).name or "": open_npy(path)}
    if not path.exists():
        raise UsageError("the data file does not exist", at=f"'{path}'", fix="check the path given to --data or --eval; " + _FORMS)
    raise UsageError(f"files of type '{path.suffix}' are not read as data", at=f"'{path}'", fix=_FORMS)


def _folder_table(folder: Path, inputs: Sequence[ir.Value], preprocessing: Mapping[str, Any] | None) -> Table:
    files = sorted(p for p in folder.iterdir() if p.suffix in {".npz", ".npy"})
    if not files:
        if any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.rglob("*")):
            return image_table(folder, _only(inputs, folder), preprocessing)
        raise UsageError("the directory holds no .npz, .npy or image files", at=f"'{folder}'", fix=_FORMS)
    tables = [_table(path, inputs, None) for path in files]
    for path, table in zip(files, tables, strict=True):
        _check_alike(files[0], tables[0], path, table)
    return {name: ChainedColumn(tuple(table[name] for table in tables)) for name in tables[0]}


def _check_alike(first: Path, expected: Table, path: Path, table: Table) -> None:
    if set(table) != set(expected):
        raise UsageError(
            f"the files hold different arrays: {sorted(table)} and {sorted(expected)}",
            at=f"'{path}' and '{first}'",
            fix="give every file the same keys",
        )
    for name, column in table.items():
        model = expected[name]
        if column.dtype != model.dtype or column.shape[1:] != model.shape[1:] or not column.shape:
            raise UsageError(
                f"the arrays '{name}' differ: {column.dtype} {list(column.shape)} and {model.dtype} {list(model.shape)}",
                at=f"'{path}' and '{first}'",
                fix="save all files with the same type, and the same shape after the first dimension, which counts the samples",
            )


def _only(inputs: Sequence[ir.Value], path: Path) -> ir.Value:
    if len(inputs) != 1:
        names = ", ".join(f"'{value.name}'" for value in inputs)
        raise UsageError(
            f"the data has no names, and the model has {len(inputs)} inputs",
            at=f"'{path}'; inputs {names}",
            fix="give a .npz with one array per input",
        )
    return inputs[0]


def _synthetic(spec: str, inputs: Sequence[ir.Value], ranges: Mapping[str, Profile], limits: tuple[int, int], seed: int) -> Dataset:
    _, _, text = spec.partition(":")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"cannot read '{spec}'", at="--data", fix="write synthetic:N with a number of samples, e.g. synthetic:64")
    samples, notes = _usable(int(text), limits, spec)
    columns: dict[str, Column] = {}
    for value in inputs:
        name = value.name or ""
        shape = _sample_shape(value, ranges.get(name))
        dtype = np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
        columns[name] = SyntheticColumn(name, (samples, *shape), dtype, seed)
    told = ";".join(f"{name}:{column.dtype.str}:{column.shape}" for name, column in columns.items())
    digest = hashlib.sha256(f"synthetic/1:{seed}:{told}".encode()).hexdigest()
    return Dataset(source=spec, samples=samples, synthetic=True, labels=None, digest=digest, columns=columns, limits=limits, notes=notes)


def _sample_shape(value: ir.Value, profile: Profile | None) -> tuple[int, ...]:
    if profile is not None:
        return profile.optimum[1:]
    dims = list(value.shape)[1:] if value.shape is not None else [None]
    if not all(isinstance(d, int) for d in dims):
        raise UsageError(
            f"the shape of '{value.name}' is not known",
            at=f"input '{value.name}' {value.shape}",
            fix=f"give --shape {value.name}=MIN:OPT:MAX",
        )
    return tuple(d for d in dims if isinstance(d, int))
