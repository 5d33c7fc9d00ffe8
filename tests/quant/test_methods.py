"""Sensitivities: each against its formula by other means, all in shares of the measured noise, none changing the model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graphs import compute, dataset, graph, random, residual, transformer, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.errors import UsageError
from deploycc.core.formats import FP8, FP32, INT8, Format
from deploycc.core.graph import constant
from deploycc.core.placement import weight_axis
from deploycc.core.quantizers import decode, encode, quantize_weight
from deploycc.quant.calibrate import calibrate
from deploycc.quant.decide import scales_of
from deploycc.quant.lrp.local import fake_quantized
from deploycc.quant.methods import Question, check_fallback, method_named, method_names
from deploycc.quant.regions import partition
from deploycc.quant.relevance import measure_relevance
from deploycc.quant.sensitivity import measure_whole

if TYPE_CHECKING:
    from pathlib import Path


CHAIN = "(float[N,32] x) => (float[N,32] y) { a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) d = Relu(c) y = MatMul(d, w3) }"


def chain() -> ir.Model:
    return graph(CHAIN, w1=weight(32, 48, seed=1), w2=weight(48, 32, seed=2), w3=weight(32, 32, seed=3))


def question(folder: Path, model: ir.Model, formats: tuple[Format, ...] = (INT8, FP8), **arrays: np.ndarray) -> Question:
    data, regions = dataset(folder, model, **arrays), partition(model)
    values = list(dict.fromkeys(v for r in regions for v in (*r.activations, *r.residuals)))
    seen = calibrate(model, data, ranges=values, reference=OnnxRuntime())
    return Question(model, regions, formats, scales_of(seen, regions, formats, FP32, softmax=frozenset()), data, OnnxRuntime(), batch=4)


def shares(scores: dict[str, float]) -> dict[str, float]:
    total = sum(scores.values())
    return {name: value / total for name, value in scores.items()}


def quantized(asked: Question, node: ir.Node, data: np.ndarray, format: Format) -> np.ndarray:
    """Return what a product with a constant computes from quantized operands, in NumPy."""
    scale = np.float32(asked.scales[node.inputs[0].name][format.name])
    codes, scales = quantize_weight(constant(node.inputs[1]), axis=weight_axis(node), format=format, base=FP32)
    return decode(encode(data, scale, format), scale) @ decode(codes, scales, axis=weight_axis(node))


def values(model: ir.Model, x: np.ndarray, *names: str) -> list[np.ndarray]:
    """Return intermediate values by making them outputs of a clone."""
    clone = model.clone()
    found = {v.name: v for n in clone.graph for v in n.outputs} | {v.name: v for v in clone.graph.inputs}
    clone.graph.outputs.extend(found[n] for n in names if found[n] not in list(clone.graph.outputs) and n != "x")
    results = compute(clone, x=x) | {"x": x}
    return [results[name] for name in names]


def logit_gradients(asked: Question, x: np.ndarray, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradients at the output of every product of the chain, by autograd on the whole network."""
    w = {name: torch.from_numpy(constant(asked.model.graph.initializers[name])) for name in ("w1", "w2", "w3")}
    a = (torch.from_numpy(x) @ w["w1"]).requires_grad_()
    c = (a.relu() @ w["w2"]).requires_grad_()
    y = (c.relu() @ w["w3"]).requires_grad_()
    found = torch.autograd.grad([y], [a, c, y], [torch.from_numpy(seeds)])
    return dict(zip(("n_a", "n_c", "n_y"), (g.numpy() for g in found), strict=True))


