"""Decompose ``Attention`` into the products and the softmax that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from deploycc.core.graph import add_initializer, attribute, float_attribute, int_attribute, replace_value, static_shape
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

LOWEST = np.float32(-3.4028235e38)


@dataclass(frozen=True, slots=True)
class DecomposeAttention:
    """Write ``Attention`` (opset 23) as the products and the softmax that it stands for.

    Why: only the decomposed form can be quantized at its four operands, and TensorRT builds it everywhere, while the op itself fails
    where no dedicated kernel exists. TensorRT fuses the decomposed form again.

    Before / After:
        ``Attention(q, k, v, m)`` / ``MatMul(Softmax(Add(MatMul(Mul(q, scale), Transpose(k)), m)), v)``

    Declines when:
        FORM: a key-value cache, a soft cap, a second output or causal masking is used.
        GROUPED: query and key have different numbers of heads.
        SHAPE: the number of heads or the size of a head is unknown.

    Options: none.

    See: ONNX Attention-23.
    """

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants",)

    def __call__(self, model: ir.Model) -> PassResult:
        """Edit ``model``; see the class."""
        rewrites: list[Rewrite] = []
        declines: list[Decline] = []
        for node in [n for n in model.graph if n.op_type == "Attention" and n.domain in ("", "ai.onnx")]:
            refusal = _refusal(node)
            if refusal is not None:
                declines.append(refusal)
                continue
            _Writer(model.graph, node).write()
            rewrites.append(Rewrite(node.name or "", "two products around a softmax"))
        return PassResult(tuple(rewrites), tuple(declines))


def _refusal(node: ir.Node) -> Decline | None:
    name = node.name or ""
    extra = [v for v in node.inputs[4:] if v is not None] + [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
    if extra or float_attribute(node, "softcap", 0.0) or int_attribute(node, "is_causal", 0):
        return Decline(name, "FORM", "a cache, a soft cap, a further output or causal masking has no plain decomposition")
    if len({_heads(node, i) for i in range(3)}) != 1:
        return Decline(name, "GROUPED", "query, key and value have different numbers of heads")
    if _heads(node, 0) is None or any(_last(node, i) is None for i in range(3)):
        return Decline(name, "SHAPE", "the number of heads or the size of a head is unknown")
    return None


def _rank(node: ir.Node) -> int:
    query = node.inputs[0]
    return len(query.shape) if query is not None and query.shape is not None else 0


def _heads(node: ir.Node, i: int) -> int | None:
    value = node.inputs[i]
    if _rank(node) == 3:
        return int_attribute(node, "q_num_heads" if i == 0 else "kv_num_heads", 0) or None
    dim = value.shape[1] if value is not None and value.shape is not None and len(value.shape) == 4 else None
    return dim if isinstance(dim, int) else None


def _last(node: ir.Node, i: int) -> int | None:
    value = node.inputs[i]
    dim = value.shape[-1] if value is not None and value.shape is not None else None
    return dim if isinstance(dim, int) else None


class _Writer:
    """Appends nodes before one ``Attention`` and replaces it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.stem, self.count = graph, node, node.name or "attention", 0

    def write(self) -> None:
        """Write the decomposition in place of the node."""
        heads, flat = _heads(self.node, 0) or 1, _rank(self.node) == 3
        query, key, value = (self._heads_first(self.node.inputs[i], heads, flat=flat) for i in range(3))
        head = (_last(self.node, 0) or 1) // (heads if flat else 1)
        scale = attribute(self.node, "scale")
        factor = float(scale) if isinstance(scale, float | int) else head**-0.5
        query = self._add("Mul", [query, self._constant("scale", np.array(factor, np.float32), query)], like=query.shape)
        turned = ir.Shape([*list(key.shape)[:2], key.shape[3], key.shape[2]]) if key.shape is not None else None
        key = self._add("Transpose", [key], {"perm": [0, 1, 3, 2]}, like=turned)
        rows, columns = (query.shape[2] if query.shape else None), (key.shape[3] if key.shape else None)
        square = ir.Shape([query.shape[0] if query.shape else None, heads, rows, columns])
        scores = self._masked(self._add("MatMul", [query, key], like=square))
        weights = self._add("Softmax", [scores], {"axis": -1}, like=square)
        mixed = self._add("MatMul", [weights, value], like=query.shape)
        self._replace(mixed, heads, flat=flat)

    def _heads_first(self, value: ir.Value | None, heads: int, *, flat: bool) -> ir.Value:
        if value is None:
            raise TypeError(f"'{self.stem}' lacks an operand")
        if not flat:
            return value
        dims = list(value.shape) if value.shape is not None else [None, None, None]
        size = int(dims[2]) // heads  # type: ignore[arg-type]
        shape = self._constant("shape", np.array([0, 0, heads, size], np.int64))
        split = self._add("Reshape", [value, shape], like=ir.Shape([dims[0], dims[1], heads, size]))
        return self._add("Transpose", [split], {"perm": [0, 2, 1, 3]}, like=ir.Shape([dims[0], heads, dims[1], size]))

    def _masked(self, scores: ir.Value) -> ir.Value:
        mask = self.node.inputs[3] if len(self.node.inputs) > 3 else None
        if mask is None:
            return scores
        if mask.dtype == ir.DataType.BOOL:
            zero, lowest = (self._constant(n, np.array(v, np.float32), scores) for n, v in (("zero", 0.0), ("lowest", LOWEST)))
            mask = self._add("Where", [mask, zero, lowest], like=mask.shape)
        return self._add("Add", [scores, mask], like=scores.shape)

    def _replace(self, mixed: ir.Value, heads: int, *, flat: bool) -> None:
        output = self.node.outputs[0]
        if flat:
            width = (_last(self.node, 2) or 0) // heads * heads
            turned = self._add("Transpose", [mixed], {"perm": [0, 2, 1, 3]})
            mixed = self._add("Reshape", [turned, self._constant("flat", np.array([0, 0, width], np.int64))], like=output.shape)
        elif static_shape(output) is not None or mixed.shape is None:
            mixed.shape = output.shape
        replace_value(output, mixed)
        self.graph.remove(self.node, safe=True)

    def _constant(self, name: str, array: np.ndarray, like: ir.Value | None = None) -> ir.Value:
        dtype = like.dtype if like is not None and like.dtype is not None else None
        if dtype is not None and dtype != ir.DataType.FLOAT:
            array = np.clip(array, -65504.0, 65504.0).astype(dtype.numpy()) if dtype == ir.DataType.FLOAT16 else array.astype(dtype.numpy())
        return add_initializer(self.graph, f"{self.stem}_{name}", array)

    def _add(self, op: str, inputs: list[ir.Value], attributes: dict[str, object] | None = None, like: ir.Shape | None = None) -> ir.Value:
        self.count += 1
        node = ir.node(op, inputs, attributes or {}, name=f"{self.stem}_{op}_{self.count}")  # type: ignore[arg-type]
        node.metadata_props.update(self.node.metadata_props)
        out = node.outputs[0]
        first = self.node.inputs[0]
        out.name, out.shape = f"{node.name}_out", like
        out.type = ir.TensorType(first.dtype) if first is not None and first.dtype is not None else None
        self.graph.insert_before(self.node, node)
        return out
