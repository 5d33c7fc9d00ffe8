"""What a build directory remembers: the request that made it, with its inputs where they can be found."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from deploycc.core.errors import UsageError
from deploycc.output import is_build
from deploycc.request import BuildRequest

# Written in another form, or decided by the plan.
_APART = frozenset({"precision", "regions", "targets", "shapes", "dcn"})


def request_of(directory: Path) -> BuildRequest:
    """Return the request that made ``directory``; inputs are looked for as they were given, then beside the build directory.

    Raises:
        UsageError: when it is not a build, or its model is missing.
    """
    if not is_build(directory):
        raise UsageError(f"{directory} is not a build directory", at="DIR", fix="name a directory that deploycc build wrote")
    manifest = read_json(directory, "manifest.json")
    options, paths = manifest["options"], manifest.get("paths")
    if not paths:
        raise UsageError(
            "the manifest does not say where the inputs lay", at=str(directory), fix="build again with this version of deploycc"
        )
    model = _found(paths["model"], directory)
    if not model.exists():
        raise UsageError(
            f"the input {paths['model']} is missing", at=str(directory), fix="put it back, or run this where the build was run"
        )
    decided = {"plan": _found(paths["plan"], directory)} if paths.get("plan") else {"precision": options["precision"]}
    return BuildRequest(
        model=model,
        data=_data(paths["data"], directory),
        eval=_data(paths["eval"], directory),
        targets=tuple(options["targets"]),
        shapes=tuple(options["profiles"]),
        regions=tuple((pattern, name) for pattern, name in options["regions"]),
        dcn=_library(options.get("dcn", "body"), directory),
        **decided,
        **{f.name: options[f.name] for f in fields(BuildRequest) if f.name in options and f.name not in _APART},
    )


def read_json(directory: Path, name: str) -> Any:
    """Return the contents of a JSON file of a build.

    Raises:
        UsageError: when it is missing or damaged.
    """
    try:
        return json.loads((directory / name).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read ({error})", at=str(directory), fix="build again; the directory is damaged") from error


def _found(path: str, directory: Path) -> Path:
    beside = directory.resolve().parent / path
    return beside if not Path(path).exists() and beside.exists() else Path(path)


def _library(dcn: str, directory: Path) -> str:
    return dcn if dcn in ("body", "aot") else str(_found(dcn, directory))


def _data(spec: str | None, directory: Path) -> str | None:
    return spec if spec is None or spec.startswith("synthetic:") else str(_found(spec, directory))
