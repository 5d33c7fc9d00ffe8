"""Relevance of layers: conserved, independent of batches and interruptions, and the formula of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from small_graphs import dataset, graph, random, residual, transformer, weight
from walked import walked

from deploycc import registry
from deploycc.core.contract import CANONICAL
from deploycc.core.data import open_data
from deploycc.core.errors import UsageError
from deploycc.core.passes import run
from deploycc.interop import load_model
from deploycc.quant.lrp.program import Program
from deploycc.quant.lrp.scoring import batch_of
from deploycc.quant.lrp.targets import chosen, curvature_probe, explained_values, loss_gradient, seeds
from deploycc.quant.ranks import agreement_of, spearman, standard_error
from deploycc.quant.regions import partition
from deploycc.quant.relevance import Relevance, measure_relevance
from deploycc.quant.roles import kinds_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from deploycc.core.data import Dataset

EXAMPLES = Path(__file__).parents[2] / "examples" / "fashion"


def canonical(path: Path) -> ir.Model:
    passes = [cls() for phase in ("canonicalize", "prepare") for _, cls in registry.passes(phase)]
    return run(load_model(path).model, passes, contract=CANONICAL)[0]


@pytest.fixture(scope="module")
def vit() -> ir.Model:
    return canonical(EXAMPLES / "vit.onnx")


@pytest.fixture(scope="module")
def cnn() -> ir.Model:
    return canonical(EXAMPLES / "cnn.onnx")


def images(model: ir.Model, name: str = "vit.calib.npz") -> Dataset:
    return open_data(str(EXAMPLES / name), model.graph.inputs, [], seed=0)


def means(found: Relevance) -> list[float]:
    return [each.mean for each in found.layers]


# Conservation


def test_relevance_is_conserved_at_every_node_of_a_vision_transformer(vit: ir.Model) -> None:
    """To 1e-3, at every node, and from the class to the image for every sample: no constant and no bias takes any."""
    batch = next(iter(images(vit).batches(8)))
    seed = chosen(torch.from_numpy(walked(vit, **batch).outputs["logits"]), None).numpy()
    found = walked(vit, seed, **batch)
    assert len(found.sums) == len(vit.graph)
    for name, (arrived, passed) in found.sums.items():
        assert passed == pytest.approx(arrived, rel=1e-3), name
    np.testing.assert_allclose(found.relevance["image"].reshape(8, -1).sum(1), 1.0, rtol=1e-3)


def test_relevance_of_a_cnn_is_conserved_but_for_outputs_without_positive_contributions(cnn: ir.Model) -> None:
    """Those owe everything to their bias, which keeps what they had."""
    batch = next(iter(images(cnn, "cnn.calib.npz").batches(8)))
    seed = chosen(torch.from_numpy(walked(cnn, **batch).outputs["logits"]), None).numpy()
    found = walked(cnn, seed, **batch)
    for name, (arrived, passed) in found.sums.items():
        assert passed == pytest.approx(arrived, rel=1e-2 if "conv2d" in name else 1e-3, abs=1e-4), name
    np.testing.assert_allclose(found.relevance["image"].reshape(8, -1).sum(1), 1.0, rtol=1e-2)


# The score


def test_the_score_by_hand(tmp_path: Path) -> None:
    """One layer behind an activation, class 0: gradient W[:, 0] = (2, -3, 1), relevance shared among the positive contributions.

    x = (1, 1, 2): contributions (2, -3, 2), R = (1/2, 0, 1/2), gradient times R = (1, 0, 1/2), mean 1/2.
    """
    model = graph("(float[N,3] x) => (float[N,2] y) { h = Relu(x) y = MatMul(h, w) }", w=np.array([[2, 0], [-3, 0], [1, 0]], np.float32))
    data = dataset(tmp_path, model, x=np.array([[1, 1, 2]], np.float32), labels=np.array([0]))
    (layer,) = measure_relevance(model, partition(model), data).layers
    assert (layer.region, layer.kind) == ("n_y", "linear")
    assert layer.mean == pytest.approx(0.5)
    assert (layer.omega, layer.normalised) == (1.0, 1.0)
    assert np.isnan(layer.stderr)


def test_the_label_decides_which_class_is_explained(tmp_path: Path) -> None:
    model = graph("(float[N,2] x) => (float[N,2] y) { h = Relu(x) y = MatMul(h, w) }", w=np.array([[2, 0], [0, 5]], np.float32))
    x = np.array([[1, 1]], np.float32)
    predicted, labelled = (
        measure_relevance(model, partition(model), dataset(tmp_path, model, x=x, **extra)).layers[0].mean
        for extra in ({}, {"labels": np.array([0])})
    )
    assert (predicted, labelled) == (pytest.approx(2.5), pytest.approx(1.0))


def test_projections_that_share_an_input_are_one_layer(tmp_path: Path) -> None:
    """Three products score as the joint product that was split into them."""
    model = transformer()
    x = random(4, 16, 64)
    found = measure_relevance(model, partition(model), dataset(tmp_path, model, x=x))
    names = [layer.kind for layer in found.layers]
    assert names == ["qkv", "matmul1", "matmul2", "proj"]
    weights = [weight(64, 64, seed=i) for i in range(3)]
    head, vectors = "(float[N,16,64] x) => (float y) { ln = LayerNormalization(x, g)", {"g": np.ones(64, np.float32)}
    joint = graph(f"{head} y = MatMul(ln, w) }}", w=np.concatenate(weights, 1), **vectors)
    products = "a = MatMul(ln, wa) b = MatMul(ln, wb) c = MatMul(ln, wc) y = Concat<axis=2>(a, b, c)"
    apart = graph(f"{head} {products} }}", **dict(zip(("wa", "wb", "wc"), weights, strict=True)), **vectors)
    one, three = (measure_relevance(m, partition(m), dataset(tmp_path, m, x=x)) for m in (joint, apart))
    assert means(three) == pytest.approx(means(one), rel=1e-3)


def test_kinds_of_a_vision_transformer(vit: ir.Model) -> None:
    kinds = list(kinds_of(vit, partition(vit)).values())
    block = ["qkv", "attention", "proj", "fc1", "fc2"]
    assert kinds == ["conv"] * 3 + block * 4 + ["linear"]


def test_scores_add_up_and_compare_within_kinds(vit: ir.Model) -> None:
    found = measure_relevance(vit, partition(vit), images(vit).take(8))
    assert sum(layer.omega for layer in found.layers) == pytest.approx(1.0)
    for kind in {layer.kind for layer in found.layers}:
        assert np.mean([layer.normalised for layer in found.layers if layer.kind == kind]) == pytest.approx(1.0)
    # Equal maps: the normalised order is that of the paper's Omega.
    fc1 = [layer for layer in found.layers if layer.kind == "fc1"]
    assert np.allclose([f.normalised / f.omega for f in fc1], fc1[0].normalised / fc1[0].omega)
    first, second = (next(layer for layer in found.layers if layer.kind == kind) for kind in ("matmul1", "matmul2"))
    assert found.of(first.region) == pytest.approx((first.normalised + second.normalised) / 2)


# Batches, interruption, memory


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["vit", "cnn"])
@pytest.mark.usefixtures("double")
def test_the_batch_does_not_matter(name: str, request: pytest.FixtureRequest) -> None:
    """In float64, so that only rounding is left of it."""
    model: ir.Model = request.getfixturevalue(name)
    data, regions = images(model, f"{name}.calib.npz").take(7), partition(model)
    whole, single, some = (measure_relevance(model, regions, data, batch=b, stable=None) for b in (7, 1, 3))
    assert means(single) == pytest.approx(means(whole), rel=1e-6)
    assert means(some) == pytest.approx(means(whole), rel=1e-6)


def test_the_batch_changes_rounding_only(vit: ir.Model) -> None:
    """Divisions by sums near zero make it visible in single elements, not in the order of the layers."""
    data, regions = images(vit).take(7), partition(vit)
    whole, single = (measure_relevance(vit, regions, data, batch=b) for b in (7, 1))
    assert means(single) == pytest.approx(means(whole), rel=0.05)
    assert spearman(np.array(means(single)), np.array(means(whole))) == pytest.approx(1.0, abs=2e-3)


class Interruption(Exception):
    pass


def test_an_interrupted_measurement_goes_on(vit: ir.Model, tmp_path: Path) -> None:
    data, regions, kept = images(vit).take(10), partition(vit), tmp_path / "relevance.npz"
    whole = measure_relevance(vit, regions, data, batch=4)

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise Interruption

    with pytest.raises(Interruption):
        measure_relevance(vit, regions, data, batch=4, checkpoint=kept, progress=interrupt)
    steps: list[tuple[int, int]] = []
    resumed = measure_relevance(vit, regions, data, batch=3, checkpoint=kept, progress=lambda *step: steps.append(step))
    assert means(resumed) == pytest.approx(means(whole), rel=0.05)
    # Batches are counted from the first sample on: of the second one, two samples are left.
    assert steps == [(6, 10), (9, 10), (10, 10)]
    assert resumed.samples == 10
    assert [p.name for p in tmp_path.iterdir()] == ["relevance.npz"]
    again = measure_relevance(vit, regions, data, checkpoint=kept, progress=lambda *step: steps.append(step))
    assert (again.layers, len(steps)) == (resumed.layers, 3)


def test_a_checkpoint_of_another_run(vit: ir.Model, cnn: ir.Model, tmp_path: Path) -> None:
    kept = tmp_path / "relevance.npz"
    measure_relevance(vit, partition(vit), images(vit).take(2), checkpoint=kept)
    with pytest.raises(UsageError, match="the checkpoint belongs to another model or to other data"):
        measure_relevance(cnn, partition(cnn), images(cnn).take(2), checkpoint=kept)
    kept.write_text("not an archive")
    with pytest.raises(UsageError, match="the checkpoint cannot be read"):
        measure_relevance(vit, partition(vit), images(vit).take(2), checkpoint=kept)


def test_it_stops_when_the_order_is_stable(vit: ir.Model) -> None:
    """At a fixed number of samples, whatever the batch; the rows behind it are not used."""
    data, regions = images(vit).take(32), partition(vit)
    early = [measure_relevance(vit, regions, data, batch=b, stable=0.8) for b in (5, 32)]
    assert [(e.samples, e.stopped_early) for e in early] == [(24, True)] * 2
    assert means(early[0]) == pytest.approx(means(early[1]), rel=0.05)
    assert early[0].stability is not None
    assert early[0].stability >= 0.8
    assert [count for count, _ in early[0].agreement] == [16, 24]
    never = measure_relevance(vit, regions, data, stable=None)
    assert (never.samples, never.stopped_early) == (32, False)


def test_memory_bounds_the_batch(vit: ir.Model) -> None:
    program = Program(vit)
    sample = program.bytes_per_sample
    assert 2e6 < sample < 2e7
    assert batch_of(program, batch=None, memory=10 * sample) == 10
    assert batch_of(program, batch=None, memory=1) == 1
    assert batch_of(program, batch=3, memory=1) == 3


# Where it starts


def test_the_logits_before_a_final_softmax_are_explained() -> None:
    model = graph(
        "(float[N,4] x) => (int64[N] k, float[N,3] p) { y = MatMul(x, w) p = Softmax(y) k = ArgMax<axis=1,keepdims=0>(p) }", w=weight(4, 3)
    )
    assert [v.name for v in explained_values(model.graph)] == ["y"]


def test_nothing_to_explain() -> None:
    model = graph("(float[N,4] x) => (int64[N] k) { k = ArgMax<axis=1,keepdims=0>(x) }")
    with pytest.raises(UsageError, match="no output of the model is a floating-point tensor"):
        explained_values(model.graph)


def test_what_is_chosen() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 1.0]])
    assert chosen(logits, None).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert chosen(logits, np.array([2, 7])).tolist() == [[0, 0, 1], [1, 0, 0]]  # 7 is no class of this output.
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 1, 0] = 1.0
    assert chosen(maps, None).tolist() == [[[[0, 0], [0.25, 0.25]], [[0.25, 0.25], [0, 0]]]]
    masks = np.array([[[0, 1], [1, 1]]])
    assert chosen(maps, masks)[0, 1].tolist() == [[0, 0.25], [0.25, 0.25]]
    tokens = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert chosen(tokens, None).tolist() == [[[0, 0.5], [0.5, 0]]]
    saliency = torch.tensor([[[[1.0, -1.0], [2.0, -3.0]]], [[[-1.0, -1.0], [-2.0, -3.0]]]])
    assert chosen(saliency, None).tolist() == [[[[0.5, 0], [0.5, 0]]], [[[0.25, 0.25], [0.25, 0.25]]]]


def test_every_output_is_explained(tmp_path: Path) -> None:
    """Boxes and classes: each starts with half, and no layer that only one of them needs is taken for irrelevant."""
    nodes = "h = Relu(x) classes = MatMul(h, w1) boxes = MatMul(h, w2)"
    model = graph(f"(float[N,8] x) => (float[N,4] boxes, float[N,5] classes) {{ {nodes} }}", w1=weight(8, 5), w2=weight(8, 4))
    found = measure_relevance(model, partition(model), dataset(tmp_path, model, x=random(4, 8)))
    assert found.layers[0].mean > 0
    tensors = {name: torch.from_numpy(random(2, n)) for name, n in (("boxes", 1), ("classes", 5), ("more", 5))}
    first, second, third = seeds(tensors, np.array([3, 4]), chosen).values()  # type: ignore[arg-type]
    assert first.tolist() == [[pytest.approx(1 / 3)], [pytest.approx(1 / 3)]]
    assert second.argmax(1).tolist() == [3, 4]
    assert third.argmax(1).tolist() == tensors["more"].argmax(1).tolist()


def test_a_segmentation_network(tmp_path: Path) -> None:
    nodes = 'c = Conv<pads=[1,1,1,1]>(x, w1) r = Relu(c) d = Conv(r, w2) y = Resize<mode="linear">(d, , s)'
    constants = {"w1": weight(8, 3, 3, 3), "w2": weight(4, 8, 1, 1), "s": np.float32([1, 1, 2, 2])}
    model = graph(f"(float[N,3,8,8] x) => (float[N,4,16,16] y) {{ {nodes} }}", **constants)
    found = measure_relevance(model, partition(model), dataset(tmp_path, model, x=random(3, 3, 8, 8)))
    assert [layer.kind for layer in found.layers] == ["conv", "conv"]
    assert all(layer.mean > 0 for layer in found.layers)


def test_gradients_of_the_loss() -> None:
    """Cross-entropy by autograd; its curvature by many probes: ``diag(p) - p p^T``."""
    y = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)
    torch.nn.functional.cross_entropy(y, torch.tensor([1])).backward()
    assert loss_gradient(y.detach(), np.array([1]), torch.arange(1))[0].tolist() == pytest.approx(y.grad[0].tolist(), abs=1e-6)
    p = torch.softmax(y.detach()[0], 0)
    probes = curvature_probe(y.detach().expand(20000, 3), torch.arange(20000))
    np.testing.assert_allclose((probes.T @ probes / 20000).numpy(), (torch.diag(p) - torch.outer(p, p)).numpy(), atol=0.01)


# Statistics


def test_rank_correlation() -> None:
    from scipy.stats import spearmanr

    a, b = np.round(random(40) * 2), np.round(random(40, seed=2) * 2 + random(40))
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, np.ones(40)) is None
    assert spearman(a[:2], b[:2]) is None


def test_agreement_of_halves() -> None:
    """Means of the even rows (1, 2, 3), of the odd ones (3, 1, 2): ranks agree by -1/2; the rows before the last two say the opposite."""
    rows = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]] * 8 + [[-15.0, 2.0, 19.0], [3.0, -7.0, 10.0]])
    assert agreement_of(rows) == ((16, pytest.approx(1.0)), (18, pytest.approx(-0.5)))
    assert agreement_of(rows[:1]) == ()
    assert agreement_of(rows, lambda means: means[:2]) == ()


def test_standard_error() -> None:
    assert standard_error(np.array([[1.0], [3.0]])).tolist() == [1.0]


@pytest.mark.parametrize("make", [residual, transformer])
def test_the_model_is_not_changed(make: object, tmp_path: Path) -> None:
    import onnx_ir as ir

    model = make()  # type: ignore[operator]
    before = ir.serde.serialize_model(model).SerializeToString()
    shape = (2, *(int(d) for d in list(model.graph.inputs[0].shape)[1:]))
    measure_relevance(model, partition(model), dataset(tmp_path, model, x=random(*shape)))
    assert ir.serde.serialize_model(model).SerializeToString() == before
