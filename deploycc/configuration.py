"""The configuration file ``deploycc.toml``: how images are read, how ranges are found, and what a user decides about regions."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

SECTIONS = ("preprocessing", "calibration", "regions")


def read_preprocessing(config: Path | None) -> dict[str, Any] | None:
    """Return the section [preprocessing], or None when there is no file or no section.

    Raises:
        UsageError: when the file cannot be read, or holds what nothing reads.
    """
    return _sections(config).get("preprocessing")


def read_calibration(config: Path | None) -> str | None:
    """Return ``method`` of the section [calibration], or None when there is no file or no section.

    Raises:
        UsageError: when the file cannot be read, or holds what nothing reads.
    """
    section = _sections(config).get("calibration")
    if section is None:
        return None
    if set(section) != {"method"} or not isinstance(section["method"], str):
        fix = 'write method = "mse" and nothing else under it'
        raise UsageError(f"{config} has a section [calibration] without a method alone", at="--config", fix=fix)
    return str(section["method"])


def read_regions(config: Path | None) -> dict[str, Any]:
    """Return the section [regions]: a format per pattern of region names, in the order of the file.

    Raises:
        UsageError: when the file cannot be read, or holds what nothing reads.
    """
    return _sections(config).get("regions", {})


def _sections(config: Path | None) -> dict[str, dict[str, Any]]:
    if config is None:
        return {}
    try:
        entries = tomllib.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{config} cannot be read: {error}", at="--config", fix="give a TOML file") from error
    unknown = sorted(set(entries) - set(SECTIONS))
    wrong = [f"'{name}'" for name in unknown] or [f"'{name}' as a value" for name, body in entries.items() if not isinstance(body, dict)]
    if wrong:
        raise UsageError(
            f"{config} has {', '.join(wrong)}, which nothing reads",
            at="--config",
            fix="its sections are [preprocessing], [calibration] and [regions]",
        )
    return entries
