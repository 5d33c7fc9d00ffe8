"""Which operators each target lacks, as probed with a real builder: ``deploycc targets --probe`` writes ``probed.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from deploycc.core.target import Target

SCHEMA = "deploycc.probed/1"


@cache
def recorded() -> Mapping[str, Any]:
    """Return what was probed: per backend the ``version`` that was asked, and per architecture and probe empty, or the reason it fails."""
    return dict(json.loads(files("deploycc.backends").joinpath("probed.json").read_text()))


def lacking(operators: Iterable[str], target: Target) -> dict[str, str]:
    """Return those ``operators`` that some architecture of ``target`` was found to lack, each with the builder's reason."""
    archs = recorded()["backends"].get(target.backend, {}).get("archs", {})
    found = {}
    for operator in sorted(set(operators)):
        reasons = [archs[arch][operator] for arch in target.archs if archs.get(arch, {}).get(operator)]
        if reasons:
            found[operator] = reasons[0]
    return found
