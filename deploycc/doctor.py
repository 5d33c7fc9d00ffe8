"""What this machine can do."""

from __future__ import annotations

from deploycc import registry
from deploycc.core.errors import DeployccError
from deploycc.core.formats import FORMATS
from deploycc.core.target import ARCHS, Target


def examine() -> str:
    """Return facts about every installed backend, and the formats of every target."""
    lines = []
    for name in registry.entries(registry.BACKENDS):
        try:
            backend = registry.backend(name)
            facts = backend.doctor()
        except DeployccError as error:
            lines.append(f"{name}: broken: {error}")
            continue
        lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
        for arch in ARCHS.get(name, ()) or ("",):
            target = Target(name, (arch,) if arch else ())
            native = backend.formats(target)
            lines.append(f"  {target!s:22} " + " ".join(f.name if f in native else "·" * len(f.name) for f in FORMATS.values()))
    lines.append("passes: " + ", ".join(f"{len(registry.passes(p))} {p}" for p in registry.PHASES))
    return "\n".join(lines)
