"""The registered passes as text: one line each, in full, or as the page ``docs/passes.md``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from deploycc import registry

PARTS = ("Why", "Before / After", "Declines when", "Options", "See")
ITEM = re.compile(r"``|[A-Z0-9_, ]{2,}: |[a-z_]+: ")
INTRODUCTION = """# Passes

Every registered pass, in the order in which it runs. This page is made from the docstrings by `deploycc passes --markdown`.
A pass is a transaction: its rewrites are kept when the graph is sound afterwards, and with `--verify-each` when the outputs agree
on calibration samples and random inputs. `deploycc explain DIR --passes` says what each did in one build."""


def listing(*, long: bool) -> str:
    """Return one line per pass: phase, name, and the summary or the whole docstring."""
    rows = [(phase, name, inspect.getdoc(cls) or "") for phase in registry.PHASES for name, cls in registry.passes(phase)]
    return "\n".join(f"{phase:13} {name:22} {text if long else text.partition(chr(10))[0]}" for phase, name, text in rows)


def markdown() -> str:
    """Return the page: one section per phase and pass."""
    blocks = [INTRODUCTION]
    for phase in registry.PHASES:
        found = registry.passes(phase)
        blocks += [f"## Phase {phase}"] * bool(found)
        blocks += [block for name, cls in found for block in _section(name, cls)]
    return "\n\n".join(blocks) + "\n"


def _section(name: str, cls: Any) -> list[str]:
    summary, parts = split_docstring(inspect.getdoc(cls) or "")
    blocks = [f"### {name}", summary]
    for title in PARTS:
        if parts.get(title) and not (title == "Options" and parts[title] == "none."):
            blocks.append(f"**{title}:**{_body(parts[title])}")
    options = [_option(f) for f in registry.options(cls)]
    blocks.append(f"Written as `{cls.__name__}({', '.join(options)})`" + (f", after {', '.join(cls.after)}." if cls.after else "."))
    return blocks


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the summary and the parts by title; items of a part that is a list stay lines of their own."""
    pieces = re.split(rf"^({'|'.join(PARTS)}):[ ]*", text, flags=re.MULTILINE)
    parts = {title: inspect.cleandoc(body) for title, body in zip(pieces[1::2], pieces[2::2], strict=True)}
    return _joined(pieces[0]), parts


def _body(text: str) -> str:
    """Return a part as Markdown: a list where its lines begin with code or ``NAME:``, else a paragraph."""
    items: list[str] = []
    for line in text.splitlines():
        if items and not ITEM.match(line):
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    shown = [re.sub(r"^([A-Z0-9_, ]{2,}|[a-z_]+): ", r"`\1`: ", item).replace("``", "`") for item in items]
    return "\n\n" + "\n".join(f"- {item}" for item in shown) if ITEM.match(items[0]) else f" {shown[0]}"


def _option(field: dataclasses.Field[Any]) -> str:
    return field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"


def _joined(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")
