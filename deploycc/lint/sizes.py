"""Family S and T1: what is quantized although the skip rules say that it does not pay. The verdicts are those of the partition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycc.core.graph import is_constant
from deploycc.lint.findings import Place, rule
from deploycc.lint.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIX = "leave it in the base format: exclude the node from quantization, or let deploycc build from the floating-point file"
_MULTIPLE = 32


def _excluded(subject: Subject, name: str, format: str) -> Iterator[Place]:
    """Yield the regions that the file quantizes to ``format`` and that the rule ``name`` takes from it."""
    for region in subject.regions:
        asked = subject.format_of(region)
        if asked == format and asked not in region.formats and name in region.rules:
            node = subject.anchors(region)[0]
            weight = node.inputs[1].shape if node.inputs[1] is not None else None
            yield Place(node, f"{node.op_type} with operand {list(weight) if weight is not None else '?'} is quantized to {asked}")


@rule("S1", "warning", why="a product so narrow moves memory rather than computes; the pairs cost more than 8 bits save", fix=_FIX)
def products_are_wide_enough(subject: Subject) -> Iterator[Place]:
    """A product in codes has K and N of at least 16."""
    yield from _excluded(subject, "S1", "int8")
    yield from _excluded(subject, "S1", "fp8")


@rule("S2", "warning", why="there is no INT8 kernel for so few channels that is faster than FP16", fix=_FIX)
def convolutions_are_wide_enough(subject: Subject) -> Iterator[Place]:
    """A convolution quantized to INT8 has enough channels."""
    yield from _excluded(subject, "S2", "int8")


@rule("S3", "warning", why="TensorRT has no FP8 kernel for this shape and falls back to floating point", fix=_FIX)
def fp8_convolutions_have_a_kernel(subject: Subject) -> Iterator[Place]:
    """A convolution quantized to FP8 has more than 16 channels and at most 32 taps."""
    yield from _excluded(subject, "S3", "fp8")


@rule("S4", "warning", why="the weight would be quantized at every inference", fix=_FIX)
def weights_are_constant(subject: Subject) -> Iterator[Place]:
    """A quantized convolution has a constant weight."""
    for node in (n for n in subject.plain.graph if n.op_type in {"Conv", "ConvTranspose"}):
        seen = subject.nodes.get(node.name or "")
        if seen is not None and not is_constant(node.inputs[1]) and subject.operand(seen, 1) is not None:
            yield Place(seen, "its weight is computed and quantized")


@rule("S5", "warning", why="grouped convolutions need a multiple of 4 channels per group (8 in all) for an INT8 kernel", fix=_FIX)
def groups_are_wide_enough(subject: Subject) -> Iterator[Place]:
    """A grouped convolution quantized to INT8 has enough channels per group."""
    yield from _excluded(subject, "S5", "int8")


@rule("S6", "warning", why="there is no fused INT8 attention of this size: products and softmax become separate kernels", fix=_FIX)
def int8_attention_has_a_kernel(subject: Subject) -> Iterator[Place]:
    """INT8 attention has a sequence of at most 512 and heads of 16, 32 or 64."""
    yield from _excluded(subject, "S6", "int8")


@rule("S7", "warning", why="there is no fused FP8 attention for heads of this size", fix=_FIX)
def fp8_attention_has_a_kernel(subject: Subject) -> Iterator[Place]:
    """FP8 attention has heads above 8 and up to 256."""
    yield from _excluded(subject, "S7", "fp8")


@rule(
    "S8", "note", why="INT8 tensor cores work on 32 channels at a time; the rest is padding", fix="choose widths that are multiples of 32"
)
def channels_fill_the_tensor_cores(subject: Subject) -> Iterator[Place]:
    """Channels of what is quantized to INT8 are multiples of 32."""
    for region in (r for r in subject.regions if r.kind in {"conv", "linear"} and subject.format_of(r) == "int8"):
        plain = next(n for n in subject.plain.graph if n.name == region.anchors[0])
        shape = plain.inputs[1].shape if plain.inputs[1] is not None else None
        dims = [int(d) for d in shape][:2] if shape is not None and shape.is_static() else []  # type: ignore[arg-type]
        if any(d % _MULTIPLE for d in dims if d > 1):
            yield Place(
                subject.anchors(region)[0], f"a weight of {' x '.join(map(str, dims))} channels is padded to multiples of {_MULTIPLE}"
            )


@rule(
    "T1",
    "warning",
    why="TensorRT computes ConvTranspose and 3-D convolution in floating point even between pairs, and dequantizes the weight each time",
    fix="leave it in floating point",
)
def only_plain_convolutions(subject: Subject) -> Iterator[Place]:
    """No ConvTranspose or 3-D convolution is quantized."""
    yield from _excluded(subject, "T1", "int8")
    yield from _excluded(subject, "T1", "fp8")
