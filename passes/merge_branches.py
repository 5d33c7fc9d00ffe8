"""Merge parallel convolutions of one value, and the skips beside them, into one convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from deploycc.core import profit
from deploycc.core.affine import unfit, weight_type, write_convolution
from deploycc.core.branches import Selection, combined, combined_geometry, select
from deploycc.core.convolution import Refusal
from deploycc.core.graph import fresh_name, substitute, taken_names
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

_PROOF = "exact in float64, rounded once"


@dataclass(frozen=True, slots=True)
class MergeBranches:
    """Merge parallel convolutions of one value, and the skips beside them, into one convolution.

    Why: networks trained with several branches (RepVGG, DBB, MobileOne, depth-pruned residual blocks) add up maps that are affine in
    one value. K = sum embed(K_j), b = sum b_j, where a branch may be a chain of convolutions, an identity (one tap of 1), a scaled
    skip, a normalization, or an average pooling that counts its padding (depthwise, 1 / k^2).

    Before / After:
        ``Add(Conv(x, w1 [C,C,3,3], pads=1), Conv(x, w2 [C,C,1,1]))`` / ``Conv(x, w [C,C,3,3], pads=1)``
        ``Add(Conv(x, w [C,C,3,3], pads=1), x)`` / ``Conv(x, w' [C,C,3,3], pads=1)``

    Declines when:
        MULTI_CONSUMER: a value inside a branch is read elsewhere.
        GRAPH_OUTPUT: a value inside a branch is an output of the graph.
        NONCONST_WEIGHT: a weight, bias or statistic of a branch is computed at run time.
        PAD2_NONZERO: a chain inside a branch does not compose exactly at the border.
        STRIDE_GROWTH, GROUP_MISMATCH: a chain inside a branch does not compose.
        GEOMETRY: the branches differ in stride, channels or size.
        CEIL_MODE: an average pooling rounds its size up.
        COUNT_PAD: an average pooling does not count its padding.
        DTYPE: a branch is quantized already.
        DYNAMIC_SHAPE: a padding depends on the size of the image.
        COST: more than twice the multiplications or parameters, or no estimated gain.
        NUMERIC: a merged weight is not finite, or exceeds what FP16 holds where the original did not.

    Options:
        merge: ``exact`` or ``all`` to merge, ``off`` to do nothing.
        arch: the architecture whose roofline decides.
        batch: the batch that is judged.

    See: ONNX Conv-11, AveragePool-19.
    """

    merge: Literal["exact", "off", "all"] = "exact"
    arch: str = "sm_80"
    batch: int = 8

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity", "fold-batchnorm", "fold-layerscale", "fold-pad")

    def __call__(self, model: ir.Model) -> PassResult:
        """Merge the branches of every sum until nothing changes, inner sums first."""
        if self.merge == "off":
            return PassResult()
        rewrites: list[Rewrite] = []
        taken = taken_names(model.graph)
        while True:
            merged, declines = self.merge_one(list(model.graph), taken)
            if merged is None:
                return PassResult(tuple(rewrites), tuple(declines))
            rewrites.append(merged)

    def merge_one(self, nodes: list[ir.Node], taken: set[str]) -> tuple[Rewrite | None, list[Decline]]:
        """Merge the first sum that can be, or return why no sum can."""
        declines = []
        for root, selection, refusals in select(nodes):
            verdict = self.merge_sum(selection, taken) if selection is not None else None
            if isinstance(verdict, Rewrite):
                return verdict, []
            found = [*refusals, verdict] if isinstance(verdict, Refusal) else refusals
            declines += [Decline(root.name or "", r.code, r.reason) for r in found]
        return None, declines

    def merge_sum(self, selection: Selection, taken: set[str]) -> Rewrite | Refusal:
        """Merge the branches of one sum, or return why not."""
        judged = self.judge(selection)
        if isinstance(judged, Refusal):
            return judged
        merged = combined(selection)
        verdict = merged if isinstance(merged, Refusal) else unfit(merged, selection.links) or merged
        if isinstance(verdict, Refusal):
            return verdict
        dtype = weight_type([link for link in selection.links if link.nodes[0].op_type == "Conv"])
        last = _part_of(selection, taken) if selection.rest else selection.last
        write_convolution(last, selection.source, verdict, absorbed=selection.absorbed, dtype=dtype, taken=taken)
        names = ", ".join(branch.name for branch in selection.branches)
        what = f"merged {names} over '{selection.source.name}': {profit.described(*judged)}"
        return Rewrite(selection.last.name or "", what, _PROOF)

    def judge(self, selection: Selection) -> tuple[profit.Cost, profit.Cost] | Refusal:
        """Return the cost before and after, or why the branches are not to be merged."""
        merged = combined_geometry(selection)
        if isinstance(merged, Refusal):
            return merged
        sizes = [d for d in list(selection.root.outputs[0].shape or ())[2:] if isinstance(d, int)]
        gate = profit.gate(self.arch, self.batch, math.prod(sizes) if len(sizes) == merged.rank else None)
        before = profit.Cost()
        for branch in selection.branches:
            before += gate.pointwise(merged)
            for link, times in zip(branch.links, profit.steps_behind([link.geometry for link in branch.links]), strict=True):
                own = link.geometry
                alone = gate.pointwise(own, times=times, parameters=own.parameters)
                before += alone if link.is_pointwise else gate.kernel(own, times=times)
        after = gate.kernel(merged)
        return profit.refusal(before, after) or profit.tie(before, after) or (before, after)


def _part_of(selection: Selection, taken: set[str]) -> ir.Node:
    """Give the branches a sum of their own, to which the operands that stay are added; return that sum."""
    graph, root = selection.root.graph, selection.root
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"'{root.name}' belongs to no graph")
    output = root.outputs[0]
    total = ir.node("Sum", [branch.value for branch in selection.branches], name=fresh_name(f"{root.name}_merged", taken))
    added = [total]
    for value in selection.rest[:-1]:
        added.append(ir.node("Add", [added[-1].outputs[0], value], name=fresh_name(f"{root.name}_rest", taken)))
    for node in added:
        node.outputs[0].name = fresh_name(f"{output.name}_part", taken)
        node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
    graph.insert_before(root, added)
    substitute(root, "Add", [added[-1].outputs[0], selection.rest[-1]], absorbed=selection.inner)
    return total
