"""What every canonical pass owes, checked on random graphs; a new pass is covered as soon as its entry point exists."""

import re
from importlib.metadata import entry_points

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pass_graphs import compute, execute, graph
from random_graphs import graphs

from deploycc.core.artefact import digest_of
from deploycc.core.contract import CANONICAL, violations
from deploycc.core.passes import Pass, PassResult, run

CLASSES = {e.name: e.load() for e in entry_points(group="deploycc.passes")}
CANONICAL_PASSES = {name: cls for name, cls in CLASSES.items() if cls.phase == "canonicalize"}
BATCH = 2
# Random graphs are of opset 20. These passes rewrite ops of later opsets; their own tests compare meaning.
NEWER_OPSETS = {"decompose-attention"}

each_pass = pytest.mark.parametrize("name", CANONICAL_PASSES)
law = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def in_order() -> list[Pass]:
    """Return the passes so that each comes after those it names."""
    done: dict[str, Pass] = {}
    while len(done) < len(CANONICAL_PASSES):
        ready = [n for n, c in CANONICAL_PASSES.items() if n not in done and set(c.after) & set(CANONICAL_PASSES) <= set(done)]
        assert ready, "the passes wait for each other"
        done.update({n: CANONICAL_PASSES[n]() for n in ready})
    return list(done.values())


def prepared(name: str, model: ir.Model) -> ir.Model:
    """Run what a pass says comes before it; otherwise it would find little to do and the laws would hold for want of rewrites."""
    wanted, order = {name}, in_order()
    names = {cls: n for n, cls in CANONICAL_PASSES.items()}
    for each in reversed(order):
        if names[type(each)] in wanted:
            wanted |= set(each.after)
    return run(model, [p for p in order if names[type(p)] in wanted - {name}], contract=CANONICAL)[0]


def directly(each: Pass, model: ir.Model) -> tuple[ir.Model, PassResult]:
    """Apply a pass to a clone without the runner, which would hide what the pass does."""
    clone = model.clone()
    return clone, each(clone)


def in_float64(model: ir.Model) -> ir.Model:
    """Return the model with every float32 type and constant widened."""
    wide = ir.from_proto(ir.to_proto(model))
    for value in (*wide.graph.inputs, *wide.graph.outputs, *(v for n in wide.graph for v in n.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    for value in list(wide.graph.initializers.values()):
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float64), name=value.name)
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    for node in (*wide.graph, *(n for function in wide.functions.values() for n in function)):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.DOUBLE))
    return wide


def assert_meaning_kept(before: ir.Model, after: ir.Model, bound: float) -> None:
    """Compare with the exact result: twice the bound, because folded parameters have been rounded once more."""
    x = (np.random.default_rng(1).integers(-24, 25, (BATCH, 4, 4, 4)) / 8).astype(np.float32)
    exact = compute(in_float64(before), {"x": x.astype(np.float64)})
    limit = 2 * float(np.finfo(np.float32).eps) * bound
    for true, found in zip(exact, execute(after, {"x": x}), strict=True):
        assert true.shape == found.shape
        assert float(np.max(np.abs(true - found), initial=0.0)) <= limit


@each_pass
@law
@given(data=st.data())
def test_keeps_meaning_and_contract(name: str, data: st.DataObject) -> None:
    drawn = data.draw(graphs(toward=name))
    before = graph(drawn[0])
    after, _ = run(prepared(name, before), [CANONICAL_PASSES[name]()], contract=CANONICAL)
    assert [(v.name, v.type, v.shape) for v in after.graph.outputs] == [(v.name, v.type, v.shape) for v in before.graph.outputs]
    assert_meaning_kept(before, after, drawn[1])


@law
@given(drawn=graphs(largest=9))
def test_all_of_them_keep_meaning_and_contract(drawn: tuple[str, float]) -> None:
    before = graph(drawn[0])
    after, _ = run(before, in_order(), contract=CANONICAL)
    assert_meaning_kept(before, after, drawn[1])


@each_pass
@law
@given(data=st.data())
def test_is_honest_about_changes(name: str, data: st.DataObject) -> None:
    drawn = data.draw(graphs(toward=name))
    model = prepared(name, graph(drawn[0]))
    after, result = directly(CANONICAL_PASSES[name](), model)
    assert result.modified == (digest_of(after) != digest_of(model))
    known = {n.name for n in (*model.graph, *after.graph)}
    assert {r.anchor for r in result.rewrites} <= known
    assert {d.anchor for d in result.declines} <= known


@each_pass
@law
@given(data=st.data())
def test_is_idempotent_and_deterministic(name: str, data: st.DataObject) -> None:
    drawn = data.draw(graphs(toward=name))
    model = prepared(name, graph(drawn[0]))
    each = CANONICAL_PASSES[name]()
    (once, first), (again, second) = directly(each, model), directly(each, model)
    assert first == second
    assert digest_of(once) == digest_of(again)
    assert not directly(each, once)[1].rewrites


@law
@given(drawn=graphs(largest=9))
def test_the_pipeline_leaves_its_input_alone(drawn: tuple[str, float]) -> None:
    model = graph(drawn[0])
    text, digest = ir.to_proto(model).SerializeToString(deterministic=True), digest_of(model)
    after, _ = run(model, in_order(), contract=CANONICAL)
    assert digest_of(model) == digest
    assert ir.to_proto(model).SerializeToString(deterministic=True) == text
    assert not list(violations(after, CANONICAL))


@each_pass
@law
@given(data=st.data())
def test_explains_its_declines(name: str, data: st.DataObject) -> None:
    drawn = data.draw(graphs(toward=name))
    each = CANONICAL_PASSES[name]()
    documented = set(re.findall(r"\b[A-Z][A-Z0-9_]+(?=[:,])", (type(each).__doc__ or "").split("Declines when:")[1]))
    for decline in directly(each, prepared(name, graph(drawn[0])))[1].declines:
        assert decline.code in documented
        assert decline.reason


@pytest.mark.parametrize("name", [n for n in CANONICAL_PASSES if n not in NEWER_OPSETS])
def test_the_laws_are_not_vacuous(name: str) -> None:
    counts: list[int] = []

    @law
    @given(drawn=graphs(toward=name))
    def count(drawn: tuple[str, float]) -> None:
        counts.append(len(directly(CANONICAL_PASSES[name](), prepared(name, graph(drawn[0])))[1].rewrites))

    count()
    assert sum(c > 0 for c in counts) >= 5
