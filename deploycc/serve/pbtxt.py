"""Write protobuf messages as text: mappings are messages, lists are repeated fields, `Word` is an enumeration's value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


class Word(str):
    """A value that is written without quotes."""

    __slots__ = ()


def write(message: Mapping[str, Any]) -> str:
    """Return ``message`` in protobuf's text format."""
    return "\n".join(_lines(message, "")) + "\n"


def _lines(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(each, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_scalar(each)}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    # Strings of JSON are strings of the text format: the escapes of the one are among those of the other.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
