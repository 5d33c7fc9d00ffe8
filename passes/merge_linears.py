"""Merge fully connected layers that follow each other without an activation between them, and the skip around them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from deploycc.core import profit
from deploycc.core.affine import Link, unfit, weight_type
from deploycc.core.between import Obstacle, chains, nodes_between
from deploycc.core.chains import composed, composed_geometry, judge, partition
from deploycc.core.convolution import Convolution, Refusal, add, identity
from deploycc.core.dimensions import dimensions
from deploycc.core.graph import sole_consumer, taken_names
from deploycc.core.matrix import form_of, read_linear, write_linear
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

_PROOF = "exact in float64, rounded once"


@dataclass(frozen=True, slots=True)
class MergeLinears:
    """Merge fully connected layers that follow each other without an activation between them, and the skip around them.

    Why: a pruned feed-forward block, or a low-rank pair that is wide in the middle, is one matrix: W = W2 W1, b = W2 b1 + b2, and
    W + I with a skip around it. It is worth it where O I < M (I + O), so that it also multiplies less.

    Before / After:
        ``Gemm(Gemm(x, w1 [D,4D], b1), w2 [4D,D], b2)`` / ``Gemm(x, w [D,D], b)``
        ``Add(Add(MatMul(x, w [D,D]), b), x)`` / ``Add(MatMul(x, w'), b)``

    Declines when:
        MULTI_CONSUMER: the value between the two is read elsewhere.
        GRAPH_OUTPUT: the value between the two is an output of the graph.
        NONCONST_WEIGHT: a weight or bias is computed at run time.
        DATA_DEPENDENT: a gate or a normalization by the data is between the two.
        ACTIVATION_BETWEEN: a LeakyRelu or PRelu between the two has a slope other than 1.
        DTYPE: the span is quantized already, or cast between the two.
        COST: the merged matrix would not multiply less (a bottleneck), or there is no estimated gain.
        NUMERIC: a merged weight is not finite, or exceeds what FP16 holds where the original did not.

    Options:
        merge: ``exact`` or ``all`` to merge, ``off`` to do nothing.
        arch: the architecture whose roofline decides.
        batch: the batch that is judged.

    See: ONNX Gemm-13, MatMul-13.
    """

    merge: Literal["exact", "off", "all"] = "exact"
    arch: str = "sm_80"
    batch: int = 8

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "eliminate-identity", "fold-batchnorm", "fold-layerscale")

    def __call__(self, model: ir.Model) -> PassResult:
        """Merge until nothing changes, then say why the remaining neighbours were left alone."""
        if self.merge == "off":
            return PassResult()
        rewrites: list[Rewrite] = []
        refused: dict[tuple[str, ...], Decline] = {}
        taken = taken_names(model.graph)
        while True:
            found, obstacles = chains(model.graph, read_linear)
            merged = [r for chain in found for r in self.merge_chain(chain, taken, refused)]
            if not merged:
                merged = [r for chain in found for r in self.merge_skip(chain, taken, refused)]
            if not merged:
                declines = [d for o in obstacles for d in self.explain_obstacle(o)]
                declines += [d for chain in found for d in self.explain_chain(chain)]
                return PassResult(tuple(rewrites), (*declines, *refused.values()))
            rewrites += merged

    def gate(self, last: Link) -> profit.Gate:
        """Return the profit gate for the output of ``last``."""
        sizes = list(last.output.shape or ())[1:-1]
        known = [d for d in sizes if isinstance(d, int)]
        return profit.gate(self.arch, self.batch, math.prod(known) if len(known) == len(sizes) else None)

    def merge_chain(self, chain: list[Link], taken: set[str], refused: dict[tuple[str, ...], Decline]) -> list[Rewrite]:
        """Merge the spans of the cheapest partition of one chain; what turns out unfit is refused and not tried again."""
        rewrites = []
        for span in partition(chain, self.gate(chain[-1]), refused=refused):
            last, merged = span.links[-1].nodes[-1], _fit(composed(span.links), span.links)
            if isinstance(merged, Refusal):
                refused[tuple(link.name for link in span.links)] = Decline(last.name or "", merged.code, merged.reason)
                continue
            _write(last, span.links, merged, nodes_between(span.links), taken)
            rewrites.append(Rewrite(last.name or "", f"merged {span.names}: {profit.described(span.before, span.after)}", _PROOF))
        return rewrites

    def merge_skip(self, chain: list[Link], taken: set[str], refused: dict[tuple[str, ...], Decline]) -> list[Rewrite]:
        """Add the skip around the end of a chain to its matrix: W + I."""
        last = sole_consumer(chain[-1].output)
        if last is None or last.op_type != "Add" or len(last.inputs) != 2:
            return []
        other = next(v for v in last.inputs if v is not chain[-1].output)
        start = next((i for i in reversed(range(len(chain))) if chain[i].source is other), None)
        if start is None or other is None or dimensions(other) != dimensions(chain[-1].output):
            return []
        links = chain[start:]
        key = (*(link.name for link in links), last.name or "")
        geometry = composed_geometry([link.geometry for link in links])
        if isinstance(geometry, Refusal) or key in refused or geometry.inputs != geometry.outputs:
            return []
        gate, before = self.gate(links[-1]), profit.Cost()
        for link in links:
            before += gate.kernel(link.geometry)
        before += gate.pointwise(geometry)
        after = gate.kernel(geometry)
        if profit.refusal(before, after) or profit.tie(before, after):
            return []
        product = composed(links)
        merged = product if isinstance(product, Refusal) else _fit(add([product, identity(geometry.inputs, rank=0)]), links)
        if isinstance(merged, Refusal):
            refused[key] = Decline(last.name or "", merged.code, merged.reason)
            return []
        _write(last, links, merged, [*nodes_between(links), links[-1].nodes[-1]], taken)
        names = ", ".join(f"'{link.name}'" for link in links)
        return [Rewrite(last.name or "", f"merged {names} and the skip: {profit.described(before, after)}", _PROOF)]

    def explain_obstacle(self, obstacle: Obstacle) -> list[Decline]:
        """Return the decline of two layers that something keeps apart, if merging them would be worth it."""
        first, second = obstacle.first, obstacle.second
        if first is not None and second is not None:
            if first.geometry.outputs != second.geometry.inputs:
                return []
            if isinstance(judge([first, second], self.gate(second), times=[1, 1]), Refusal):
                return []
        return [Decline(obstacle.node.name or "", obstacle.refusal.code, obstacle.refusal.reason)]

    def explain_chain(self, chain: list[Link]) -> list[Decline]:
        """Return why each pair of neighbours in a chain was left alone."""
        judged = [(second, judge([first, second], self.gate(second), times=[1, 1])) for first, second in pairwise(chain)]
        return [Decline(link.name, verdict.code, verdict.reason) for link, verdict in judged if isinstance(verdict, Refusal)]


def _fit(merged: Convolution | Refusal, links: Sequence[Link]) -> Convolution | Refusal:
    return merged if isinstance(merged, Refusal) else unfit(merged, links) or merged


def _write(last: ir.Node, links: Sequence[Link], merged: Convolution, absorbed: Sequence[ir.Node], taken: set[str]) -> None:
    write_linear(last, links[0].source, merged, form=form_of(links), absorbed=absorbed, dtype=weight_type(links), taken=taken)