# Every method


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize(("make", "shape"), [(residual, (6, 16, 6, 6)), (transformer, (6, 16, 64))])
def test_scores_are_shares_of_the_measured_noise(tmp_path: Path, name: str, make: object, shape: tuple[int, ...]) -> None:
    asked = question(tmp_path, make(), x=random(*shape))  # type: ignore[operator]
    before = ir.serde.serialize_model(asked.model).SerializeToString()
    scores = method_named(name).score(asked)
    assert set(scores.noise) == {r.name for r in asked.regions}
    for region in asked.regions:
        assert set(scores.noise[region.name]) == set(region.formats) & {"int8", "fp8"}
        assert all(np.isfinite(v) and v > 0 for v in scores.noise[region.name].values())
    assert scores.samples == 6
    assert ir.serde.serialize_model(asked.model).SerializeToString() == before
    whole = measure_whole(asked.model, asked.regions, asked.formats, asked.scales, asked.data, reference=OnnxRuntime(), batch=4)
    if name != "sqnr":
        for format in whole:
            assert sum(by.get(format, 0.0) for by in scores.noise.values()) == pytest.approx(whole[format], rel=1e-6)
    region = asked.regions[0].name
    assert scores.score(region, "int8") == scores.noise[region]["int8"]


@pytest.mark.parametrize("name", ["lrp", "fisher", "hessian", "hybrid"])
def test_sweeps_say_how_sure_they_are(tmp_path: Path, name: str) -> None:
    asked = question(tmp_path, chain(), (INT8,), x=random(12, 32))
    scores = method_named(name).score(asked)
    assert set(scores.evidence) == {r.name for r in asked.regions}
    # Relevance is ordered within kinds, and there are not three layers of a kind here.
    assert [count for count, _ in scores.agreement] == ([] if name == "lrp" else [12])
    assert scores.stability == (scores.agreement[-1][1] if scores.agreement else None)
    assert all(e.samples == 12 and e.mean > 0 and 0 < e.stderr < 2 * e.mean for e in scores.evidence.values())


def test_the_evidence_of_relevance_is_that_of_the_layers(tmp_path: Path) -> None:
    asked = question(tmp_path, transformer(), (INT8,), x=random(6, 16, 64))
    scores = method_named("lrp").score(asked)
    layers = measure_relevance(asked.model, asked.regions, asked.data).layers
    core = [layer for layer in layers if layer.kind.startswith("matmul")]
    evidence = scores.evidence[core[0].region]
    assert evidence.mean == pytest.approx((core[0].mean + core[1].mean) / 2, rel=1e-6)
    assert evidence.stderr == pytest.approx(np.hypot(core[0].stderr, core[1].stderr) / 2, rel=1e-6)


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"unknown sensitivity 'luck'.*sqnr, kl, lrp, fisher, hessian, hybrid"):
        method_named("luck")
    with pytest.raises(UsageError, match="unknown fallback 'luck'"):
        check_fallback("luck")
    check_fallback("gradient")


def test_torch_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, deploycc.pipeline; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Each by its formula


def test_divergence_by_hand(tmp_path: Path) -> None:
    """One region: the divergence of the softmax of its quantized product, as a share it is the whole noise."""
    model = graph(
        "(float[N,32] x) => (float[N,32] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }", w=weight(32, 32), v=weight(32, 32, seed=2)
    )
    x = random(6, 32)
    asked = question(tmp_path, model, (INT8,), x=x)
    nodes = {n.name: n for n in model.graph}
    b, y = values(model, x, "b", "y")
    noisy = {
        "n_a": np.maximum(quantized(asked, nodes["n_a"], x, INT8), 0) @ constant(nodes["n_y"].inputs[1]),
        "n_y": quantized(asked, nodes["n_y"], b, INT8),
    }
    p = torch.log_softmax(torch.from_numpy(y).double(), 1)
    q = {name: torch.log_softmax(torch.from_numpy(v).double(), 1) for name, v in noisy.items()}
    wanted = {name: float((p.exp() * (p - q[name])).sum()) for name in noisy}
    found = method_named("kl").score(asked).noise
    assert shares({name: found[name]["int8"] for name in wanted}) == pytest.approx(shares(wanted), rel=1e-3)


