"""Which operators and formats each target lacks, as probed with a real builder: ``deploycc targets --probe`` writes ``probed.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from deploycc.core.errors import UsageError
from deploycc.core.formats import Format
from deploycc.core.target import Target

SCHEMA = "deploycc.probed/2"
# How the answer begins to a probe of a format that builds, and then computes in another.
COMPUTES = "computes in"


def cache_file() -> Path:
    """Return where ``deploycc targets --probe`` keeps what it found on this machine; ``DEPLOYCC_CACHE`` names another folder."""
    folder = os.environ.get("DEPLOYCC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "deploycc")
    return Path(folder, "probed.json")


def found_here() -> dict[str, Any]:
    """Return what was probed on this machine, by backend; nothing where nobody probed, or for another schema.

    Raises:
        UsageError: when the file is damaged.
    """
    path = cache_file()
    if not path.is_file():
        return {}
    try:
        own = json.loads(path.read_text())
        if own["schema"] != SCHEMA:
            return {}
        return {name: {k: facts[k] for k in ("version", "archs", "formats")} for name, facts in own["backends"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "delete it, or run deploycc targets --probe"
        raise UsageError(f"what was probed on this machine cannot be read ({error})", at=f"'{path}'", fix=fix) from error


@cache
def recorded() -> Mapping[str, Any]:
    """Return what was probed: per backend the ``version`` that was asked, and per architecture and probe empty, or the reason it fails.

    Under ``archs`` the probes are operators, under ``formats`` they are formats with the operators that may compute in them. What was
    found on this machine takes the place of what comes with deploycc.

    Raises:
        UsageError: when the file of this machine is damaged.
    """
    body = dict(json.loads(files("deploycc.backends").joinpath("probed.json").read_text()))
    return {**body, "backends": {**body["backends"], **found_here()}}


def lacking(operators: Iterable[str], target: Target) -> dict[str, str]:
    """Return those ``operators`` that some architecture of ``target`` was found to lack, each with the builder's reason."""
    archs = recorded()["backends"].get(target.backend, {}).get("archs", {})
    found = {}
    for operator in sorted(set(operators)):
        reasons = [archs[arch][operator] for arch in target.archs if archs.get(arch, {}).get(operator)]
        if reasons:
            found[operator] = reasons[0]
    return found


def reason_against(format: Format, backend: str, arch: str) -> str | None:
    """Return why ``arch`` does not compute in ``format`` as probed with ``backend``; empty when it does, None where nobody has asked.

    A quantized format is there when every operator that may have it computes in it, one of floating point when any operator does.
    """
    asked = recorded()["backends"].get(backend, {}).get("formats", {}).get(arch, {}).get(format.name)
    if asked is None:
        return None
    reasons = [reason for reason in asked.values() if reason]
    is_there = not reasons if format.is_quantized else len(reasons) < len(asked)
    return "" if is_there else str(reasons[0])
