"""The build directory appears as a whole or not at all, and replaces nothing but its own kind."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from deploycc.core.errors import UsageError
from deploycc.output import MANIFEST_SCHEMA, BuildDirectory, digest_file, is_build, write_manifest


def fill(folder: Path, text: str) -> None:
    (folder / "engines").mkdir()
    (folder / "engines" / "a.engine").write_text(text)
    (folder / "model.onnx").write_text(text)
    write_manifest(folder, inputs={"model": "1"}, options={"seed": 0})


def built(path: Path, text: str = "old") -> Path:
    with BuildDirectory(path).staged() as folder:
        fill(folder, text)
    return path


def interrupt(path: Path, error: type[BaseException]) -> None:
    with BuildDirectory(path).staged() as folder:
        fill(folder, "half")
        raise error


def test_it_appears_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with BuildDirectory(out).staged() as folder:
        assert folder.parent == out.parent
        assert not out.exists()
        fill(folder, "new")
    assert is_build(out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_it_replaces_an_older_build(tmp_path: Path) -> None:
    out = built(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    built(out, "new")
    assert (out / "model.onnx").read_text() == "new"
    assert not (out / "notes.txt").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    out = built(tmp_path / "out")
    for path in (out, tmp_path / "none"):
        with pytest.raises(error):
            interrupt(path, error)
    assert (out / "model.onnx").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failure_between_the_two_renames_brings_the_old_build_back(tmp_path: Path) -> None:
    out = built(tmp_path / "out")
    with pytest.raises(FileNotFoundError), BuildDirectory(out).staged() as folder:
        folder.rmdir()  # so that the new build cannot be renamed
    assert (out / "model.onnx").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_keeps_pointing_at_the_build(tmp_path: Path) -> None:
    real = built(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    built(link, "new")
    assert link.is_symlink()
    assert (real / "model.onnx").read_text() == "new"


class TestRefusals:
    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(UsageError, match=r"out is a file\. Where: --out\."):
            BuildDirectory(tmp_path / "out").check()

    @pytest.mark.parametrize("manifest", [None, "{}", "[]", "not JSON", '{"schema": "another/1"}'])
    def test_a_directory_that_is_no_build(self, tmp_path: Path, manifest: str | None) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        if manifest is not None:
            (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(UsageError, match=r"is not empty and not a build directory\. Where: --out\. Fix: .* replaces only its own"):
            BuildDirectory(tmp_path).check()
        assert (tmp_path / "thesis.tex").exists()

    def test_an_empty_directory_will_do(self, tmp_path: Path) -> None:
        BuildDirectory(tmp_path).check()

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(UsageError, match="file is not writable"):
            BuildDirectory(tmp_path / "file" / "out").check()

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
    def test_a_place_without_permission(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(UsageError, match="is not writable"):
            BuildDirectory(tmp_path / "out").check()


class TestManifest:
    def test_hashes_what_is_there(self, tmp_path: Path) -> None:
        fill(tmp_path, "text")
        body = json.loads((tmp_path / "manifest.json").read_text())
        digest = hashlib.sha256(b"text").hexdigest()
        assert body["schema"] == MANIFEST_SCHEMA
        assert body["outputs"] == {"model.onnx": digest}
        assert (body["inputs"], body["options"]) == ({"model": "1"}, {"seed": 0})
        assert {"python", "deploycc", "onnx", "torch"} <= set(body["versions"])
        assert digest_file(tmp_path / "model.onnx") == digest
        assert (tmp_path / "engines" / "SHA256SUMS").read_text() == f"{digest}  a.engine\n"

    def test_same_inputs_same_bytes(self, tmp_path: Path) -> None:
        texts = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            fill(tmp_path / name, "text")
            texts.append((tmp_path / name / "manifest.json").read_bytes())
        assert texts[0] == texts[1]


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built(tmp_path / "out"))
    for path in (Path(), Path(".."), tmp_path / "out"):
        with pytest.raises(UsageError, match=r"is or holds the working directory\. Where: --out\. Fix: name a directory in it"):
            BuildDirectory(path).check()


@pytest.mark.parametrize("place", ["/proc/deploycc/out", "n" * 300])
def test_a_place_that_the_system_refuses(place: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Where: --out\. Fix: choose a directory you may write to"):
        interrupt(tmp_path / place, ValueError)
