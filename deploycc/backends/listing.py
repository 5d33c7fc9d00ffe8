"""Read what an engine computes in from the program text that its compiler leaves inside.

A TensorRT-RTX engine contains listings of its compiled program in plain text: tensors with their types, ops with their
operands, and the ONNX nodes that each op absorbed. That answers without a GPU whether a node asked to run in INT8 does. The
text is undocumented, so it is read only from versions on which it was verified, and it never decides whether a build is good.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.core.backend import Realised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VERIFIED = ((1, 7),)
TYPES = {"half": "fp16", "float": "fp32", "bfloat16": "bf16", "b16": "bf16", "fp8_e4m3": "fp8", "fp4_e2m1": "fp4"}
FLOATS = ("fp16", "bf16", "fp32")
QUANTIZED = ("int8", "fp8", "int4", "fp4")
# The ops that multiply matrices: their short names in the counts, and how many of their inputs are operands.
COMPUTE = {"corrltn": ("conv", 2), "deconvolution": ("deconv", 2), "fully_connected": ("fc", 2), "_gemm_mha_v2": ("mha", 3)}
_MOVES = re.compile(r"__myl_(?:Tran|Resh|Move|Slic|Etc)+")
_TENSOR = re.compile(r'^ *(?:sub_)?tensor=\{[^\n]* name="([^"]*)"[^\n]* type=(\w+) [^\n]*\}', re.MULTILINE)
_OP = re.compile(r"^  (corrltn|deconvolution|fully_connected|runtime_fusion|function)=\{ ([^\n]*)", re.MULTILINE)
_INPUTS = re.compile(r' input(?:_args)?=\{((?: ?"[^"]*")*) ?\}')
_OUTPUTS = re.compile(r' output(?:_args)?=\{((?: ?"[^"]*")*) ?\}')
# A listing runs from its header to the first byte that is not text; 0x1f separates the names of ONNX nodes.
_SEPARATOR = "\x1f"
_LISTING = re.compile(rb"header \{\n[^\x00-\x08\x0b-\x1e\x7f]*")


@dataclass(frozen=True, slots=True)
class Op:
    """One op of a listing: its kind, its name, the names of its inputs and outputs, and the ONNX nodes it absorbed."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


def read_listing(engine: bytes) -> Realised:
    """Return the operand types per ONNX node, and counts of ops; an empty record with a note when they cannot be read.

    Counts: ``conv_int8``, ``fc_fp16``, ``mha_fp8`` and so on by operand type (``int8xfp16`` when the operands differ);
    ``fc_dequantised`` for matrix products in floating point that dequantize a constant on the fly;
    ``weights_dequantised_at_run_time`` for constants that a kernel of its own dequantizes at every inference;
    ``reformats`` for kernels that only move data; ``conv_unfused`` for convolutions of codes that write FP32, so that a kernel of its own
    adds the bias, applies the activation and quantizes; ``kernels`` for everything launched.
    """
    version = engine_version(engine)
    if version[:2] not in VERIFIED:
        shown = ".".join(map(str, version)) or "none"
        return Realised(note=f"the engine's listing is read for TensorRT-RTX 1.7 only (version found: {shown})")
    source = f"program text inside the engine, TensorRT-RTX {'.'.join(map(str, version))}"
    operands: dict[str, tuple[str, ...]] = {}
    counts: Counter[str] = Counter()
    for listing in listings(engine):
        types = {name: TYPES.get(kind, kind) for name, kind in _TENSOR.findall(listing)}
        constants = {found[1] for found in _TENSOR.finditer(listing) if " const_payload_size=" in found[0]}
        for op in ops(listing):
            counts["kernels"] += 1
            if compute := _compute(op, types, constants):
                label, found = compute
                counts[label] += 1
                counts["conv_unfused"] += _is_unfused(op, found, types)
                for node in op.nodes:
                    operands.setdefault(node, found)
            elif special := _special(op, types, constants):
                counts[special] += 1
    counts += Counter()  # Only what was seen.
    attention = sum(n for label, n in counts.items() if label.startswith("mha_"))
    note = "" if operands else "no matrix product was found in the engine's program text"
    return Realised(operands, attention, dict(sorted(counts.items())), source, note)


