"""Ask builders what they take: one small model per operator, format and architecture, built for real.

Formats are asked for as a build asks for them, by the passes that insert precision, and the audit says what the engine computes in.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from deploycc import registry
from deploycc.backends.probed import COMPUTES, SCHEMA, cache_file, found_here, recorded
from deploycc.core.backend import BuildOptions
from deploycc.core.contract import LOWERED
from deploycc.core.errors import BackendError, UsageError
from deploycc.core.formats import FORMATS, FP16, Format
from deploycc.core.passes import run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.core.target import ARCHS, Target
from deploycc.interop import load_model, save_model
from deploycc.quant.regions import partition
from deploycc.verify.audit import audit

TIMEOUT = 120.0
_F = "float16"


@dataclass(frozen=True, slots=True)
class Probe:
    """A graph in ONNX text that uses one operator, and the shapes of its constants."""

    text: str
    constants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    opset: int = 20
    integers: Mapping[str, Sequence[int]] = field(default_factory=dict)


def _same(operator: str, shape: str = "2,8,6,6", **constants: tuple[int, ...]) -> Probe:
    inputs = ", ".join(["x", *constants])
    return Probe(f"({_F}[{shape}] x) => ({_F}[{shape}] y) {{ y = {operator}({inputs}) }}", constants)


# An operator is named as ONNX names it; where a variant differs, it follows after a space.
PROBES: dict[str, Probe] = {
    "Conv": Probe(f"({_F}[2,8,6,6] x) => ({_F}[2,16,6,6] y) {{ y = Conv<pads=[1,1,1,1]>(x, w) }}", {"w": (16, 8, 3, 3)}),
    "Conv 3-D in FP32": Probe(
        "(float[2,8,4,6,6] x) => (float[2,8,4,6,6] y) { y = Conv<pads=[1,1,1,1,1,1]>(x, w) }", {"w": (8, 8, 3, 3, 3)}
    ),
    "ConvTranspose": Probe(f"({_F}[2,8,6,6] x) => ({_F}[2,8,12,12] y) {{ y = ConvTranspose<strides=[2,2]>(x, w) }}", {"w": (8, 8, 2, 2)}),
    "MatMul": Probe(f"({_F}[2,8] x) => ({_F}[2,8] y) {{ y = MatMul(x, w) }}", {"w": (8, 8)}),
    "MatMul in FP32": Probe("(float[64,256] x) => (float[64,128] y) { y = MatMul(x, w) }", {"w": (256, 128)}),
    "Conv in FP32": Probe("(float[2,32,14,14] x) => (float[2,64,14,14] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", {"w": (64, 32, 3, 3)}),
    "LayerNormalization": Probe(f"({_F}[2,6,8] x) => ({_F}[2,6,8] y) {{ y = LayerNormalization(x, w, b) }}", {"w": (8,), "b": (8,)}),
    "InstanceNormalization": _same("InstanceNormalization", w=(8,), b=(8,)),
    "Gelu": _same("Gelu"),
    "Softmax": _same("Softmax"),
    "HardSwish": _same("HardSwish"),
    "Attention": Probe(
        f"({_F}[2,2,6,16] q, {_F}[2,2,6,16] k, {_F}[2,2,6,16] v) => ({_F}[2,2,6,16] y) {{ y = Attention(q, k, v) }}", opset=23
    ),
    "GridSample": Probe(f"({_F}[2,8,6,6] x, {_F}[2,4,4,2] g) => ({_F}[2,8,4,4] y) {{ y = GridSample(x, g) }}"),
    "DeformConv": Probe(
        f"({_F}[2,8,6,6] x, {_F}[2,18,4,4] o) => ({_F}[2,8,4,4] y) {{ y = DeformConv<kernel_shape=[3,3]>(x, w, o) }}", {"w": (8, 8, 3, 3)}
    ),
    "Resize": Probe(f'({_F}[2,8,6,6] x) => ({_F}[2,8,12,12] y) {{ y = Resize<mode="linear">(x, , , s) }}', integers={"s": (2, 8, 12, 12)}),
    "Resize antialias": Probe(
        f'({_F}[2,8,6,6] x) => ({_F}[2,8,3,3] y) {{ y = Resize<mode="linear", antialias=1>(x, , , s) }}', integers={"s": (2, 8, 3, 3)}
    ),
    "MaxPool": Probe(f"({_F}[2,8,6,6] x) => ({_F}[2,8,3,3] y) {{ y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) }}"),
    "TopK": Probe(f"({_F}[2,8] x) => ({_F}[2,3] y, int64[2,3] i) {{ y, i = TopK(x, k) }}", integers={"k": (3,)}),
    "ArgMax": Probe(f"({_F}[2,8] x) => (int64[2,1] y) {{ y = ArgMax<axis=1>(x) }}"),
    "GatherND": Probe(f"({_F}[2,8] x, int64[3,1] i) => ({_F}[3,8] y) {{ y = GatherND(x, i) }}"),
    "ScatterND": Probe(f"({_F}[4,8] x, int64[3,1] i, {_F}[3,8] u) => ({_F}[4,8] y) {{ y = ScatterND(x, i, u) }}"),
    "Einsum": Probe(f'({_F}[2,6,8] x, {_F}[2,5,8] z) => ({_F}[2,6,5] y) {{ y = Einsum<equation="bic,bjc->bij">(x, z) }}'),
    "CumSum": Probe(f"({_F}[2,8] x) => ({_F}[2,8] y) {{ y = CumSum(x, a) }}", integers={"a": (1,)}),
    "NonZero": Probe(f"({_F}[2,8] x) => (int64[2,n] y) {{ y = NonZero(x) }}"),
    "NonMaxSuppression": Probe(
        "(float[1,6,4] b, float[1,2,6] s) => (int64[n,3] y) { y = NonMaxSuppression(b, s, k) }", integers={"k": (3,)}
    ),
    "RoiAlign": Probe(
        f"({_F}[2,8,6,6] x, {_F}[3,4] r, int64[3] i) => ({_F}[3,8,2,2] y) {{ y = RoiAlign<output_height=2, output_width=2>(x, r, i) }}"
    ),
    "Unique": Probe(f"({_F}[8] x) => ({_F}[n] y) {{ y = Unique(x) }}"),
    "BitShift": Probe('(uint32[8] x, uint32[8] s) => (uint32[8] y) { y = BitShift<direction="LEFT">(x, s) }'),
}  # fmt: skip


def probe(target: Target, names: Sequence[str] = tuple(PROBES), watch: Callable[[str], None] = lambda name: None) -> dict[str, str]:
    """Return, per probe, nothing when ``target`` builds it, or why it does not."""
    backend, found = registry.backend(target.backend), {}
    with tempfile.TemporaryDirectory(prefix="deploycc-probe-") as folder:
        for name in names:
            watch(name)
            model = Path(folder, "probe.onnx")
            onnx.save(_model(PROBES[name]), model)
            try:
                backend.build(model, target, out=Path(folder, "engine"), profiles=(), options=BuildOptions(timeout=TIMEOUT))
                found[name] = ""
            except BackendError as error:
                found[name] = _said(error)
    return found


def probe_format(target: Target, format: Format) -> dict[str, str]:
    """Return, per operator, nothing when ``target`` computes it in ``format``, else what it computes in, or why it builds no engine.

    Of an engine that does not say what it computes in, it counts that it was built.
    """
    backend, found = registry.backend(target.backend), {}
    base = FP16 if format.is_quantized else format
    with tempfile.TemporaryDirectory(prefix="deploycc-probe-") as folder:
        for operator in ("MatMul",) if format.block else ("MatMul", "Conv"):
            model, out = Path(folder, "probe.onnx"), Path(folder, "engine")
            plan = _precise(model, PROBES[f"{operator} in FP32"], format, base)
            try:
                engine = backend.build(model, target, out=out, profiles=(), options=BuildOptions(timeout=TIMEOUT))
                (seen,) = audit(plan, engine)
                found[operator] = f"{COMPUTES} {seen.realised}" if seen.verdict == "mismatch" else ""
            except BackendError as error:
                found[operator] = _said(error)
    return found


def _precise(path: Path, probe: Probe, format: Format, base: Format) -> PrecisionPlan:
    """Write the model of ``probe`` with its only region in ``format``, and return the plan that says so."""
    onnx.save(_model(probe), path)
    model = load_model(path).model
    (region,) = partition(model)
    scale = {} if format.reach is None else {format.name: 4.0 / format.reach}
    plan = PrecisionPlan(base, (Assignment(region, format, "probe"),), dict.fromkeys(region.activations, scale))
    chosen = [cls(plan=plan) for _, cls in registry.passes("quantize") if {f.name for f in registry.options(cls)} == {"plan"}]
    save_model(run(model, chosen, contract=LOWERED)[0], path)
    return plan


def _said(error: BackendError) -> str:
    return " ".join(error.what.split())[:200]


def _model(probe: Probe) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {probe.opset}]> g {probe.text}')
    kind = np.float32 if "float[" in probe.text else np.float16
    draw = np.random.default_rng(0)
    arrays = {n: draw.standard_normal(s).astype(kind) for n, s in probe.constants.items()}
    arrays |= {n: np.array(v if len(v) > 1 or n != "a" else v[0], np.int64) for n, v in probe.integers.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    for node in model.graph.node:
        node.name = f"n_{node.output[0]}"
    return model


def probe_all(backends: Sequence[str], watch: Callable[[str], None]) -> Mapping[str, Any]:
    """Return the contents of ``probed.json``: every probe on every architecture of ``backends``."""

    def of_backend(name: str) -> dict[str, Any]:
        def of_arch(arch: str) -> dict[str, str]:
            return probe(Target(name, (arch,)), watch=lambda each: watch(f"{name}:{arch} {each}"))

        def formats_of(arch: str) -> dict[str, dict[str, str]]:
            watch(f"{name}:{arch} formats")
            return {f.name: probe_format(Target(name, (arch,)), f) for f in FORMATS.values()}

        archs = architectures(name)
        formats = {arch: formats_of(arch) for arch in archs}
        version = registry.backend(name).doctor()["version"]
        return {"version": version, "archs": {arch: of_arch(arch) for arch in archs}, "formats": formats}

    return {"schema": SCHEMA, "backends": {name: of_backend(name) for name in backends}}


def installed() -> tuple[str, ...]:
    """Return the backends whose builder this machine has: TensorRT counts where it has a GPU to build for."""
    return tuple(name for name in ARCHS if ARCHS[name] and registry.backend(name).doctor()["available"])


def architectures(name: str) -> tuple[str, ...]:
    """Return the architectures that the builder of ``name`` can be asked about here: all, or that of the GPU that it needs."""
    gpu = registry.backend(name).doctor().get("gpu")
    return (gpu,) if gpu else ARCHS[name]


def remember(body: Mapping[str, Any]) -> Path:
    """Keep what was probed for the builds on this machine, beside what was probed with other builders; return the file."""
    path, before = cache_file(), {}
    with suppress(UsageError):  # What cannot be read is what a new probe makes up for.
        before = found_here()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}.tmp")
    write({**body, "backends": {**before, **body["backends"]}}, written)
    written.replace(path)
    recorded.cache_clear()
    return path


def describe(body: Mapping[str, Any] | None = None) -> str:
    """Return the formats that each target computes, and what each architecture was found to do with every format and operator."""
    lines = ["formats that a target computes natively: as probed, of tensorrt else as NVIDIA states; onnxruntime emulates"]
    for name in ARCHS:
        backend = registry.backend(name)
        for arch in ARCHS[name] or ("",):
            target = Target(name, (arch,) if arch else ())
            native = backend.formats(target)
            lines.append(
                f"  {target!s:22} " + " ".join(f.name if f in native else "·" * len(f.name) for f in FORMATS.values() if not f.is_simulated)
            )
    for name, facts in (body or recorded())["backends"].items():
        lines.append(f"operators, built one by one with {name} {facts['version']} (x: refused)")
        archs = facts["archs"]
        order = sorted(archs, key=lambda arch: int(arch[3:]))
        lines[-1:] = _format_lines(facts["formats"], order, f"{name} {facts['version']}") + lines[-1:]
        lines.append(" " * 25 + " ".join(order))
        for operator in next(iter(archs.values())):
            marks = " ".join(("x" if archs[a].get(operator) else "yes").center(len(a)) for a in order)
            why = next((archs[a][operator] for a in order if archs[a].get(operator)), "").partition(" (TensorRT")[0]
            lines.append(f"  {operator:22} {marks}{'  ' + why if why else ''}".rstrip())
    return "\n".join(lines)


def _format_lines(found: Mapping[str, Mapping[str, Mapping[str, str]]], order: Sequence[str], builder: str) -> list[str]:
    """Return a table of what each architecture of ``order`` makes of each format."""
    lines = [f"formats, one layer each built with {builder} (x: refused; else what it computes in)", " " * 25 + " ".join(order)]
    for format in FORMATS:
        for operator in found[order[0]][format]:
            cells = " ".join(_cell(found[arch][format][operator]).center(len(arch)) for arch in order)
            lines.append(f"  {format + ' ' + operator:22} {cells}".rstrip())
    return lines


def _cell(said: str) -> str:
    """Return one word for the answer to a probe of a format."""
    return "yes" if not said else said.split()[2] if said.startswith(COMPUTES) else "x"


def write(body: Mapping[str, Any], path: Path) -> None:
    """Write what was probed as JSON."""
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
