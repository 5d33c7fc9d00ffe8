"""Calibrate the simulated quantizers of paper mode in one walk along the graph over 32 images.

Every layer is calibrated on inputs that the layers before it have quantized already, as RepQ-ViT's code does; its weights are
quantized after the reparameterization, when they are known.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.graph import float_attribute, is_constant
from deploycc.core.placement import weight_axis
from deploycc.core.rescaling import Rescale, Site, find_site
from deploycc.core.simulation import Quantizer, Uniform, fit_logarithmic, fit_uniform
from deploycc.quant.paper_bits import EDGE_BITS
from deploycc.quant.paper_reparameterize import Reparameterization, reparameterized, rescale_between

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir
    from torch import Tensor

    from deploycc.core.data import Dataset
    from deploycc.core.plan import Assignment, Region
    from deploycc.quant.lrp.program import Program

SAMPLES = 32


@dataclass
class Simulation:
    """The quantizers of the activations by value and format, the rescales by normalization, and what they come from."""

    quantizers: dict[str, dict[str, Quantizer]] = field(default_factory=dict)
    rescales: dict[str, Rescale] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0


def calibrate_simulation(
    model: ir.Model,
    assignments: Sequence[Assignment],
    data: Dataset,
    *,
    reparameterization: Reparameterization,
    batch: int = SAMPLES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Simulation:
    """Return the quantizers of every simulated region.

    Args:
        model: a CANONICAL graph in FP32; it is not changed.
        assignments: the bits of every region.
        data: calibration data, of which the first 32 samples are used.
        reparameterization: what is done behind a LayerNormalization.
        batch: samples per run of a node; the result does not depend on it.
        progress: called with nodes done and in all.

    Raises:
        UsageError: for an operator that cannot be executed in torch, naming the node.
    """
    import torch

    start = time.perf_counter()
    with torch.no_grad():
        walk = _Walk(model, assignments, reparameterization)
        walk.run(data.take(SAMPLES), batch, progress)
    walk.found.seconds = time.perf_counter() - start
    return walk.found


class _Walk:
    """Executes a model node by node and quantizes the operands of anchors as it comes to them."""

    def __init__(self, model: ir.Model, assignments: Sequence[Assignment], reparameterization: Reparameterization) -> None:
        from deploycc.quant.lrp.program import Program

        self.program: Program = Program(model)
        self.reparameterization = reparameterization
        self.found = Simulation()
        simulated = [a for a in assignments if a.format.is_simulated]
        self.anchors = {name: a for a in simulated for name in a.region.anchors}
        self.maps = {_attention_map(self.program, a.region) for a in simulated if a.region.kind == "attention"}
        self.sites = self._sites()
        self.readers = {reader.node: site for site in self.sites.values() for reader in site.readers}
        self.channels: dict[ir.Node, Uniform] = {}

    def run(self, data: Dataset, batch: int, progress: Callable[[int, int], None]) -> None:
        """Execute every node once for all batches."""
        states = [self.program.feed(feeds)[0] for feeds in data.batches(batch)]
        self.found.samples = data.samples
        for position, node in enumerate(self.program.nodes):
            inputs = [[None if v is None else self.program.lookup(v, state) for v in node.inputs] for state in states]
            added: Tensor | None = None
            if node.name in self.anchors:
                inputs, added = self._quantized(node, inputs)
            for state, tensors in zip(states, inputs, strict=True):
                outputs = self.program.execute(node, tensors, differentiable=False)[1]
                for value, tensor in zip(node.outputs, outputs, strict=False):
                    state[value] = tensor if added is None else tensor + added
            if node in self.sites:
                self._calibrate_site(node, np.concatenate([state[node.outputs[0]].numpy() for state in states]))
            for value in self.program.last_reads.get(node, ()):
                for state in states:
                    state.pop(value, None)
            progress(position + 1, len(self.program.nodes))

    def _sites(self) -> dict[ir.Node, Site]:
        """Return the normalizations all of whose readers are products of fewer bits than the edges have."""
        if self.reparameterization.kind == "layer":
            return {}
        sites = {node: find_site(node) for node in self.program.nodes if node.op_type == "LayerNormalization"}
        return {node: site for node, site in sites.items() if isinstance(site, Site) and self._is_simulated(site)}

    def _is_simulated(self, site: Site) -> bool:
        if not site.is_centrable or any(reader.node.op_type == "Conv" for reader in site.readers):
            return False
        formats = {a.format if (a := self.anchors.get(reader.node.name or "")) else None for reader in site.readers}
        format = formats.pop()
        return not formats and format is not None and format.bits < EDGE_BITS

    def _calibrate_site(self, node: ir.Node, values: np.ndarray) -> None:
        """Fit a quantizer per channel; where it is reparameterized, fix the rescale and the quantizer behind it."""
        site = self.sites[node]
        bits = self.anchors[site.readers[0].node.name or ""].format.bits
        before = fit_uniform(values, bits, axis=site.axis)
        after = reparameterized(before, self.reparameterization)
        self.channels[node] = after
        if self.reparameterization.kind != "channel":
            self.found.rescales[node.name or ""] = rescale_between(before, after)

    def _quantized(self, node: ir.Node, inputs: list[list[Tensor | None]]) -> tuple[list[list[Tensor | None]], Tensor | None]:
        """Return the operands of an anchor as the simulation has them, and what a reparameterization adds to the output."""
        import torch

        format, site = self.anchors[node.name or ""].format, self.readers.get(node)
        rescale = self.found.rescales.get(site.source.name or "") if site is not None else None
        columns: list[list[Tensor | None]] = [list(column) for column in zip(*inputs, strict=True)]
        for i in (0, 1):
            value, arrays = node.inputs[i], [t.numpy() for t in columns[i] if t is not None]
            if value is None:
                continue
            if is_constant(value):
                weight = arrays[0] if rescale is None else _divided(arrays[0], rescale, 1 - weight_axis(node))
                axis = weight_axis(node)
                arrays = [fit_uniform(weight, format.bits, axis=axis).apply(weight, axis=axis)] * len(arrays)
            else:
                if rescale is not None:
                    arrays = [((a - np.array(rescale.shift)) * np.array(rescale.scale)).astype(a.dtype) for a in arrays]
                quantizer = self._activation(value, format.name, arrays, site, format.bits)
                arrays = [quantizer.apply(a) for a in arrays]
            columns[i] = [torch.from_numpy(a) for a in arrays]
        added = None if rescale is None else torch.from_numpy(_shifted(node, inputs[0][1], rescale))
        return [list(row) for row in zip(*columns, strict=True)], added

    def _activation(self, value: ir.Value, format: str, arrays: list[np.ndarray], site: Site | None, bits: int) -> Quantizer:
        """Return the quantizer of an activation, fitted at its first reader in each format."""
        known = self.found.quantizers.setdefault(value.name or "", {})
        if format not in known:
            if site is not None:
                known[format] = self.channels[site.source]
            elif value in self.maps and min(float(a.min()) for a in arrays) >= 0:
                known[format] = fit_logarithmic(np.concatenate([a.reshape(-1) for a in arrays]), bits)
            else:
                known[format] = fit_uniform(np.concatenate([a.reshape(-1) for a in arrays]), bits)
        return known[format]


def _attention_map(program: Program, region: Region) -> ir.Value | None:
    """Return the first operand of an attention core's second product."""
    second = next(n for n in program.nodes if n.name == region.anchors[1])
    return second.inputs[0]


def _divided(weight: np.ndarray, rescale: Rescale, axis: int) -> np.ndarray:
    scale = np.array(rescale.scale)
    return np.asarray(weight / (scale[:, None] if axis == 0 else scale[None]), weight.dtype)


def _shifted(node: ir.Node, weight: Tensor | None, rescale: Rescale) -> np.ndarray:
    """Return W d, which the bias of the reader gains, with the weight as it was."""
    if weight is None:
        raise TypeError(f"'{node.name}' has no weight")
    array, shift = weight.numpy().astype(np.float64), np.array(rescale.shift) * float_attribute(node, "alpha", 1.0)
    return np.asarray(shift @ array if weight_axis(node) == 1 else array @ shift, np.float32)
