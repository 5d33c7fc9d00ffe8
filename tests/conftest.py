"""What every test may use: ``small_graphs`` lies beside this file and is imported from all folders below."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# What somebody probed on this machine decides their builds, not the tests; a folder below a file cannot exist.
os.environ["DEPLOYCC_CACHE"] = os.devnull


@pytest.fixture
def provide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Return a function that puts a distribution with passes on the path: its module's text, and its entry points."""
    modules: list[str] = []

    def provide_here(text: str, **points: str) -> Path:
        name = f"provided_{len(modules)}"
        site = tmp_path / "site"
        (site / f"{name}-1.0.dist-info").mkdir(parents=True)
        (site / f"{name}.py").write_text(text)
        (site / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{point.replace('_', '-')} = {name}:{cls}\n" for point, cls in points.items())
        (site / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(f"[deploycc.passes]\n{lines}")
        monkeypatch.syspath_prepend(str(site))
        modules.append(name)
        return site

    yield provide_here
    for name in modules:
        sys.modules.pop(name, None)
