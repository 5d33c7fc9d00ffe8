"""Entry points: found by group, ordered by what they wait for, and clear when they are broken."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from deploycc import registry
from deploycc.core.errors import ContractError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODULE = """
class First:
    phase, after = "lower", ()
class Second:
    phase, after = "lower", ("zz-first", "not-installed")
class Third:
    phase, after = "lower", ("third",)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that installs a distribution with entry points."""
    (tmp_path / "third_party_passes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def install_here(name: str = "third-party", group: str = registry.PASSES, **points: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "\n".join(f"{point.replace('_', '-')} = {value}" for point, value in points.items())
        (folder / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")

    yield install_here
    sys.modules.pop("third_party_passes", None)


def test_our_own_passes_are_in_order() -> None:
    for phase in registry.PHASES:
        found = registry.passes(phase)
        names = [name for name, _ in found]
        for name, cls in found:
            assert cls.phase == phase
            assert all(names.index(before) < names.index(name) for before in cls.after if before in names)
    assert [name for name, _ in registry.passes("quantize")][-1] == "insert-casts"


def test_a_new_pass_is_found_and_waits(install: Callable[..., None]) -> None:
    install(zz_first="third_party_passes:First", aa_second="third_party_passes:Second")
    names = [name for name, _ in registry.passes("lower")]
    assert names.index("zz-first") < names.index("aa-second")


def test_passes_that_wait_for_each_other(install: Callable[..., None]) -> None:
    install(third="third_party_passes:Third")
    with pytest.raises(ContractError, match=r"passes wait for each other: third -> third\. Where: deploycc\.passes\."):
        registry.passes("lower")


def test_one_name_twice(install: Callable[..., None]) -> None:
    install(fold_constants="third_party_passes:First")
    with pytest.raises(ContractError, match=r"two entry points are named 'fold-constants': .*third_party_passes:First"):
        registry.passes("lower")


def test_what_cannot_be_imported(install: Callable[..., None]) -> None:
    install(lost="third_party_passes:Nothing")
    with pytest.raises(
        ContractError,
        match=r"the entry point 'lost' cannot be loaded: AttributeError: .*Where: deploycc\.passes = third_party_passes:Nothing",
    ):
        registry.passes("lower")


def test_backends() -> None:
    assert set(registry.entries(registry.BACKENDS)) == {"onnxruntime", "tensorrt", "tensorrt-rtx"}
    assert registry.backend("onnxruntime").name == "onnxruntime"
    with pytest.raises(
        UsageError, match=r"no backend 'openvino' is installed\. Where: --target\. Fix: installed: onnxruntime, tensorrt, tensorrt-rtx\."
    ):
        registry.backend("openvino")