def test_divergence_of_probabilities_is_that_of_their_logits(tmp_path: Path) -> None:
    text = "(float[N,32] x) => (float[N,32] {out}) {{ a = MatMul(x, w) b = Relu(a) {last} }}"
    logits = graph(text.format(out="y", last="y = MatMul(b, v)"), w=weight(32, 32), v=weight(32, 32, seed=2))
    chances = graph(text.format(out="p", last="y = MatMul(b, v) p = Softmax(y)"), w=weight(32, 32), v=weight(32, 32, seed=2))
    one, two = (method_named("kl").score(question(tmp_path, m, (INT8,), x=random(6, 32))).noise for m in (logits, chances))
    assert shares({r: by["int8"] for r, by in one.items()}) == pytest.approx(shares({r: by["int8"] for r, by in two.items()}), rel=1e-3)


def test_fisher_by_autograd_on_the_whole_network(tmp_path: Path) -> None:
    """``E[mean g^2] E|e|^2`` with the gradient of the cross-entropy at the labels and the error at the node's output."""
    model, x, labels = chain(), random(6, 32), np.array([0, 1, 2, 3, 4, 5])
    asked = question(tmp_path, model, x=x, labels=labels)
    nodes = {n.name: n for n in model.graph}
    a, b, c, d, y = values(model, x, "a", "b", "c", "d", "y")
    seeds = (torch.softmax(torch.from_numpy(y), 1) - torch.nn.functional.one_hot(torch.from_numpy(labels), 32)).numpy()
    gradients = logit_gradients(asked, x, seeds)
    found = method_named("fisher").score(asked)
    for format in (INT8, FP8):
        energies = {
            name: float(np.sum((quantized(asked, nodes[name], data, format) - out).astype(np.float64) ** 2)) / 6
            for name, data, out in (("n_a", x, a), ("n_c", b, c), ("n_y", d, y))
            if format.name in next(r for r in asked.regions if r.name == name).formats
        }
        wanted = {name: float(np.mean(gradients[name].astype(np.float64) ** 2)) * e for name, e in energies.items()}
        assert len(wanted) >= 2
        got = {name: found.noise[name][format.name] for name in wanted}
        assert shares(got) == pytest.approx(shares(wanted), rel=1e-2)
    assert found.evidence["n_c"].mean == pytest.approx(float(np.mean(gradients["n_c"] ** 2)), rel=1e-4)


def test_hessian_is_the_trace_of_the_gauss_newton_matrix(tmp_path: Path) -> None:
    """Against the exact trace ``tr(J^T (diag(p) - p p^T) J)``, over enough samples for one probe each."""
    model, x = chain(), np.repeat(random(1, 32), 600, axis=0)
    asked = question(tmp_path, model, (INT8,), x=x)
    (y,) = values(model, x[:1], "y")
    p = torch.softmax(torch.from_numpy(y[0]).double(), 0)
    jacobian = np.stack([logit_gradients(asked, x[:1], np.eye(32, dtype=np.float32)[k : k + 1])["n_c"][0] for k in range(32)])
    exact = np.trace(jacobian.T @ (torch.diag(p) - torch.outer(p, p)).numpy() @ jacobian) / jacobian.shape[1]
    evidence = method_named("hessian").score(asked).evidence["n_c"]
    assert abs(evidence.mean - exact) < 4 * evidence.stderr
    assert evidence.stderr < 0.05 * exact


def test_lrp_is_relevance_times_the_ratio_of_noise(tmp_path: Path) -> None:
    model, x = chain(), random(6, 32)
    asked = question(tmp_path, model, (INT8,), x=x)
    nodes = {n.name: n for n in model.graph}
    a, b, c, d, y = values(model, x, "a", "b", "c", "d", "y")
    relevance = measure_relevance(model, asked.regions, asked.data)
    wanted = {}
    for name, data, out in (("n_a", x, a), ("n_c", b, c), ("n_y", d, y)):
        error = quantized(asked, nodes[name], data, INT8) - out
        wanted[name] = relevance.of(name) * float(np.sum(error.astype(np.float64) ** 2) / np.sum(out.astype(np.float64) ** 2))
    found = {name: method_named("lrp").score(asked).noise[name]["int8"] for name in wanted}
    assert shares(found) == pytest.approx(shares(wanted), rel=1e-2)


