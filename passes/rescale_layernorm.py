"""Move a scale and a shift per channel from a normalization into the linear layers that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.affine import write_constant
from deploycc.core.convolution import Refusal
from deploycc.core.graph import constant, float_attribute, fresh_name, rank, replace_value, sole_consumer, taken_names
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite
from deploycc.core.rescaling import Reader, Rescale, Site, find_site, vector

LARGEST_HALF = 65504.0
_PROOF = "exact in float64, every parameter rounded once"


@dataclass(frozen=True, slots=True)
class RescaleLayernorm:
    """Move a scale and a shift per channel from a normalization into the linear layers that read it.

    Why: a few channels behind a LayerNormalization are many times larger than the rest, and one INT8 scale for all of them leaves the
    rest three bits. Outlier channels are made smaller and every channel is centred on zero; the readers' weights, which have one
    scale per output channel, take the difference. The function stays the same, and no node is added but a bias where there was none.
    Runs where INT8 is on offer (phase ``reparameterize``); which channels change by how much is in the plan.

    Before / After:
        ``x = LayerNormalization(n, g, b)``, ``x W + c`` / ``x' = LayerNormalization(n, g r, (b - d) r)``, ``x' (W / r) + (c + d W)``
        Also for a BatchNormalization, or a product with a vector and a sum, in front of linear layers.

    Declines when:
        POST_NORM: a sum reads the normalized value (a skip from behind the normalization).
        READER: another operator that is not linear in constants reads it.
        NONCONST_WEIGHT: it is multiplied by something computed.
        GRAPH_OUTPUT: it is an output of the graph.
        GROUP_MISMATCH: a grouped or depthwise convolution reads it.
        AXIS: a product does not sum over the channels.
        JOINED: it is concatenated with other values.
        NO_READER: no linear node reads it.
        NUMERIC: a parameter would not be finite, or exceeds what FP16 holds.

    Options:
        rescales: scale and shift per name of the normalization's node.

    See: LRP-QViT, arXiv 2401.11243; RepQ-ViT, arXiv 2212.08254.
    """

    rescales: Mapping[str, Rescale] = field(default_factory=dict)

    phase: ClassVar[Phase] = "reparameterize"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        taken, seen = taken_names(model.graph), set()
        for node in list(model.graph):
            site = find_site(node) if node.graph is not None else None
            anchor = site.source.name or "" if isinstance(site, Site) else node.name or ""
            if site is None or anchor in seen:
                continue
            seen.add(anchor)
            rescale = self.rescales.get(anchor)
            if isinstance(site, Refusal):
                declines.append(Decline(anchor, site.code, site.reason))
            elif rescale is not None:
                result = _apply(site, rescale, taken)
                (rewrites if isinstance(result, Rewrite) else declines).append(result)  # type: ignore[arg-type]
        return PassResult(tuple(rewrites), tuple(declines))

    def __repr__(self) -> str:
        """Return a spec that does not list every channel."""
        return f"RescaleLayernorm({len(self.rescales)} rescales)"


def _apply(site: Site, rescale: Rescale, taken: set[str]) -> Rewrite | Decline:
    anchor = site.source.name or ""
    scale, shift = np.array(rescale.scale), np.array(rescale.shift)
    if scale.shape != (site.channels,) or shift.shape != (site.channels,) or not np.all(scale > 0):
        return Decline(anchor, "NUMERIC", f"the plan has {scale.size} scales for {site.channels} channels, or one that is not positive")
    if np.any(shift) and not site.is_centrable:
        return Decline(anchor, "NUMERIC", "the plan has shifts, and a reader pads with zeros")
    if not all(_fits(reader.matrix(), scale) for reader in site.readers):
        return Decline(anchor, "NUMERIC", "a weight would not be finite, or exceeds what FP16 holds")
    for reader in site.readers:
        _follow(reader, scale, shift, taken)
    _change_source(site, scale, shift, taken)
    names = ", ".join(f"'{r.node.name}'" for r in site.readers)
    what = f"{int((scale < 1).sum())} of {site.channels} channels made smaller, by up to {1 / scale.min():.3g}; {names} take the difference"
    return Rewrite(anchor, what, _PROOF)


def _fits(weight: np.ndarray, scale: np.ndarray) -> bool:
    """Return whether the rescaled weight is finite and within FP16, or no larger than it was."""
    largest = np.abs(weight / scale[:, None]).max()
    return bool(np.isfinite(largest) and largest <= max(LARGEST_HALF, np.abs(weight).max()))


def _follow(reader: Reader, scale: np.ndarray, shift: np.ndarray, taken: set[str]) -> None:
    """Divide the weight by ``scale`` and add what ``shift`` takes away to the bias."""
    node, weight = reader.node, constant(reader.node.inputs[1])
    if weight is None:
        raise TypeError(f"the weight of '{node.name}' is computed")
    along = [1] * weight.ndim
    along[reader.axis] = -1
    wide = weight.astype(np.float64)
    if np.any(shift):
        outputs = (wide * shift.reshape(along)).sum(axis=tuple(i for i in range(wide.ndim) if i != _output_axis(reader)))
        _add_bias(node, outputs, taken)
    value = node.inputs[1]
    dtype = value.dtype if value is not None and value.dtype is not None else ir.DataType.FLOAT
    name = f"{value.name if value is not None else node.name}_rescaled"
    node.replace_input_with(1, write_constant(node, name, wide / scale.reshape(along), dtype=dtype, taken=taken))


def _output_axis(reader: Reader) -> int:
    return 0 if reader.node.op_type == "Conv" else 1 - reader.axis


def _add_bias(node: ir.Node, bias: np.ndarray, taken: set[str]) -> None:
    """Add a vector to the output of a linear node, in its own bias or in the sum behind it where there is one."""
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    stem = node.outputs[0].name or node.name
    if node.op_type in {"Conv", "Gemm"}:
        given = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        own = 0.0 if given is None else given.astype(np.float64) * float_attribute(node, "beta", 1.0)
        total = write_constant(node, f"{stem}_bias", own + bias * float_attribute(node, "alpha", 1.0), dtype=dtype, taken=taken)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, total)
        if "beta" in node.attributes:
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        return
    following = sole_consumer(node.outputs[0])
    if following is not None and following.op_type == "Add":
        i = 1 if following.inputs[0] is node.outputs[0] else 0
        axis = (rank(node.outputs[0]) or 0) - 1
        if vector(following.inputs[i], following.outputs[0]) == (axis, bias.size):
            old = constant(following.inputs[i])
            if old is not None:
                total = write_constant(node, f"{stem}_bias", old.astype(np.float64) + bias, dtype=dtype, taken=taken)
                following.replace_input_with(i, total)
                return
    _insert_sum(node, bias, dtype, taken)


def _insert_sum(node: ir.Node, bias: np.ndarray, dtype: ir.DataType, taken: set[str]) -> None:
    old, graph = node.outputs[0], node.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"'{node.name}' belongs to no graph")
    name = old.name or ""
    add = ir.node(
        "Add", [old, write_constant(node, f"{name}_bias", bias, dtype=dtype, taken=taken)], name=fresh_name(f"{node.name}_bias", taken)
    )
    new = add.outputs[0]
    new.name, new.type, new.shape = fresh_name(f"{name}_biased", taken), old.type, old.shape
    add.metadata_props.update(node.metadata_props)
    graph.insert_after(node, add)
    replace_value(old, new)
    add.replace_input_with(0, old)


def _change_source(site: Site, scale: np.ndarray, shift: np.ndarray, taken: set[str]) -> None:
    """Multiply the constants of the affine operation: gamma r, (beta - d) r."""
    node = site.source
    if node.op_type in {"LayerNormalization", "BatchNormalization"}:
        beta = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        _write(node, 1, _wide(node, 1) * scale, taken)
        if beta is not None or np.any(shift):
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            _write(node, 2, ((0.0 if beta is None else beta.astype(np.float64)) - shift) * scale, taken)
        return
    product = node
    if node.op_type == "Add":
        i = next(i for i, v in enumerate(node.inputs) if constant(v) is not None)
        along = _along(node.inputs[i])
        _write(node, i, (_wide(node, i) - shift.reshape(along)) * scale.reshape(along), taken)
        maker = node.inputs[1 - i]
        found = maker.producer() if maker is not None else None
        if found is None:
            raise TypeError(f"'{node.name}' adds to nothing computed")
        product = found
    i = 1 if constant(product.inputs[1]) is not None else 0
    _write(product, i, _wide(product, i) * scale.reshape(_along(product.inputs[i])), taken)


def _along(value: ir.Value | None) -> list[int]:
    return [-1 if d != 1 else 1 for d in (value.shape if value is not None and value.shape is not None else ())]


def _wide(node: ir.Node, i: int) -> np.ndarray:
    found = constant(node.inputs[i])
    if found is None:
        raise TypeError(f"operand {i} of '{node.name}' is computed")
    return found.astype(np.float64)


def _write(node: ir.Node, i: int, array: np.ndarray, taken: set[str]) -> None:
    value = node.inputs[i]
    dtype = value.dtype if value is not None else (node.inputs[1].dtype if node.inputs[1] is not None else None)
    name = f"{value.name if value is not None else f'{node.name}_{i}'}_rescaled"
    node.replace_input_with(i, write_constant(node, name, array, dtype=dtype or ir.DataType.FLOAT, taken=taken))
