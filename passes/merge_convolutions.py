"""Merge convolutions that follow each other without an activation between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from deploycc.core import profit
from deploycc.core.affine import Link, read_convolution, unfit, weight_type, write_constant, write_convolution
from deploycc.core.between import Obstacle, chains, nodes_between
from deploycc.core.chains import composed, composed_geometry, judge, partition
from deploycc.core.convolution import Convolution, Refusal, compose, respond
from deploycc.core.graph import fresh_name, inherit_metadata, replace_value, taken_names
from deploycc.core.passes import Decline, PassResult, Phase, Rewrite

_PROOF = "exact in float64, rounded once"


@dataclass(frozen=True, slots=True)
class MergeConvolutions:
    """Merge convolutions that follow each other without an activation between them.

    Why: depth pruning leaves chains of convolutions that are affine as a whole; one convolution with the composed kernel computes
    the same and keeps the value between them out of memory. K[o, i, s1 d2 v + d1 u] += sum over m of W2[o, m, v] W1[m, i, u] and
    b = b2 + sum of W2 b1, with stride s1 s2 and padding p1 + s1 p2. Of the partitions of a chain the one of least estimated latency
    is taken; a gain below three percent keeps the original.

    Before / After:
        ``Conv(Conv(x, w1 [64,16,3,3], pads=1), w2 [16,64,1,1])`` / ``Conv(x, w [16,16,3,3], pads=1)``
        ``Conv(Conv(x, w1 [C,C,1,1]), w2 [C,1,3,3], group=C)`` / ``Conv(x, w [C,C,3,3])``

    Declines when:
        MULTI_CONSUMER: the value between the two is read elsewhere.
        GRAPH_OUTPUT: the value between the two is an output of the graph.
        NONCONST_WEIGHT: a weight or bias is computed at run time.
        PAD2_NONZERO: the second pads, and the first has a bias or several taps, so the border would differ.
        STRIDE_GROWTH: a stride or dilation would spread the kernel.
        GROUP_MISMATCH: the groups of the two do not nest.
        SHUFFLE: channels are shuffled between the two.
        DATA_DEPENDENT: a gate or a normalization by the data is between the two.
        ACTIVATION_BETWEEN: a LeakyRelu or PRelu between the two has a slope other than 1.
        DTYPE: the span is quantized already, or cast between the two.
        COST: more than twice the multiplications or parameters, or no estimated gain.
        NUMERIC: a merged weight is not finite, or exceeds what FP16 holds where the original did not.
        DYNAMIC_SHAPE: a padding, or a map of border biases, depends on the size of the image.

    Options:
        merge: ``exact`` for one convolution only; ``all`` also adds a constant map where a bias meets padding (static shapes only);
            ``off`` does nothing.
        arch: the architecture whose roofline decides.
        batch: the batch that is judged.

    See: ONNX Conv-11.
    """

    merge: Literal["exact", "off", "all"] = "exact"
    arch: str = "sm_80"
    batch: int = 8

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = (
        "fold-constants",
        "eliminate-identity",
        "fold-batchnorm",
        "fold-layerscale",
        "fold-pad",
        "merge-branches",
    )

    def __call__(self, model: ir.Model) -> PassResult:
        """Merge until nothing changes, then say why the remaining neighbours were left alone."""
        if self.merge == "off":
            return PassResult()
        rewrites: list[Rewrite] = []
        refused: dict[tuple[str, ...], Decline] = {}
        taken = taken_names(model.graph)
        while True:
            found, obstacles = chains(model.graph, read_convolution)
            merged = [r for chain in found for r in self.merge_chain(chain, taken, refused)]
            if not merged:
                declines = [d for o in obstacles for d in self.explain_obstacle(o)]
                declines += [d for chain in found for d in self.explain_chain(chain)]
                return PassResult(tuple(rewrites), (*declines, *refused.values()))
            rewrites += merged

    def gate(self, last: Link) -> profit.Gate:
        """Return the profit gate for the output of ``last``."""
        sizes = [d for d in list(last.output.shape or ())[2:] if isinstance(d, int)]
        return profit.gate(self.arch, self.batch, math.prod(sizes) if len(sizes) == last.geometry.rank else None)

    def merge_chain(self, chain: list[Link], taken: set[str], refused: dict[tuple[str, ...], Decline]) -> list[Rewrite]:
        """Merge the spans of the cheapest partition of one chain; what turns out unfit is refused and not tried again."""
        rewrites = []
        for span in partition(chain, self.gate(chain[-1]), refused=refused):
            last, merged = span.links[-1].nodes[0], composed(span.links)
            verdict = merged if isinstance(merged, Refusal) else unfit(merged, span.links) or merged
            if isinstance(verdict, Refusal):
                refused[tuple(link.name for link in span.links)] = _decline(last, verdict)
                continue
            inner, dtype = nodes_between(span.links), weight_type(span.links)
            write_convolution(last, span.links[0].source, verdict, absorbed=inner, dtype=dtype, taken=taken)
            rewrites.append(Rewrite(last.name or "", f"merged {span.names}: {profit.described(span.before, span.after)}", _PROOF))
        if not rewrites and self.merge == "all":
            return self.merge_with_map(chain, taken)
        return rewrites

    def merge_with_map(self, chain: list[Link], taken: set[str]) -> list[Rewrite]:
        """Merge the first pair of a chain that only a bias before padding keeps apart, with its response as a constant map.

        conv2(W1 x + b1) = (W2 W1) x + conv2(b1), whose last term is the same for every image of one size.
        """
        for first, second in pairwise(chain):
            known = [d for d in list(first.output.shape or ())[2:] if isinstance(d, int)]
            judged = self.judge_with_map(first, second)
            if isinstance(judged, Refusal) or len(known) != first.geometry.rank:
                continue
            before, after = judged
            one, two = first.load(), second.load()
            bare = Convolution(replace(one.geometry, biased=False), one.weight, np.zeros_like(one.bias))
            merged = compose(bare, Convolution(two.geometry, two.weight, np.zeros_like(two.bias)))
            if isinstance(merged, Refusal) or unfit(merged, (first, second)):
                continue
            image = np.broadcast_to(one.bias.reshape(-1, *[1] * len(known)), (one.bias.size, *known))
            node = _write_with_map(first, second, merged, respond(two, image)[None], taken)
            what = f"merged '{first.name}', '{second.name}' with a map of border biases: {profit.described(before, after)}"
            return [Rewrite(node.name or "", what, _PROOF)]
        return []

    def judge_with_map(self, first: Link, second: Link) -> tuple[profit.Cost, profit.Cost] | Refusal:
        """Return the cost of a pair before and after it is merged with a map, or why it is not to be."""
        if not first.geometry.biased:
            return Refusal("PAD2_NONZERO", "no bias meets the padding")
        merged = composed_geometry([replace(first.geometry, biased=False), second.geometry])
        if isinstance(merged, Refusal):
            return merged
        gate = self.gate(second)
        times = math.prod(second.geometry.strides)
        before = gate.kernel(first.geometry, times=times) + gate.kernel(second.geometry)
        after = gate.kernel(replace(merged, biased=False), extra=float(gate.positions * merged.outputs))
        return profit.refusal(before, after) or profit.tie(before, after) or (before, after)

    def explain_obstacle(self, obstacle: Obstacle) -> list[Decline]:
        """Return the decline of two convolutions that something keeps apart, if merging them would be worth it."""
        first, second = obstacle.first, obstacle.second
        if first is not None and second is not None:
            if first.geometry.outputs != second.geometry.inputs or first.geometry.rank != second.geometry.rank:
                return []
            times = profit.steps_behind([first.geometry, second.geometry])
            if isinstance(judge([first, second], self.gate(second), times=times), Refusal):
                return []
        return [_decline(obstacle.node, obstacle.refusal)]

    def explain_chain(self, chain: list[Link]) -> list[Decline]:
        """Return why each pair of neighbours in a chain was left alone."""
        declines = []
        for first, second in pairwise(chain):
            times = profit.steps_behind([first.geometry, second.geometry])
            judged = judge([first, second], self.gate(second), times=times)
            if not isinstance(judged, Refusal):
                continue
            if judged.code == "PAD2_NONZERO" and self.merge == "all" and isinstance(self.judge_with_map(first, second), tuple):
                reason = "the map of border biases needs a static image size"
                declines.append(_decline(second.nodes[0], Refusal("DYNAMIC_SHAPE", reason)))
            else:
                declines.append(_decline(second.nodes[0], judged))
        return declines


def _decline(node: ir.Node, refusal: Refusal) -> Decline:
    return Decline(node.name or "", refusal.code, refusal.reason)


def _write_with_map(first: Link, second: Link, merged: Convolution, map_: np.ndarray, taken: set[str]) -> ir.Node:
    """Replace a pair by a Conv and the Add of a constant map; the Add keeps the names."""
    node, dtype = second.nodes[0], weight_type((first, second))
    inner, output = nodes_between((first, second)), second.output
    name, stem = node.name, output.name
    written = write_convolution(node, first.source, merged, absorbed=inner, dtype=dtype, taken=taken)
    value = written.outputs[0]
    add = ir.node("Add", [value, write_constant(written, f"{stem}_borders", map_, dtype=dtype, taken=taken)], name=name)
    add.outputs[0].type, add.outputs[0].shape = value.type, value.shape
    written.name = fresh_name(f"{name}_merged", taken)
    replace_value(value, add.outputs[0])
    add.outputs[0].name, value.name = stem, fresh_name(f"{stem}_inner", taken)
    add.replace_input_with(0, value)
    inherit_metadata(add, [written])
    if written.graph is not None:
        written.graph.insert_after(written, add)
    return add