def engine_version(engine: bytes) -> tuple[int, ...]:
    """Return the four numbers of the version that built ``engine``, or nothing when this is not an engine."""
    return tuple(engine[24:28]) if engine[:4] == b"vtrt" and len(engine) >= 28 else ()


def listings(engine: bytes) -> Iterator[str]:
    """Yield the main listings: those compiled for named architectures (nested ones, of single kernels, say ``*``)."""
    for found in _LISTING.finditer(engine):
        text = found[0].decode("utf-8", errors="replace").split("\nshape_main {")[0]
        if re.search(r"^  accelerators=\{sm", text, re.MULTILINE) and "\nmain {" in text:
            yield text


def ops(listing: str) -> Iterator[Op]:
    """Yield the ops of one listing in order."""
    for kind, text in _OP.findall(listing):
        name = re.match(r'name="?([^" ]*)', text)
        inputs, outputs = _INPUTS.search(text), _OUTPUTS.search(text)
        layers = re.search(r' layers="([^"]*)"', text)
        yield Op(
            kind,
            name[1] if name else "",
            tuple(re.findall(r'"([^"]*)"', inputs[1])) if inputs else (),
            tuple(re.findall(r'"([^"]*)"', outputs[1])) if outputs else (),
            tuple(layer.removeprefix("[ONNX Layer: ").removesuffix("]") for layer in layers[1].split(_SEPARATOR)) if layers else (),
        )


def _is_unfused(op: Op, operands: tuple[str, ...], types: Mapping[str, str]) -> bool:
    """Return whether ``op`` is a convolution of codes that writes FP32."""
    return op.kind in ("corrltn", "deconvolution") and operands[0] in QUANTIZED and [types.get(name) for name in op.outputs] == ["fp32"]


def _compute(op: Op, types: Mapping[str, str], constants: set[str]) -> tuple[str, tuple[str, ...]] | None:
    """Return the count's label and the operand types if ``op`` multiplies matrices."""
    if op.kind == "runtime_fusion" and "Fc" in op.name:
        return _fused(op, types)
    known = COMPUTE.get(op.name if op.kind == "function" else op.kind)
    if known is None:
        return None
    label, arity = known
    operands = op.inputs[:arity]
    if label == "mha":
        # The biases of the scores, position tables and masks, stand between the key and the value; the sizes come last.
        operands = (*op.inputs[:2], *[n for n in op.inputs[2:] if n not in constants and types.get(n) in (*FLOATS, *QUANTIZED)][-1:])
    found = tuple(types.get(name, "unknown") for name in operands)
    return f"{label}_{'x'.join(dict.fromkeys(found))}", found


def _fused(op: Op, types: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return label and operand types of a matrix product that was fused with the ops around it.

    Its name spells the fused ops in order. Casts before ``Fc`` dequantize operands, so the product itself is in floating point; where that
    is one operand, the weight, the second type is the one in which it is stored.
    """
    data = [types[name] for name in op.inputs if types.get(name, "int64") not in ("int64", "int32", "bool")]
    before = op.name.split("Fc")[0]
    if "Cast" in before and any(kind not in FLOATS for kind in data):
        kind = next((k for k in data if k in FLOATS), "fp32")
        codes = [k for k in data if k in QUANTIZED]
        return "fc_dequantised", (kind, codes[0] if len(codes) == 1 else kind)
    found = tuple(data[:2])
    return f"fc_{'x'.join(dict.fromkeys(found))}", found


def _special(op: Op, types: Mapping[str, str], constants: set[str]) -> str | None:
    """Return the label of a kernel that costs time without computing, if ``op`` is one."""
    if _MOVES.fullmatch(op.name):
        return "reformats"
    is_constant = bool(op.inputs) and constants.issuperset(op.inputs)
    if is_constant and any(types.get(name) in QUANTIZED for name in op.inputs):
        return "weights_dequantised_at_run_time"
    return None
