"""Relevance of standard networks with random weights: executed as ONNX Runtime does, conserved, every layer with a kind and a score."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from small_graphs import compute, dataset
from walked import walked

from deploycc import registry
from deploycc.core.contract import CANONICAL
from deploycc.core.passes import run
from deploycc.export import export
from deploycc.interop import load_model
from deploycc.quant.lrp.targets import chosen
from deploycc.quant.regions import partition
from deploycc.quant.relevance import measure_relevance
from deploycc.quant.roles import kinds_of

if TYPE_CHECKING:
    from pathlib import Path

BLOCKS = {"qkv": 12, "attention": 12, "proj": 12, "fc1": 12, "fc2": 12}
# Kinds of regions, and what of a node's relevance may stay with it: biases of outputs without positive contributions, constant tokens.
NETWORKS = {
    "resnet18": ({"conv": 20, "linear": 1}, {}),
    "mobilenetv3_small_100": ({"conv": 41, "depthwise": 11, "linear": 1}, {"Conv": 0.05}),
    "convnext_tiny": ({"conv": 4, "depthwise": 18, "fc1": 18, "fc2": 18, "linear": 1}, {}),
    "deit_tiny_patch16_224": ({**BLOCKS, "conv": 1, "linear": 1}, {"Concat": np.inf}),
    "swin_tiny_patch4_window7_224": ({**BLOCKS, "conv": 1, "linear": 4}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_relevance_of_a_standard_network(name: str, tmp_path: Path) -> None:
    kinds, leaks = NETWORKS[name]
    torch.manual_seed(0)
    imported = load_model(export(f"timm:{name}", tmp_path / "model.onnx")).model
    passes = [cls() for phase in ("canonicalize", "prepare") for _, cls in registry.passes(phase)]
    model, _ = run(imported, passes, contract=CANONICAL)
    (source,), (output,) = ([v.name for v in values] for values in (model.graph.inputs, model.graph.outputs))
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    wanted = compute(model, **{source: x})[output]
    found = walked(model, chosen(torch.from_numpy(wanted), None).numpy(), **{source: x})
    np.testing.assert_allclose(found.outputs[output], wanted, atol=1e-4 * np.abs(wanted).max())
    operators = {n.name: n.op_type for n in model.graph}
    for node, (arrived, passed) in found.sums.items():
        assert passed == pytest.approx(arrived, rel=max(1e-3, leaks.get(operators[node], 0.0)), abs=1e-3), node
    assert Counter(kinds_of(model, partition(model)).values()) == kinds
    scored = measure_relevance(model, partition(model), dataset(tmp_path, model, **{source: x}))
    # timm starts ResNets with zeros in the last normalization of each block, so that their branches contribute nothing.
    silent = sum(layer.mean == 0 for layer in scored.layers)
    assert silent == (16 if name == "resnet18" else 0)
    assert sum(layer.omega for layer in scored.layers) == pytest.approx(1.0)
