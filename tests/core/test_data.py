"""Datasets: what they yield, and every refusal."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from deploycc.core import archives
from deploycc.core.columns import regroup, smooth_noise
from deploycc.core.data import Dataset, open_data
from deploycc.core.errors import UsageError
from deploycc.core.shapes import Profile, profiles_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RNG = np.random.default_rng(3)


def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


IMAGE = value("image", ["batch", 3, 8, 8])
FIXED = value("image", [4, 3, 8, 8])


def images(count: int) -> np.ndarray:
    return RNG.standard_normal((count, 3, 8, 8)).astype(np.float32)


def opened(spec: Path | str, *inputs: ir.Value, shapes: tuple[str, ...] = (), **options: object) -> Dataset:
    wanted = inputs or (IMAGE,)
    return open_data(str(spec), wanted, profiles_for(wanted, shapes)[0], seed=0, **options)


def npz(tmp_path: Path, name: str = "d.npz", **arrays: object) -> Path:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


def refusal(spec: Path | str, *inputs: ir.Value, **options: object) -> str:
    """Return the text of the refusal, after checking its form."""
    with pytest.raises(UsageError) as caught:
        opened(spec, *inputs, **options)
    error = caught.value
    assert error.exit_code == 2
    assert error.what
    assert error.at
    assert error.fix
    assert "\n" not in str(error)
    return str(error)


def joined(data: Dataset, size: int, name: str = "image") -> np.ndarray:
    return np.concatenate([batch[name] for batch in data.batches(size)])


class TestBatches:
    def test_of_an_npz_in_order_and_again(self, tmp_path: Path) -> None:
        x, labels = images(21), np.arange(21) % 7
        data = opened(npz(tmp_path, image=x, labels=labels))
        assert [len(b["image"]) for b in data.batches(8)] == [8, 8, 5]
        for size in (1, 8, 16):
            np.testing.assert_array_equal(joined(data, size), x)
        assert (data.samples, data.synthetic, data.notes) == (21, False, ())
        np.testing.assert_array_equal(data.labels, labels)
        assert all(b["image"].flags.c_contiguous for b in data.batches(8))

    def test_of_a_compressed_npz_across_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("deploycc.core.columns.BLOCK_BYTES", 3 * 8 * 8 * 4 * 5)
        x = images(23)
        np.savez_compressed(tmp_path / "d.npz", image=x)
        np.testing.assert_array_equal(joined(opened(tmp_path / "d.npz"), 8), x)

    def test_of_an_array_in_fortran_order(self, tmp_path: Path) -> None:
        x = np.asfortranarray(images(9))
        np.testing.assert_array_equal(joined(opened(npz(tmp_path, image=x)), 4), x)
        np.save(tmp_path / "d.npy", x)
        np.testing.assert_array_equal(joined(opened(tmp_path / "d.npy"), 4), x)

    def test_of_an_npy_is_memory_mapped(self, tmp_path: Path) -> None:
        np.save(tmp_path / "d.npy", x := images(5))
        np.testing.assert_array_equal(joined(opened(tmp_path / "d.npy"), 2), x)

    def test_of_a_directory_cross_its_files(self, tmp_path: Path) -> None:
        x = images(12)
        for index, part in enumerate(np.split(x, [5, 6])):
            npz(tmp_path, f"{index}.npz", image=part, labels=np.full(len(part), index))
        data = opened(tmp_path)
        assert [len(b["image"]) for b in data.batches(4)] == [4, 4, 4]
        np.testing.assert_array_equal(joined(data, 4), x)
        assert data.labels is not None
        assert data.labels.tolist() == [0] * 5 + [1] + [2] * 6

    def test_of_several_inputs(self, tmp_path: Path) -> None:
        mask = value("mask", ["batch", 5], ir.DataType.INT64)
        data = opened(npz(tmp_path, mask=np.ones((6, 5), np.int64), image=(x := images(6))), IMAGE, mask)
        first = next(data.batches(4))
        assert list(first) == ["image", "mask"]
        np.testing.assert_array_equal(first["image"], x[:4])

    def test_labels_may_be_an_input(self, tmp_path: Path) -> None:
        data = opened(npz(tmp_path, labels=np.ones((6, 5), np.float32)), value("labels", ["n", 5]))
        assert data.labels is None
        assert next(data.batches(6))["labels"].shape == (6, 5)

    def test_of_a_fixed_batch_have_its_size(self, tmp_path: Path) -> None:
        data = opened(npz(tmp_path, image=images(10), labels=np.zeros(10, int)), FIXED)
        assert [len(b["image"]) for b in data.batches(16)] == [4, 4]
        assert data.samples == 8
        assert data.labels is not None
        assert len(data.labels) == 8
        assert "2 of 10 samples" in data.notes[0]
        assert "fixed to 4" in data.notes[0]

    def test_stay_within_the_profile(self, tmp_path: Path) -> None:
        data = opened(npz(tmp_path, image=images(20)), IMAGE, shapes=("image=2:4:8",))
        assert [len(b["image"]) for b in data.batches(100)] == [8, 8, 4]
        assert [len(b["image"]) for b in data.batches(1)] == [2] * 10

    def test_take(self, tmp_path: Path) -> None:
        data = opened(npz(tmp_path, image=(x := images(20)), labels=np.arange(20)))
        few = data.take(6)
        np.testing.assert_array_equal(joined(few, 4), x[:6])
        assert few.samples == 6
        assert few.labels is not None
        assert few.labels.tolist() == list(range(6))
        assert few.digest != data.digest
        assert data.take(100) is data
        assert opened(npz(tmp_path, image=x), FIXED).take(6).samples == 4

    def test_regroup_keeps_order(self) -> None:
        blocks = np.split(np.arange(10), [1, 7])
        assert [a.tolist() for a in regroup(blocks, [3, 3, 4])] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


class TestDigest:
    def test_depends_on_the_numbers_and_not_on_the_container(self, tmp_path: Path) -> None:
        x = images(6)
        digests = {opened(npz(tmp_path, image=x)).digest}
        np.savez_compressed(tmp_path / "c.npz", image=x)
        digests.add(opened(tmp_path / "c.npz").digest)
        np.save(tmp_path / "c.npy", x)
        digests.add(opened(tmp_path / "c.npy").digest)
        assert len(digests) == 1
        x[3, 1, 2, 2] += 1
        assert opened(npz(tmp_path, image=x)).digest not in digests


class TestSynthetic:
    def test_does_not_depend_on_the_batch_or_the_count(self) -> None:
        data = opened("synthetic:10")
        assert data.synthetic
        np.testing.assert_array_equal(joined(data, 3), joined(data, 10))
        np.testing.assert_array_equal(joined(opened("synthetic:4"), 4), joined(data, 10)[:4])

    def test_depends_on_the_seed(self) -> None:
        profiles, _ = profiles_for([IMAGE], [])
        one, two = (open_data("synthetic:2", [IMAGE], profiles, seed=seed) for seed in (1, 2))
        assert one.digest != two.digest
        assert not np.array_equal(joined(one, 2), joined(two, 2))

    def test_looks_like_photographs(self) -> None:
        noise = smooth_noise(np.random.default_rng(0), (3, 64, 64))
        assert abs(noise.mean()) < 1e-6
        assert noise.std() == pytest.approx(1, abs=1e-6)
        neighbours = np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1]
        channels = np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]
        assert neighbours > 0.6  # white noise has 0
        assert 0.5 < channels < 0.95

    def test_fills_every_type(self) -> None:
        inputs = [
            value("half", ["n", 3, 4, 4], ir.DataType.FLOAT16),
            value("bytes", ["n", 3, 4, 4], ir.DataType.UINT8),
            value("ids", ["n", 7], ir.DataType.INT64),
            value("flag", ["n"], ir.DataType.BOOL),
            value("vector", ["n", 5]),
        ]
        batch = next(opened("synthetic:6", *inputs).batches(6))
        assert {name: (a.dtype.name, a.shape) for name, a in batch.items()} == {
            "half": ("float16", (6, 3, 4, 4)),
            "bytes": ("uint8", (6, 3, 4, 4)),
            "ids": ("int64", (6, 7)),
            "flag": ("bool", (6,)),
            "vector": ("float32", (6, 5)),
        }
        assert set(np.unique(batch["ids"])) <= {0, 1}

    def test_takes_the_optimum_of_the_profile(self) -> None:
        free = value("image", ["n", 3, "h", "w"])
        data = opened("synthetic:2", free, shapes=("image=1x3x8x8:2x3x12x16:4x3x32x32",))
        assert next(data.batches(2))["image"].shape == (2, 3, 12, 16)

    @pytest.mark.parametrize("spec", ["synthetic", "synthetic:", "synthetic:0", "synthetic:-3", "synthetic:ten"])
    def test_refuses_other_counts(self, spec: str) -> None:
        assert "write synthetic:N" in refusal(spec)

    def test_refuses_less_than_a_batch(self) -> None:
        assert "one batch of the model takes 4" in refusal("synthetic:3", FIXED)


def declaring(path: Path, size: int) -> Path:
    """Make the directory of an archive declare that every member has ``size`` bytes."""
    data, place = bytearray(path.read_bytes()), -1
    while (place := data.find(b"PK\x01\x02", place + 1)) >= 0:
        data[place + 24 : place + 28] = size.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


class TestRefusals:
    def test_missing(self, tmp_path: Path) -> None:
        for name in ("no.npz", "no.npy", "no", "no.jpg"):
            assert "does not exist" in refusal(tmp_path / name)

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "d.h5").write_text("x")
        text = refusal(tmp_path / "d.h5")
        assert "'.h5' are not read" in text
        assert "synthetic:N" in text

    def test_empty_directory(self, tmp_path: Path) -> None:
        assert "holds no .npz, .npy or image files" in refusal(tmp_path)

    def test_pickled_objects(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", image=np.array([{"a": 1}], dtype=object))
        assert "pickled Python objects" in refusal(tmp_path / "d.npz")
        (tmp_path / "d.npy").write_bytes(_npy(np.array([{"a": 1}], dtype=object)))
        assert "pickled Python objects" in refusal(tmp_path / "d.npy")

    @pytest.mark.parametrize("data", [b"", b"\x80\x04]", b"no array", b"\x93NUMPY\x01\x00v\x00{'des"])
    def test_no_array(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "d.npy").write_bytes(data)
        assert "no NumPy array here" in refusal(tmp_path / "d.npy")
        (tmp_path / "d.npz").write_bytes(data)
        assert "not a whole .npz archive" in refusal(tmp_path / "d.npz")

    def test_no_array_inside_an_archive(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("image.npy", b"nothing")
        assert "no NumPy array here" in (text := refusal(tmp_path / "d.npz"))
        assert "'image.npy' of" in text

    def test_a_bomb_is_refused_by_what_its_directory_declares(self, tmp_path: Path) -> None:
        arrays = {f"a{index}": images(1) for index in range(17)}
        path = declaring(npz(tmp_path, **arrays), 2**32 - 2)
        assert "declares 68 GiB unpacked, and at most 64 are read" in refusal(path)

    def test_a_member_that_is_longer_than_it_declares(self, tmp_path: Path) -> None:
        assert "not a whole .npz archive" in refusal(declaring(npz(tmp_path, image=images(4)), 1024))

    def test_many_members(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archives, "MOST_MEMBERS", 1)
        assert "has 2 members, and at most 1 are read" in refusal(npz(tmp_path, image=images(4), other=images(4)))

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_one_name_twice(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            for seed in (4, 5):
                archive.writestr("image.npy", _npy(images(seed)))
        assert "two members 'image.npy'" in refusal(tmp_path / "d.npz")

    @pytest.mark.parametrize("order", ["False", "True"])
    def test_a_header_that_asks_for_more_memory_than_there_is(self, tmp_path: Path, order: str) -> None:
        header = f"{{'descr': '<f4', 'fortran_order': {order}, 'shape': (4, 1099511627776), }}".ljust(117) + "\n"
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("image.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
        assert "would have to be read at once" in refusal(tmp_path / "d.npz")

    def test_truncated(self, tmp_path: Path) -> None:
        whole = _npy(images(4))
        (tmp_path / "d.npy").write_bytes(whole[:-100])
        assert "truncated" in refusal(tmp_path / "d.npy")
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("image.npy", whole[:-100])
        assert "damaged or truncated" in refusal(tmp_path / "d.npz")
        path = npz(tmp_path, image=images(4))
        path.write_bytes(path.read_bytes()[:-40])
        assert "not a whole .npz archive" in refusal(path)

    def test_damaged(self, tmp_path: Path) -> None:
        path = npz(tmp_path, image=images(4))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        assert "Bad CRC-32" in refusal(path)

    def test_missing_input(self, tmp_path: Path) -> None:
        text = refusal(npz(tmp_path, img=images(4)))
        assert "has no array 'image'" in text
        assert "holds 'img'; the model's inputs are 'image'" in text

    def test_extra_array(self, tmp_path: Path) -> None:
        assert "an array 'weights' that is no input" in refusal(npz(tmp_path, image=images(4), weights=images(4)))

    def test_npy_for_several_inputs(self, tmp_path: Path) -> None:
        np.save(tmp_path / "d.npy", images(4))
        assert "has 2 inputs" in refusal(tmp_path / "d.npy", IMAGE, value("mask", ["n", 4]))

    @pytest.mark.parametrize(
        ("make", "expected"),
        [
            (lambda x: x[0], "has shape [3, 8, 8], and the input has 4 dimensions [batch, 3, 8, 8]"),
            (lambda x: x.transpose(0, 2, 3, 1), "dimension 1 of 'image' is 8, and the input takes 3"),
            (lambda x: x.astype(np.float64), ".astype(np.float32)"),
            (lambda x: x.astype(np.float16), "is float16, and the input takes float32"),
            (lambda x: x.astype(np.uint8), "is uint8, and the input takes float32"),
            (lambda x: x[:0], "has no samples"),
            (lambda x: x.sum(dtype=np.float32), "is a single number"),
        ],
    )
    def test_wrong_array(self, tmp_path: Path, make: Callable[[np.ndarray], np.ndarray], expected: str) -> None:
        text = refusal(npz(tmp_path, image=make(images(4))))
        assert expected in text
        assert "'image' in" in text or "has no samples" in text

    def test_big_endian(self, tmp_path: Path) -> None:
        assert "is >f4" in refusal(npz(tmp_path, image=images(4).astype(">f4")))

    def test_outside_the_profile(self, tmp_path: Path) -> None:
        free = value("image", ["n", 3, "h", "w"])
        text = refusal(npz(tmp_path, image=images(4)), free, shapes=("image=1x3x16x16:1x3x16x16:1x3x32x32",))
        assert "dimension 2 of 'image' is 8, outside the profile's 16 to 32" in text

    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, tmp_path: Path, number: float) -> None:
        x = images(4)
        x[2, 1, 3, 5] = number
        assert f"the array 'image' holds {number} at index [2, 1, 3, 5]" in refusal(npz(tmp_path, image=x))

    def test_different_counts(self, tmp_path: Path) -> None:
        mask = value("mask", ["batch", 5])
        text = refusal(npz(tmp_path, image=images(4), mask=np.ones((3, 5), np.float32)), IMAGE, mask)
        assert "'image' has 4, 'mask' has 3" in text

    def test_less_than_a_batch(self, tmp_path: Path) -> None:
        assert "has 3 samples, and one batch of the model takes 4" in refusal(npz(tmp_path, image=images(3)), FIXED)

    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            (np.zeros(3, int), "3 labels for 4 samples"),
            (np.zeros(4), "are float64, not integers"),
            (np.zeros((4, 10), int), "labels.argmax(1)"),
            (np.array([0, 1, -1, 2]), "label 2 is negative"),
        ],
    )
    def test_labels(self, tmp_path: Path, labels: np.ndarray, expected: str) -> None:
        assert expected in refusal(npz(tmp_path, image=images(4), labels=labels))

    def test_files_that_differ(self, tmp_path: Path) -> None:
        npz(tmp_path / "a", "0.npz", image=images(4))
        npz(tmp_path / "a", "1.npz", image=images(4)[:, :, :4])
        assert "the arrays 'image' differ" in refusal(tmp_path / "a")
        npz(tmp_path / "b", "0.npz", image=images(4))
        npz(tmp_path / "b", "1.npz", picture=images(4))
        assert "hold different arrays" in refusal(tmp_path / "b")

    def test_inputs_without_a_batch(self) -> None:
        assert "single number, without a batch" in refusal("synthetic:4", value("t", []))
        assert "agree on no batch" in refusal("synthetic:4", FIXED, value("mask", [2, 5]))

    def test_unknown_shape(self) -> None:
        free = value("image", ["n", 3, "h", "w"])
        with pytest.raises(UsageError, match=r"shape of 'image' is not known\. Where: .* Fix: give --shape"):
            open_data("synthetic:2", [free], list[Profile](), seed=0)