def test_the_skip_counts(tmp_path: Path) -> None:
    """P4 quantizes the other operand of the residual Add: a coarser scale there raises the score of its region only."""
    model = residual()
    asked = question(tmp_path, model, (INT8,), x=random(6, 16, 6, 6))
    region = next(r for r in asked.regions if r.residuals)
    coarse = {**asked.scales, region.residuals[0]: {"int8": asked.scales[region.residuals[0]]["int8"] * 16}}
    for name in ("lrp", "fisher", "hessian"):
        both = (method_named(name).score(q).noise for q in (asked, replace(asked, scales=coarse)))
        plain, worse = (shares({r: by["int8"] for r, by in noise.items()}) for noise in both)
        assert worse[region.name] > 1.2 * plain[region.name]


def test_hybrid_is_the_curvature_along_the_error(tmp_path: Path) -> None:
    """Against the exact ``e^T J^T (diag(p) - p p^T) J e``, which is twice the divergence when the error is small."""
    model, x = chain(), np.repeat(random(1, 32), 600, axis=0)
    asked = question(tmp_path, model, (INT8,), x=x)
    nodes = {n.name: n for n in model.graph}
    a, b, c, d, y = (v[:1] for v in values(model, x, "a", "b", "c", "d", "y"))
    p = torch.softmax(torch.from_numpy(y[0]).double(), 0)
    curvature = (torch.diag(p) - torch.outer(p, p)).numpy()
    jacobians = [logit_gradients(asked, x[:1], np.eye(32, dtype=np.float32)[k : k + 1]) for k in range(32)]
    evidence = method_named("hybrid").score(asked).evidence
    for name, data, out in (("n_a", x[:1], a), ("n_c", b, c), ("n_y", d, y)):
        moved = np.stack([j[name][0] for j in jacobians]) @ (quantized(asked, nodes[name], data, INT8) - out)[0]
        exact = float(moved @ curvature @ moved)
        assert abs(evidence[name].mean - exact) < 4 * evidence[name].stderr
        assert evidence[name].stderr < 0.1 * exact
    kl, hybrid = (shares({r: by["int8"] for r, by in method_named(n).score(asked).noise.items()}) for n in ("kl", "hybrid"))
    assert hybrid == pytest.approx(kl, rel=0.3)


@pytest.mark.parametrize("format", [INT8, FP8])
def test_quantization_in_torch_is_that_of_the_compiler(format: Format) -> None:
    x, scale = np.concatenate([random(2000) * 3, [0.0, 1e6, -1e6, 0.5 * 0.02, 1.5 * 0.02]]).astype(np.float32), np.float32(0.02)
    np.testing.assert_array_equal(
        fake_quantized(torch.from_numpy(x), float(scale), format).numpy(), decode(encode(x, scale, format), scale)
    )


def test_a_model_without_gradients_is_refused(tmp_path: Path) -> None:
    model = graph(
        "(float[N,32] x) => (int64[2,K] y) { m = MatMul(x, w) g = Greater(m, t) y = NonZero(g) }", w=weight(32, 32), t=np.float32(0)
    )
    with pytest.raises(UsageError, match="no output of the model is a floating-point tensor"):
        method_named("lrp").score(question(tmp_path, model, (INT8,), x=random(4, 32)))


def test_the_progress_reaches_the_end(tmp_path: Path) -> None:
    asked = question(tmp_path, chain(), (INT8,), x=random(6, 32))
    for name in method_names():
        steps: list[tuple[int, int]] = []
        method_named(name).score(replace(asked, progress=lambda done, total, steps=steps: steps.append((done, total))))
        assert steps[-1][0] == steps[-1][1], name
