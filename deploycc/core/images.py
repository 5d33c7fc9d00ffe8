"""A directory of images as a column of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx_ir as ir

    from deploycc.core.columns import Array, Column

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_EXAMPLE = 'size = [224, 224], mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225], scale = 0.00392157, channels = "RGB"'


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pixels become samples: x = (scale * pixel - mean) / std, in the layout [C, H, W].

    The image is resized (bicubic) until it covers ``size / crop``, and its centre of ``size`` is cut out.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    channels: str = "RGB"
    crop: float = 1.0


@dataclass(frozen=True)
class ImageColumn:
    """Images that are opened and preprocessed one by one."""

    files: tuple[Path, ...]
    preprocessing: Preprocessing
    dtype: np.dtype[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return [images, channels, height, width]."""
        return (len(self.files), len(self.preprocessing.channels), *self.preprocessing.size)

    def blocks(self) -> Iterator[Array]:
        """Yield one image at a time.

        Raises:
            UsageError: when a file is no image that can be read.
        """
        for file in self.files:
            yield _pixels(file, self.preprocessing, self.dtype)[None]


@dataclass(frozen=True)
class ClassColumn:
    """The class of each image: the index of its folder among the sorted folders."""

    indices: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return [images]."""
        return (len(self.indices),)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Return int64."""
        return np.dtype(np.int64)

    def blocks(self) -> Iterator[Array]:
        """Yield all indices."""
        yield np.array(self.indices, np.int64)


def image_table(folder: Path, value: ir.Value, preprocessing: Mapping[str, Any] | None) -> dict[str, Column]:
    """Return the images of ``folder`` as samples of the input ``value``.

    Images in subfolders are labelled with the index of their folder among the sorted folders, as torchvision's ImageFolder
    does; images directly in ``folder`` have no labels.

    Raises:
        UsageError: when the preprocessing is missing or unsound, or Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UsageError("reading images needs Pillow", at=f"'{folder}'", fix="pip install pillow, or give a .npz") from None
    if preprocessing is None:
        raise UsageError(
            "a directory of images needs to know how the model was trained to see them",
            at=f"'{folder}'",
            fix=f"give --config deploycc.toml with a section [preprocessing]: {_EXAMPLE}",
        )
    flat = tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES))
    dtype = np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
    how = parse_preprocessing(preprocessing)
    if flat:
        return {value.name or "": ImageColumn(flat, how, dtype)}
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    found = [(index, p) for index, name in enumerate(classes) for p in sorted(name.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    files, indices = tuple(p for _, p in found), tuple(index for index, _ in found)
    return {value.name or "": ImageColumn(files, how, dtype), "labels": ClassColumn(indices)}


def parse_preprocessing(entries: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of a configuration section.

    Raises:
        UsageError: for an unknown or missing key, or a value that does not fit the others.
    """
    at = "[preprocessing]"
    known = set(Preprocessing.__dataclass_fields__)
    for key in entries:
        if key not in known:
            raise UsageError(f"unknown key '{key}'", at=at, fix=f"the keys are {', '.join(sorted(known))}; e.g. {_EXAMPLE}")
    if "size" not in entries:
        raise UsageError("the key 'size' is missing", at=at, fix=f"for example {_EXAMPLE}")
    try:
        result = Preprocessing(
            size=_pair(entries["size"]),
            mean=_numbers(entries.get("mean", 0.0)),
            std=_numbers(entries.get("std", 1.0)),
            scale=float(entries.get("scale", 1 / 255)),
            channels=str(entries.get("channels", "RGB")),
            crop=float(entries.get("crop", 1.0)),
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"a value cannot be read ({error})", at=at, fix=f"for example {_EXAMPLE}") from error
    _check(result, at)
    return result


def _check(how: Preprocessing, at: str) -> None:
    if how.channels not in {"RGB", "L"}:
        raise UsageError(f"channels '{how.channels}' are unknown", at=at, fix='use "RGB" or "L" (grey)')
    if min(how.size) < 1 or not 0 < how.crop <= 1:
        raise UsageError(
            f"size {how.size} with crop {how.crop} is no size", at=at, fix="give size = [height, width] above zero, crop in (0, 1]"
        )
    if {len(how.mean), len(how.std)} - {1, len(how.channels)}:
        fix = f"give one number, or one for each of the channels '{how.channels}'"
        raise UsageError(f"there are {len(how.mean)} means and {len(how.std)} standard deviations", at=at, fix=fix)
    if min(how.std) <= 0:
        raise UsageError("a standard deviation is not above zero", at=at, fix=f"for example {_EXAMPLE}")


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return (size, size)
    height, width = size
    return (int(height), int(width))


def _numbers(values: Any) -> tuple[float, ...]:
    return (float(values),) if isinstance(values, int | float) else tuple(float(v) for v in values)


def _pixels(file: Path, how: Preprocessing, dtype: np.dtype[np.generic]) -> Array:
    from PIL import Image, ImageOps, UnidentifiedImageError

    height, width = how.size
    cover = (round(width / how.crop), round(height / how.crop))
    try:
        with Image.open(file) as image:
            pixels = ImageOps.fit(image.convert(how.channels), cover, Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"the image cannot be read ({error})", at=f"'{file}'", fix="replace or remove the file") from error
    left, top = (cover[0] - width) // 2, (cover[1] - height) // 2
    cut = np.asarray(pixels.crop((left, top, left + width, top + height)))
    planes = (cut[..., None] if cut.ndim == 2 else cut).transpose(2, 0, 1)
    if dtype == np.uint8:
        return planes
    scaled = planes.astype(np.float32) * how.scale
    shape = (-1, 1, 1)
    mean, std = np.reshape(how.mean, shape), np.reshape(how.std, shape)
    sample: Array = ((scaled - mean) / std).astype(dtype)
    return sample
