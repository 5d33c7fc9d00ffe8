"""Instruments: graphs on disk, and a comparison that sees what a pass must not do and forgives what rounding does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx
import pytest
from small_graphs import graph, operators, random, weight

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.contract import CANONICAL
from deploycc.core.passes import PassRecord, PassResult, Phase, Rewrite, run
from deploycc.core.shapes import probe_shapes, profiles_for
from deploycc.instruments import Dump, VerifyEach, executable, pass_name, random_feeds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir


@dataclass(frozen=True)
class EditGraph:
    """A pass that does what it is told."""

    edit: Callable[[ir.Model], object]
    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        self.edit(model)
        return PassResult((Rewrite(model.graph[0].name or "", "edited"),))


def convolution(padding: int = 0) -> ir.Model:
    text = f"(float[N,2,H,W] x) => (float[?,?,?,?] y) {{ c = Conv<pads=[{','.join([str(padding)] * 4)}]>(x, w) y = Relu(c) }}"
    return graph(text, w=weight(3, 2, 3, 3))


def verified(model: ir.Model, edit: Callable[[ir.Model], object], *feeds: dict[str, np.ndarray]) -> tuple[ir.Model, PassRecord]:
    """Run one edit under VerifyEach."""
    after, (record,) = run(model, [EditGraph(edit)], contract=CANONICAL, instruments=[VerifyEach(OnnxRuntime(), feeds)])
    return after, record


def scale(factor: float) -> Callable[[ir.Model], object]:
    """Return an edit that multiplies the weight."""

    def edit(model: ir.Model) -> None:
        import onnx_ir

        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor((value.const_value.numpy() * factor).astype(value.const_value.numpy().dtype), name="w")

    return edit


class TestVerifyEach:
    def test_a_wrong_rewrite_is_rolled_back(self) -> None:
        before = convolution()
        after, record = verified(before, lambda m: setattr(m.graph[1], "op_type", "Abs"), {"x": random(2, 2, 5, 5)})
        assert operators(after) == ["Conv", "Relu"]
        assert record.rewrites == ()
        assert record.rolled_back.startswith("NUMERIC: the output 'y' moves by ")
        assert record.rolled_back.endswith(" on x [2, 2, 5, 5]")

    @pytest.mark.parametrize(("factor", "kept"), [(1.0, True), (1 + 2e-7, True), (1 + 1e-3, False), (float("nan"), False)])
    def test_rounding_is_forgiven_and_nothing_more(self, factor: float, kept: bool) -> None:
        _, record = verified(convolution(), scale(factor), {"x": random(1, 2, 6, 6)})
        assert (record.rolled_back == "") == kept

    def test_another_shape(self) -> None:
        import onnx_ir

        def pad(model: ir.Model) -> None:
            model.graph[0].attributes["pads"] = onnx_ir.AttrInt64s("pads", [1, 1, 1, 1])

        assert "moves by inf" in verified(convolution(), pad, {"x": random(1, 2, 6, 6)})[1].rolled_back

    def test_a_graph_that_no_longer_runs(self) -> None:
        _, record = verified(convolution(), lambda m: setattr(m.graph[1], "op_type", "Rleu"), {"x": random(1, 2, 6, 6)})
        assert record.rolled_back.startswith("NUMERIC: the graph no longer runs: ONNX Runtime refused the model: ")

    def test_every_batch_counts(self) -> None:
        """Relu and Identity agree where nothing is negative."""
        model = graph("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
        positive = {"x": np.abs(random(2, 4))}
        to_identity = lambda m: setattr(m.graph[0], "op_type", "Identity")  # noqa: E731
        assert verified(model, to_identity, positive)[1].rolled_back == ""
        assert verified(model, to_identity, positive, {"x": random(3, 4)})[1].rolled_back.endswith("on x [3, 4]")

    def test_integers_agree_or_do_not(self) -> None:
        model = graph("(float[N,4] x) => (int64[N] y) { y = ArgMax<axis=1, keepdims=0>(x) }")
        assert "moves by inf" in verified(model, lambda m: setattr(m.graph[0], "op_type", "ArgMin"), {"x": random(3, 4)})[1].rolled_back

    def test_half_precision_rounds_more(self) -> None:
        text = "(float16[N,4] x) => (float16[N,4] y) { h = Mul(x, w) y = Relu(h) }"
        model = graph(text, w=np.float16(1))
        _, record = verified(model, scale(1 + 1e-3), {"x": random(2, 4).astype(np.float16)})
        assert record.rolled_back == ""


class TestDump:
    def test_the_graph_before_and_after_each_pass(self, tmp_path: Path) -> None:
        rename = EditGraph(lambda m: setattr(m.graph[0], "name", "renamed"))
        run(convolution(), [rename, rename], contract=CANONICAL, instruments=[Dump(tmp_path / "dump")])
        assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == ["00-imported.onnx", "01-edit-graph.onnx", "02-edit-graph.onnx"]
        names = [onnx.load(tmp_path / "dump" / name).graph.node[0].name for name in ("00-imported.onnx", "01-edit-graph.onnx")]
        assert names == ["n_c", "renamed"]

    def test_names_are_those_of_entry_points(self) -> None:
        assert pass_name(EditGraph(print)) == "edit-graph"


class TestProbes:
    def test_odd_sizes_where_the_image_is_dynamic(self) -> None:
        inputs = convolution().graph.inputs
        profiles, _ = profiles_for(inputs, ["x=1x2x4x4:2x2x8x8:4x2x16x16"])
        corners, odd = probe_shapes(inputs, profiles)
        assert corners == [{"x": (1, 2, 4, 4)}, {"x": (4, 2, 16, 16)}]
        assert odd == [{"x": (1, 2, 5, 7)}]

    def test_one_symbol_is_one_size(self) -> None:
        inputs = graph("(float[N,S] a, float[N,S,4] b) => (float[?,?] y) { y = Relu(a) }").graph.inputs
        profiles, _ = profiles_for(inputs, ["a=1x4:2x8:4x16", "b=1x4x4:2x8x4:4x16x4"])
        assert probe_shapes(inputs, profiles)[1] == [{"a": (1, 5), "b": (1, 5, 4)}]

    def test_static_shapes_are_tried_once(self) -> None:
        inputs = graph("(float[2,4] x) => (float[2,4] y) { y = Relu(x) }").graph.inputs
        assert probe_shapes(inputs, profiles_for(inputs, [])[0]) == ([{"x": (2, 4)}], [])

    def test_random_inputs_have_the_types_of_the_model(self) -> None:
        inputs = graph("(float16[N] a, int64[N] b, bool[N] c) => (float16[?] y) { y = Relu(a) }").graph.inputs
        (feeds,) = random_feeds(inputs, [{"a": (3,), "b": (3,), "c": (3,)}], seed=0)
        assert [feeds[name].dtype for name in "abc"] == [np.float16, np.int64, np.bool_]
        assert [feeds[name].shape for name in "abc"] == [(3,)] * 3

    def test_sizes_that_the_model_cannot_take_are_left_out(self) -> None:
        model = graph("(float[N,4] x) => (float[?,2,2] y) { y = Reshape(x, s) }", s=np.array([-1, 2, 2]))
        feeds = [{"x": random(2, 4)}, {"x": random(2, 3)}]
        assert executable(OnnxRuntime().executor(model), feeds) == feeds[:1]
