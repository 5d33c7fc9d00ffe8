"""Every rule is seen by the lint or said to be invisible; what shows that deploycc keeps it exists; the page is current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploycc.core.rules import RULES
from deploycc.lint import catalogue
from deploycc.lint.linting import checks

ROOT = Path(__file__).parent.parent.parent
TESTS = "\n".join(p.read_text() for p in (ROOT / "tests" / "lint").glob("test_*.py"))


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "lint.md").read_text()
    assert page == catalogue.markdown(), "run: deploycc lint --rules --markdown > docs/lint.md"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_seen_or_said_to_be_invisible(name: str) -> None:
    assert (name in checks()) != (name in catalogue.UNSEEN)


@pytest.mark.parametrize("name", sorted(catalogue.INSERTION))
def test_what_shows_a_rule_exists(name: str) -> None:
    file, _, test = catalogue.INSERTION[name].partition("::")
    assert re.search(rf"def {test}\(", (ROOT / file).read_text())


@pytest.mark.parametrize("name", list(checks()))
def test_a_check_is_tested(name: str) -> None:
    assert f'"{name}"' in TESTS


def test_no_rule_of_the_reference_is_missing() -> None:
    families = {"R": 14, "P": 18, "S": 9, "F": 9, "X": 5}
    assert {f"{letter}{i}" for letter, count in families.items() for i in range(1, count + 1)} <= set(RULES)


def test_the_list_has_a_line_per_rule() -> None:
    assert [line.split()[0] for line in catalogue.listing().splitlines()] == list(RULES)
