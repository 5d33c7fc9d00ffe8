"""Small models as ONNX text, shared by the tests of the backends."""

from __future__ import annotations

import math

from onnx import parser

from deploycc.core.shapes import Profile

CODES = {"fp32": 1, "int8": 3, "fp16": 10, "bf16": 16, "fp8": 17}
NAMES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}


def model_text(body: str, *, inputs: str, outputs: str, opset: int = 21) -> str:
    """Return a model in ONNX's text form."""
    return f'<ir_version: 10, opset_import: ["":{opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'


def weight_text(name: str, shape: str, base: str) -> str:
    """Return nodes that make the constant ``name`` in the floating type ``base``."""
    rank = shape.count(",") + 1
    value = f"{name}_v = Constant<value = float {{0.25}}>() {name}_n = Constant<value = int64[{rank}] {{{shape}}}>()"
    return f"{value} {name}_e = Expand({name}_v, {name}_n) {name} = Cast<to = {CODES[base]}>({name}_e)"


def constant_text(name: str, shape: str) -> str:
    """Return a node that makes the INT8 constant ``name``."""
    size = math.prod(int(d) for d in shape.split(","))
    values = ", ".join(str(i % 7 + 1) for i in range(size))
    return f"{name} = Constant<value = int8[{shape}] {{{values}}}>()"


def quantize_text(value: str, fmt: str) -> str:
    """Return a Q/DQ pair from ``value`` to ``value_dq``."""
    pair = f"[{value}_Q] {value}_q = QuantizeLinear<output_dtype = {CODES[fmt]}>({value}, s)"
    return f"{pair} [{value}_DQ] {value}_dq = DequantizeLinear({value}_q, s)"


def scale_text(base: str) -> str:
    """Return nodes that make the scale ``s`` in the floating type ``base``."""
    return f"s_v = Constant<value = float {{0.03125}}>() s = Cast<to = {CODES[base]}>(s_v)"


def conv_text(base: str = "fp16", fmt: str | None = None) -> str:
    """Return a 3x3 convolution 16 to 32 with ReLU, its operands quantized to ``fmt`` if given."""
    head, suffix = [weight_text("w", "32,16,3,3", base)], ""
    if fmt:
        head, suffix = [*head, scale_text(base), quantize_text("x", fmt), quantize_text("w", fmt)], "_dq"
    body = " ".join([*head, f"[stage_conv] c = Conv<pads = [1, 1, 1, 1]>(x{suffix}, w{suffix}) [stage_relu] y = Relu(c)"])
    return model_text(body, inputs=f"{NAMES[base]}[N,16,14,14] x", outputs=f"{NAMES[base]}[N,32,14,14] y")


def matmul_text(base: str = "fp16", fmt: str | None = None) -> str:
    """Return a matrix product 64 to 64 with ReLU, its operands quantized to ``fmt`` if given."""
    head, suffix = [weight_text("w", "64,64", base)], ""
    if fmt:
        head, suffix = [*head, scale_text(base), quantize_text("x", fmt), quantize_text("w", fmt)], "_dq"
    body = " ".join([*head, f"[fc] c = MatMul(x{suffix}, w{suffix}) [relu] y = Relu(c)"])
    return model_text(body, inputs=f"{NAMES[base]}[N,64] x", outputs=f"{NAMES[base]}[N,64] y")


def batch(*shape: int, name: str = "x") -> list[Profile]:
    """Return the profile of one input whose batch is 1 to 8."""
    return [Profile(name, (1, *shape), (4, *shape), (8, *shape))]


def chain_model(nodes: int) -> bytes:
    """Return a chain of ``nodes`` MatMul and Relu nodes: quick to write, slow to build."""
    steps = ["n0 = Identity(x)"]
    steps += [f"m{i} = MatMul(n{i}, w) n{i + 1} = Relu(m{i})" for i in range(nodes // 2)]
    body = " ".join([weight_text("w", "64,64", "fp32"), *steps, f"y = Identity(n{nodes // 2})"])
    return bytes(parser.parse_model(model_text(body, inputs="float[4,64] x", outputs="float[4,64] y")).SerializeToString())
