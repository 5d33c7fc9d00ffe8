"""A directory of images as a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from deploycc.core.data import Dataset, open_data
from deploycc.core.errors import UsageError
from deploycc.core.images import parse_preprocessing
from deploycc.core.shapes import profiles_for

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
HOW = {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0], "scale": 1 / 255}


def opened(folder: Path, preprocessing: dict[str, Any] | None, channels: int = 3, dtype: ir.DataType = ir.DataType.FLOAT) -> Dataset:
    value = ir.Value(name="image", shape=ir.Shape(["n", channels, 8, 8]), type=ir.TensorType(dtype))
    return open_data(str(folder), [value], profiles_for([value], [])[0], seed=0, preprocessing=preprocessing)


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (16, 12)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    paint(tmp_path / "b.png", (255, 0, 51))
    paint(tmp_path / "a.png", (0, 255, 51), size=(5, 30))
    data = opened(tmp_path, HOW)
    batch = next(data.batches(2))["image"]
    assert batch.dtype == np.float32
    assert batch.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(batch[:, :, 0, 0], [[-2, 1, -0.3], [2, -1, -0.3]], atol=1e-6)
    assert data.labels is None


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for name, count in (("dog", 1), ("cat", 2)):
        for index in range(count):
            paint(tmp_path / name / f"{index}.jpg", (10, 20, 30))
    data = opened(tmp_path, HOW)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]


def test_grey_and_bytes(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", (100, 100, 100))
    assert next(opened(tmp_path, {"size": 8, "channels": "L"}, channels=1).batches(1))["image"].shape == (1, 1, 8, 8)
    raw = next(opened(tmp_path, {"size": 8}, dtype=ir.DataType.UINT8).batches(1))["image"]
    assert raw.dtype == np.uint8
    assert (raw == 100).all()


def test_crop_keeps_the_centre(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[4:12, 4:12] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    batch = next(opened(tmp_path, {"size": 8, "crop": 0.5}).batches(1))["image"]
    np.testing.assert_array_equal(batch, 1.0)


@pytest.mark.parametrize(
    ("preprocessing", "expected"),
    [
        (None, "give --config deploycc.toml with a section [preprocessing]"),
        ({"mean": 0.5}, "the key 'size' is missing"),
        ({"size": 8, "gamma": 2}, "unknown key 'gamma'"),
        ({"size": "big"}, "a value cannot be read"),
        ({"size": 8, "channels": "BGR"}, "channels 'BGR' are unknown"),
        ({"size": 0}, "is no size"),
        ({"size": 8, "crop": 2}, "is no size"),
        ({"size": 8, "mean": [1, 2]}, "2 means"),
        ({"size": 8, "std": 0}, "not above zero"),
        ({"size": 9}, "dimension 2 of 'image' is 9"),
        ({"size": 8, "channels": "L"}, "dimension 1 of 'image' is 1"),
    ],
)
def test_refusals(tmp_path: Path, preprocessing: dict[str, Any] | None, expected: str) -> None:
    paint(tmp_path / "a.png", (1, 2, 3))
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, preprocessing)
    assert expected in str(caught.value)
    assert caught.value.at
    assert caught.value.fix


def test_a_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"image cannot be read .* Where: .*a\.png.* Fix: replace or remove the file"):
        opened(tmp_path, HOW)


def test_defaults_follow_the_usual_range() -> None:
    how = parse_preprocessing({"size": [4, 6]})
    assert (how.size, how.mean, how.std, how.channels) == ((4, 6), (0.0,), (1.0,), "RGB")
