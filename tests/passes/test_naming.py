"""File, class and entry point of a pass carry one name: a verb and its object."""

from dataclasses import fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points

import pytest

from deploycc.core.passes import Pass

VERBS = {
    "split",
    "canonicalize",
    "eliminate",
    "fold",
    "fuse",
    "insert",
    "legalize",
    "lower",
    "merge",
    "reparameterize",
    "replace",
    "decompose",
    "import",
    "raise",
    "rescale",
    "round",
    "simulate",
}
PARTS = ["Why:", "Before / After:", "Declines when:", "Options:", "See:"]
OWN = [e for e in entry_points(group="deploycc.passes") if e.value.startswith("passes.")]

each_entry = pytest.mark.parametrize("entry", OWN, ids=lambda e: e.name)


@each_entry
def test_file_class_and_entry_point_agree(entry: EntryPoint) -> None:
    words = entry.name.split("-")
    assert words[0] in VERBS
    assert entry.value == f"passes.{'_'.join(words)}:{''.join(w.capitalize() for w in words)}"
    assert entry.load().__name__ == "".join(w.capitalize() for w in words)


@each_entry
def test_a_pass_is_a_frozen_dataclass_with_the_protocol(entry: EntryPoint) -> None:
    cls = entry.load()
    assert is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert "__slots__" in vars(cls)
    assert {"phase", "after"}.isdisjoint(f.name for f in fields(cls))
    assert callable(cls.__call__)
    assert set(cls.after) <= {e.name for e in entry_points(group="deploycc.passes")}


@pytest.mark.parametrize("entry", [e for e in OWN if e.load().phase == "canonicalize"], ids=lambda e: e.name)
def test_the_docstring_has_its_five_parts(entry: EntryPoint) -> None:
    cls = entry.load()
    assert isinstance(cls(), Pass)
    text = cls.__doc__
    assert [text.index(p) for p in PARTS] == sorted(text.index(p) for p in PARTS)
