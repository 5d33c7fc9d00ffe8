"""Columns of samples: one named array of any length that is read in blocks, from files or from a seeded generator."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol

import numpy as np

from deploycc.core.archives import check_archive, check_block
from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Array = np.ndarray
BLOCK_BYTES = 16 * 2**20
RESAVE = "save it again with np.savez(path, name=array), from arrays of numbers"


class Column(Protocol):
    """An array of shape ``[samples, ...]`` that yields its samples in order, as blocks of any length."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape, samples first."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Return the element type."""
        ...

    def blocks(self) -> Iterator[Array]:
        """Yield the samples in order; every call begins again."""
        ...


@dataclass(frozen=True)
class MappedColumn:
    """The array of a ``.npy`` file, memory-mapped."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def blocks(self) -> Iterator[Array]:
        """Yield slices of the mapped file."""
        array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        for start in range(0, len(array), step := block_length(self.shape, self.dtype)):
            yield np.array(array[start : start + step])


@dataclass(frozen=True)
class MemberColumn:
    """One array of a ``.npz`` file, unpacked block by block."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool = False

    def blocks(self) -> Iterator[Array]:
        """Yield blocks of the member as it is unpacked; an array in Fortran order is read at once.

        Raises:
            UsageError: when the member is shorter than its header says, or damaged.
        """
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        step = len_all = self.shape[0]
        if not self.fortran:
            step = block_length(self.shape, self.dtype)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                read_header(stream, self.path)
                for start in range(0, len_all, max(step, 1)):
                    count = min(step, len_all - start)
                    yield self._block(stream.read(count * row), count)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
            raise UsageError(f"the array is damaged or truncated ({error})", at=f"'{self.member}' of '{self.path}'", fix=RESAVE) from error

    def _block(self, data: bytes, count: int) -> Array:
        rows: Array = np.frombuffer(data, self.dtype).reshape((count, *self.shape[1:]), order="F" if self.fortran else "C")
        return rows


@dataclass(frozen=True)
class ChainedColumn:
    """Columns of several files, one after the other."""

    parts: tuple[Column, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the common shape with all samples."""
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Return the common element type."""
        return self.parts[0].dtype

    def blocks(self) -> Iterator[Array]:
        """Yield the blocks of every part in turn."""
        for part in self.parts:
            yield from part.blocks()


@dataclass(frozen=True)
class SyntheticColumn:
    """Seeded samples; sample ``i`` is the same whatever the batch size and the number of samples."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    seed: int

    def blocks(self) -> Iterator[Array]:
        """Yield one sample at a time."""
        key = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")
        for index in range(self.shape[0]):
            rng = np.random.default_rng([self.seed, key, index])
            yield _sample(rng, self.shape[1:], self.dtype)[None]


def _sample(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    image = len(shape) == 3
    values: Array
    if dtype == np.uint8 and image:
        values = np.clip(np.rint(smooth_noise(rng, shape) * 50 + 128), 0, 255)
    elif dtype.kind in "biu":
        # Integers are mostly indices and masks of unknown range; zero and one are nearly always valid.
        values = rng.integers(0, 2, shape)
    else:
        values = smooth_noise(rng, shape) if image else rng.standard_normal(shape)
    return values.astype(dtype)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return noise of shape [C, H, W] with the statistics of photographs: amplitude 1/f, correlated channels.

    Channel c is 0.9 shared + 0.44 own, each with mean 0; the whole is scaled to variance 1. The slope of 1/f is that of
    natural images (Field 1987, "Relations between the statistics of natural images and the response properties of
    cortical cells").
    """
    channels, height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    floor = 1.0 / max(height, width)
    spectrum = np.fft.rfft2(rng.standard_normal((channels + 1, height, width))) / np.maximum(frequency, floor)
    noise = np.fft.irfft2(spectrum, s=(height, width))
    mixed = 0.9 * noise[:1] + 0.44 * noise[1:]
    scaled: Array = mixed / max(float(mixed.std()), 1e-12)
    return scaled


def block_length(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    """Return how many samples make a block of about ``BLOCK_BYTES``."""
    row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    return max(1, BLOCK_BYTES // max(row, 1))


def regroup(blocks: Iterable[Array], sizes: Iterable[int]) -> Iterator[Array]:
    """Cut a stream of blocks into arrays of the given lengths."""
    stream = iter(blocks)
    rest: Array | None = None
    for size in sizes:
        parts, count = ([rest], len(rest)) if rest is not None else ([], 0)
        while count < size:
            parts.append(next(stream))
            count += len(parts[-1])
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        yield np.ascontiguousarray(joined[:size])
        rest = joined[size:] if count > size else None


def open_npy(path: Path) -> MappedColumn:
    """Return the column of a ``.npy`` file.

    Raises:
        UsageError: when the file is missing, is no array of numbers, or is shorter than its header says.
    """
    with _opened(path) as stream:
        shape, dtype, _ = read_header(stream, path)
        if path.stat().st_size - stream.tell() < int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise UsageError("the array is truncated", at=f"'{path}'", fix="copy or save the file again")
    return MappedColumn(path, shape, dtype)


def open_npz(path: Path) -> dict[str, Column]:
    """Return the columns of a ``.npz`` file by name.

    Raises:
        UsageError: when the file is missing, is no archive of arrays of numbers, is damaged, or declares more than is read.
    """
    columns: dict[str, Column] = {}
    try:
        with _opened(path) as file, zipfile.ZipFile(file) as archive:
            check_archive(archive, path)
            for member in archive.namelist():
                with archive.open(member) as stream:
                    shape, dtype, fortran = read_header(stream, path, member)
                check_block(math.prod(shape if fortran else shape[1:]) * dtype.itemsize, f"'{member}' of '{path}'")
                columns[member.removesuffix(".npy")] = MemberColumn(path, member, shape, dtype, fortran)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"the file is not a whole .npz archive ({error})", at=f"'{path}'", fix=RESAVE) from error
    return columns


def read_header(stream: IO[bytes], path: Path, member: str = "") -> tuple[tuple[int, ...], np.dtype[np.generic], bool]:
    """Read the header of a npy stream: shape, element type, and whether it is in Fortran order.

    Raises:
        UsageError: when it is no npy stream, or holds pickled objects.
    """
    at = f"'{member}' of '{path}'" if member else f"'{path}'"
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except (ValueError, EOFError) as error:
        raise UsageError("there is no NumPy array here (pickled files are not read)", at=at, fix=RESAVE) from error
    if dtype.hasobject:
        raise UsageError("the array holds pickled Python objects, which could run any code when read", at=at, fix=RESAVE)
    return shape, dtype, fortran


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UsageError("the data file does not exist", at=f"'{path}'", fix="check the path given to --data or --eval") from None
    except OSError as error:
        raise UsageError(f"the data file cannot be read ({error.strerror})", at=f"'{path}'", fix="check its permissions") from error
