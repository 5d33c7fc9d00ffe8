"""The runner: a pass is a transaction, and its evidence is what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import graph, operators

from deploycc.core.contract import CANONICAL, QUANTIZED
from deploycc.core.errors import ContractError, UsageError
from deploycc.core.passes import Decline, Pass, PassResult, Phase, Rewrite, check, run

if TYPE_CHECKING:
    from collections.abc import Callable


DONE = PassResult((Rewrite("n_h", "edited"),))


@dataclass(frozen=True)
class Edit:
    """A pass that does what it is told and says what it is told."""

    edit: Callable[[ir.Model], object]
    says: PassResult = DONE
    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        self.edit(model)
        return self.says

    def __repr__(self) -> str:
        return "Edit()"


def model() -> ir.Model:
    return graph("(float[N,4] x) => (float[N,4] y) { h = Relu(x) y = Add(h, w) }", w=np.float32(1), unused=np.float32(2))


def rename(to: str) -> Callable[[ir.Model], object]:
    def edit(each: ir.Model) -> None:
        for node in each.graph:
            node.name = to

    return edit


def test_the_given_model_stays() -> None:
    before = model()
    after, (record,) = run(before, [Edit(lambda m: setattr(m.graph[0], "op_type", "Neg"))], contract=CANONICAL)
    assert operators(before) == ["Relu", "Add"]
    assert operators(after) == ["Neg", "Add"]
    assert (record.spec, record.nodes_before, record.nodes_after, record.declines) == ("Edit()", 2, 2, ())
    assert record.rewrites == (Rewrite("n_h", "edited", "exact"),)
    assert record.seconds >= 0


def test_what_nobody_reads_goes() -> None:
    after, _ = run(model(), [Edit(lambda m: None)], contract=CANONICAL)
    assert list(after.graph.initializers) == ["w"]


def test_without_evidence_nothing_happened() -> None:
    """A pass that edits and reports no rewrite is not believed."""
    before = model()
    after, (record,) = run(
        before,
        [Edit(lambda m: setattr(m.graph[0], "op_type", "Neg"), PassResult((), (Decline("n_h", "CODE", "why"),)))],
        contract=CANONICAL,
    )
    assert after is before
    assert operators(after) == ["Relu", "Add"]
    assert record.declines == (Decline("n_h", "CODE", "why"),)
    assert not PassResult((), record.declines).modified


def test_an_unsound_result_is_rolled_back() -> None:
    before = model()
    after, (record,) = run(before, [Edit(rename("same"))], contract=CANONICAL)
    assert after is before
    assert record.rewrites == ()
    assert record.rolled_back == "the node name 'same' is used 2 times"


def test_an_instrument_may_object() -> None:
    class Doubter:
        def after(self, each: Pass, before: ir.Model, result: ir.Model) -> str:
            return f"{before.graph[0].op_type} became {result.graph[0].op_type}"

    before, edit = model(), Edit(lambda m: setattr(m.graph[0], "op_type", "Neg"))
    after, (record,) = run(before, [edit], contract=CANONICAL, instruments=[Doubter()])
    assert after is before
    assert record.rolled_back == "Relu became Neg"


def test_a_result_that_breaks_the_contract_is_refused() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    negative = graph(text, s=np.float32(-1), z=np.int8(0))
    with pytest.raises(
        ContractError, match=r"the quantized contract is broken: 'n_q' has a scale .*\. Where: the result of 0 passes\."
    ) as caught:
        run(negative, [], contract=QUANTIZED)
    assert caught.value.exit_code == 3


def test_a_crash_names_the_pass() -> None:
    def crash(_: ir.Model) -> None:
        raise KeyError("gone")

    with pytest.raises(ContractError, match=r"Edit\(\) failed with KeyError: 'gone'\. Where: a graph of 2 nodes\. Fix: report it"):
        run(model(), [Edit(crash)], contract=CANONICAL)


def test_a_deliberate_error_passes_through() -> None:
    def refuse(_: ir.Model) -> None:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        run(model(), [Edit(refuse)], contract=CANONICAL)


def test_many_violations_are_counted() -> None:
    nodes = " ".join(f"a{i} = Relu(x)" for i in range(9))
    many = graph(f"(float[N,4] x) => (float[N,4] a0) {{ {nodes} }}")
    for i, node in enumerate(many.graph):
        node.name = f"n{i // 2 if i < 8 else 3}"
    for node in many.graph:
        node.outputs[0].name = "v"
        node.replace_input_with(0, ir.Value(name="nothing"))
    with pytest.raises(ContractError, match=r"; .*; .*; .* and \d+ more\. Where: here\. Fix: this is a defect of deploycc"):
        check(many, CANONICAL, at="here")


def test_a_pass_is_recognised_by_its_shape() -> None:
    assert isinstance(Edit(lambda m: None), Pass)
    assert not isinstance(object(), Pass)
