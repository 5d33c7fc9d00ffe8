"""The reproducer of a crashed pass: the graph it was given, its options and the error, in a folder beside the build directory."""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploycc import registry
from deploycc.core.contract import SOUND
from deploycc.core.errors import DeployccError, UsageError
from deploycc.core.passes import PassCrashed, run
from deploycc.core.plan import PrecisionPlan
from deploycc.interop import save_model
from deploycc.output import REPRODUCER_SCHEMA, BuildDirectory, versions

if TYPE_CHECKING:
    from deploycc.core.passes import Pass

FILE = "reproducer.json"


@dataclass(frozen=True, slots=True)
class Repeated:
    """What came of running a crashed pass again: ``error`` is empty when it no longer fails."""

    entry: str
    before: str
    error: str
    rewrites: int = 0
    declines: int = 0
    versions: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.error:
            text = f"{self.entry} no longer fails ({self.before}): {self.rewrites} rewrites, {self.declines} declines"
        elif self.error == self.before:
            text = f"{self.entry} still fails with {self.error}"
        else:
            text = f"{self.entry} still fails, but otherwise: {self.error} (recorded: {self.before})"
        return "\n".join([text, *self.versions])


def keep(error: PassCrashed, out: Path) -> None:
    """Write ``<out>.reproducer`` and name it in the error; where it cannot be written, the error says why."""
    path = out.with_name(f"{out.name}.reproducer")
    try:
        write(error, path)
    except (DeployccError, OSError) as reason:
        error.fix += f" (no reproducer was written: {reason})"
    else:
        error.fix = (
            f"report it with the folder {path}, from which `deploycc replay {path}` repeats it; the build directory was left as it was"
        )


def write(error: PassCrashed, path: Path) -> None:
    """Write a reproducer as a whole or not at all; an older one is replaced.

    Raises:
        UsageError: when the place holds something else or cannot be written.
    """
    cause = error.__cause__
    with BuildDirectory(path, FILE, REPRODUCER_SCHEMA).staged() as folder:
        save_model(error.model, folder / "model.onnx")
        plan = getattr(error.each, "plan", None)
        if isinstance(plan, PrecisionPlan):
            (folder / "plan.json").write_text(plan.to_json())
        body = {
            "schema": REPRODUCER_SCHEMA,
            "pass": _entry_of(error.each),
            "options": {f.name: getattr(error.each, f.name) for f in registry.options(type(error.each)) if f.name != "plan"},
            "plan": "plan.json" if isinstance(plan, PrecisionPlan) else None,
            "error": _described(cause) if cause is not None else error.what,
            "traceback": [
                f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in traceback.extract_tb(cause.__traceback__ if cause else None)
            ],
            "versions": versions(),
        }
        (folder / FILE).write_text(json.dumps(body, indent=1, default=str) + "\n")


def repeat(path: Path) -> Repeated:
    """Run the recorded pass on the recorded graph.

    Raises:
        UsageError: when the folder is incomplete or the pass is not installed.
    """
    try:
        body = json.loads((path / FILE).read_text())
        each = _restored(body, path)
        model = ir.load(path / "model.onnx")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the reproducer cannot be read: {_described(error)}", at=str(path), fix="use the folder as deploycc wrote it"
        ) from error
    now = versions()
    drift = tuple(f"version of {n}: recorded {v}, now {now.get(n, 'none')}" for n, v in body["versions"].items() if now.get(n) != v)
    try:
        _, (record,) = run(model, [each], contract=SOUND)
    except PassCrashed as error:
        cause = error.__cause__
        return Repeated(body["pass"], body["error"], _described(cause) if cause is not None else error.what, versions=drift)
    except DeployccError as error:
        return Repeated(body["pass"], body["error"], _described(error), versions=drift)
    error_text = f"rolled back: {record.rolled_back}" if record.rolled_back else ""
    return Repeated(body["pass"], body["error"], error_text, len(record.rewrites), len(record.declines), drift)


def _restored(body: dict[str, Any], path: Path) -> Pass:
    found = registry.entries(registry.PASSES)
    if body["pass"] not in found:
        raise UsageError(f"the pass '{body['pass']}' is not installed", at=str(path), fix="install the package that provides it")
    plan = {"plan": PrecisionPlan.from_json((path / body["plan"]).read_text())} if body["plan"] else {}
    each: Pass = registry.load(found[body["pass"]])(**body["options"], **plan)
    return each


def _entry_of(each: Pass) -> str:
    """Return the name of the entry point that gives this pass, or of its class when there is none."""
    wanted = f"{type(each).__module__}:{type(each).__qualname__}"
    return next((name for name, point in registry.entries(registry.PASSES).items() if point.value == wanted), wanted)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
