"""Which operators and formats each target lacks, as probed with a real builder: ``deploycc targets --probe`` writes ``probed.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from deploycc.core.formats import Format
from deploycc.core.target import Target

SCHEMA = "deploycc.probed/2"
# How the answer begins to a probe of a format that builds, and then computes in another.
COMPUTES = "computes in"


@cache
def recorded() -> Mapping[str, Any]:
    """Return what was probed: per backend the ``version`` that was asked, and per architecture and probe empty, or the reason it fails.

    Under ``archs`` the probes are operators, under ``formats`` they are formats with the operators that may compute in them.
    """
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


def reason_against(format: Format, backend: str, arch: str) -> str:
    """Return why ``arch`` does not compute in ``format`` as probed with ``backend``; empty when it does.

    A quantized format is there when every operator that may have it computes in it, one of floating point when any operator does.
    """
    found = recorded()["backends"][backend]["formats"][arch][format.name].values()
    reasons = [reason for reason in found if reason]
    is_there = not reasons if format.is_quantized else len(reasons) < len(found)
    return "" if is_there else str(reasons[0])
