"""The page of all passes is what the docstrings say, and nothing is lost on the way."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from deploycc import catalogue, registry

PAGE = Path(__file__).parent.parent / "docs" / "passes.md"
PASSES = {point.name: point.load() for point in entry_points(group="deploycc.passes")}


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == catalogue.markdown(), "run: deploycc passes --markdown > docs/passes.md"


@pytest.mark.parametrize("name", PASSES)
def test_every_word_of_a_docstring_is_on_the_page(name: str) -> None:
    section = PAGE.read_text().split(f"### {name}\n")[1].partition("\n### ")[0].partition("\n## ")[0]
    summary, parts = catalogue.split_docstring(inspect.getdoc(PASSES[name]) or "")
    assert set(parts) == set(catalogue.PARTS)
    shown = section.replace("`", "").replace("\n- ", " ").split()
    for text in (summary, *(body for body in parts.values() if body != "none.")):
        words = text.replace("`", "").split()
        assert any(shown[i : i + len(words)] == words for i in range(len(shown))), text


@pytest.mark.parametrize("name", PASSES)
def test_every_option_is_documented(name: str) -> None:
    _, parts = catalogue.split_docstring(inspect.getdoc(PASSES[name]) or "")
    documented = [line.partition(":")[0] for line in parts["Options"].splitlines() if not line.startswith(" ") and line != "none."]
    assert documented == [f.name for f in registry.options(PASSES[name])]
