"""What loading gives: one normal form, weights that stay where they are, and the interface of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycc.core.artefact import Stage, digest_of
from deploycc.core.contract import CANONICAL, violations
from deploycc.core.errors import UsageError
from deploycc.interop import from_graphsurgeon, load_model, save_model, to_bytes, to_graphsurgeon, to_proto

if TYPE_CHECKING:
    from pathlib import Path

WIDE = 40  # 40 x 40 weights are large enough to leave the skeleton


def dense_model(*, opset: int = 20) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {n: (rng.standard_normal((WIDE, WIDE)) / 8).astype(np.float32) for n in ("w1", "w2")}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        helper.make_node("Constant", [], ["w2"], value=numpy_helper.from_array(weights["w2"])),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    nodes[1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'head']")
    nodes[1].metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/somebody/model.py", line 3')
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDE])]
    graph = helper.make_graph(nodes, "dense", inputs, outputs, [numpy_helper.from_array(weights["w1"], "w1")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 20 else 10)


def run(model: bytes | str, **feeds: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model, options).run(None, feeds)


def written(tmp_path: Path, model: onnx.ModelProto | str, **save: object) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(model) if isinstance(model, str) else model, path, **save)
    return path


X = np.random.default_rng(1).standard_normal((3, WIDE)).astype(np.float32)


class TestLoading:
    def test_gives_the_normal_form(self, tmp_path: Path) -> None:
        before = dense_model()
        artefact = load_model(written(tmp_path, before))
        graph = artefact.model.graph
        assert artefact.stage is Stage.IMPORTED
        assert artefact.parent is None
        assert list(violations(artefact.model, CANONICAL)) == []
        assert [n.name for n in graph] == ["MatMul_0", "act", "MatMul_1"]
        assert sorted(graph.initializers) == ["w1", "w2"]
        assert [(v.name, str(v.shape)) for v in (*graph.inputs, *graph.outputs)] == [("x", "[batch,40]"), ("y", "[batch,40]")]
        assert str(graph[0].outputs[0].shape) == "[batch,40]"
        np.testing.assert_array_equal(run(to_bytes(artefact.model), x=X)[0], run(before.SerializeToString(), x=X)[0])

    def test_keeps_scopes_through_a_version_conversion(self, tmp_path: Path) -> None:
        model = load_model(written(tmp_path, dense_model(opset=13))).model
        assert model.graph.node("act").metadata_props["pkg.torch.onnx.name_scopes"] == "['', 'head']"
        assert str(model.graph.outputs[0].shape) == "[batch,40]"

    def test_the_first_bearer_keeps_a_name(self, tmp_path: Path) -> None:
        proto = dense_model()
        proto.graph.node[3].name = "act"
        assert [n.name for n in load_model(written(tmp_path, proto)).model.graph] == ["MatMul_0", "act", "act_0"]

    def test_same_file_same_digest(self, tmp_path: Path) -> None:
        path = written(tmp_path, dense_model(opset=12))
        assert load_model(path).digest == load_model(path).digest

    def test_weights_stay_in_external_data(self, tmp_path: Path) -> None:
        before = dense_model()
        expected = run(before.SerializeToString(), x=X)[0]
        path = written(tmp_path, before, save_as_external_data=True, location="w.bin", size_threshold=0, convert_attribute=True)
        model = load_model(path).model
        assert all(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())
        np.testing.assert_array_equal(run(to_bytes(model), x=X)[0], expected)
        assert all(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())

    def test_sorts_nodes(self, tmp_path: Path) -> None:
        proto = dense_model()
        shuffled = [proto.graph.node[i] for i in (3, 1, 0, 2)]
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in shuffled]
        del proto.graph.node[:]
        proto.graph.node.extend(copies)
        path = tmp_path / "m.onnx"
        path.write_bytes(proto.SerializeToString())
        assert [n.op_type for n in load_model(path).model.graph] == ["MatMul", "Relu", "MatMul"]

    def test_initializers_that_are_inputs_become_constants(self, tmp_path: Path) -> None:
        proto = dense_model(opset=11)
        proto.ir_version = 3
        proto.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [WIDE, WIDE]))
        assert [v.name for v in load_model(written(tmp_path, proto)).model.graph.inputs] == ["x"]

    def test_constants_of_branches_stay_readable(self, tmp_path: Path) -> None:
        weight = numpy_helper.from_array(np.eye(WIDE, dtype=np.float32), "inner")
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("t", "e")]
        then = helper.make_graph([helper.make_node("MatMul", ["x", "inner"], ["t"])], "then", [], info[:1], [weight])
        other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "else", [], info[1:])
        graph = helper.make_graph(
            [helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, WIDE]), helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, WIDE])],
        )
        path = written(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
        model = load_model(path).model
        assert "inner" in model.graph.initializers
        np.testing.assert_array_equal(run(to_bytes(model), x=X, flag=np.array(True))[0], X)

    def test_group_normalization_has_a_shape(self, tmp_path: Path) -> None:
        text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[N,4,6,6] x, float[4] s, float[4] b) => (float[N,4,6,6] y) {
          n = GroupNormalization <num_groups = 2> (x, s, b)
          y = Relu (n)
        }"""
        model = load_model(written(tmp_path, text)).model
        assert [n.op_type for n in model.graph] == ["GroupNormalization", "Relu"]
        assert str(model.graph[0].outputs[0].shape) == "[N,4,6,6]"

    @pytest.mark.parametrize("wrong", ["<float[7,7] h>", ""])
    def test_declared_shapes_that_are_wrong_are_inferred(self, tmp_path: Path, wrong: str) -> None:
        output = "float[2,4] y" if wrong else "float[3,4] y"
        text = f'<ir_version: 10, opset_import: ["": 20]> g (float[2,4] x) => ({output}) {wrong} {{ h = Relu (x) y = Neg (h) }}'
        model = load_model(written(tmp_path, text)).model
        assert [str(v.shape) for n in model.graph for v in n.outputs] == ["[2,4]", "[2,4]"]

    def test_an_input_may_be_an_output(self, tmp_path: Path) -> None:
        text = '<ir_version: 8, opset_import: ["": 13]> g (float[N,4] x) => (float[N,4] y, float[N,4] x) { y = Relu (x) }'
        assert [v.name for v in load_model(written(tmp_path, text)).model.graph.outputs] == ["y", "x"]

    def test_newer_opsets_stay(self, tmp_path: Path) -> None:
        assert load_model(written(tmp_path, dense_model(opset=23))).model.graph.opset_imports[""] == 23

    def test_a_time_out_is_an_error_with_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"took longer than 0 s\. Where: '.*m\.onnx'\. Fix: ") as caught:
            load_model(written(tmp_path, dense_model()), timeout=0.01)
        assert caught.value.exit_code == 2


FUNCTIONS = """
<ir_version: 10, opset_import: ["": 20, "my": 1, "deploycc": 1]>
g (float[N,4] x) => (float[N,4] y) {
  a = my.double (x)
  b = my.double:v2 (a)
  y = deploycc.keep (b)
}
<domain: "my", opset_import: ["": 20]>
double (v) => (w) { w = Add (v, v) }
<domain: "my", overload: "v2", opset_import: ["": 20]>
double (v) => (w) { w = Neg (v) }
<domain: "deploycc", opset_import: ["": 20, "my": 1]>
keep (v) => (w) { w = Relu (v) }
"""


class TestFunctions:
    def test_are_inlined_by_overload_and_ours_are_kept(self, tmp_path: Path) -> None:
        model = load_model(written(tmp_path, FUNCTIONS)).model
        assert [n.op_type for n in model.graph] == ["Add", "Neg", "keep"]
        assert [f.name for f in model.functions.values()] == ["keep"]
        x = np.array([[1.0, -2.0, 3.0, -4.0]], np.float32)
        np.testing.assert_array_equal(run(to_bytes(model), x=x)[0], np.maximum(-2 * x, 0))

    def test_ours_survive_a_version_conversion(self, tmp_path: Path) -> None:
        model = load_model(written(tmp_path, FUNCTIONS.replace('"": 20', '"": 17'))).model
        assert model.graph.opset_imports == {"": 20, "deploycc": 1}
        assert [f.name for f in model.functions.values()] == ["keep"]
        x = np.array([[1.0, -2.0, 3.0, -4.0]], np.float32)
        np.testing.assert_array_equal(run(to_bytes(model), x=x)[0], np.maximum(-2 * x, 0))

    def test_of_another_opset_are_converted(self, tmp_path: Path) -> None:
        text = """<ir_version: 10, opset_import: ["": 20, "my": 1]>
        g (float[N,4] x) => (float[N] y) { y = my.total (x) }
        <domain: "my", opset_import: ["": 12]>
        total (v) => (w) { w = ReduceMean <axes = [1], keepdims = 0> (v) }"""
        model = load_model(written(tmp_path, text)).model
        x = np.array([[1.0, -2.0, 3.0, -4.0]], np.float32)
        np.testing.assert_allclose(run(to_bytes(model), x=x)[0], [-0.5])


class TestSaving:
    def test_same_model_same_bytes_and_no_local_path(self, tmp_path: Path) -> None:
        model = load_model(written(tmp_path, dense_model())).model
        for name in ("a", "b"):
            save_model(model, tmp_path / name / "m.onnx")
        saved = (tmp_path / "a" / "m.onnx").read_bytes()
        assert saved == (tmp_path / "b" / "m.onnx").read_bytes()
        assert b"somebody" not in saved
        assert b"['', 'head']" in saved
        assert "pkg.torch.onnx.stack_trace" in model.graph.node("act").metadata_props  # the artefact is left as it is

    def test_loading_what_was_saved_and_saving_it_again_changes_nothing(self, tmp_path: Path) -> None:
        model = load_model(written(tmp_path, dense_model(opset=14))).model
        save_model(model, tmp_path / "a.onnx")
        again = load_model(tmp_path / "a.onnx").model
        save_model(again, tmp_path / "b.onnx")
        assert digest_of(again) == digest_of(model)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

    def test_large_weights_go_to_external_data(self, tmp_path: Path) -> None:
        before = dense_model()
        model = load_model(written(tmp_path, before)).model
        save_model(model, tmp_path / "out" / "m.onnx", external_above=1000)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m.onnx", "m.onnx.data"]
        assert (tmp_path / "out" / "m.onnx").stat().st_size < 2000
        np.testing.assert_array_equal(run(str(tmp_path / "out" / "m.onnx"), x=X)[0], run(before.SerializeToString(), x=X)[0])

    def test_a_model_can_be_saved_over_its_own_external_data(self, tmp_path: Path) -> None:
        before = dense_model()
        path = tmp_path / "m.onnx"
        save_model(load_model(written(tmp_path, before)).model, path, external_above=0)
        save_model(load_model(path).model, path, external_above=0)
        np.testing.assert_array_equal(run(str(path), x=X)[0], run(before.SerializeToString(), x=X)[0])

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        model = load_model(written(tmp_path, dense_model())).model
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match=r"cannot be written .* Where: .* Fix: check permissions"):
            save_model(model, tmp_path / "file" / "m.onnx")


class TestGraphsurgeon:
    def test_round_trip_restores_what_it_drops(self, tmp_path: Path) -> None:
        model = load_model(written(tmp_path, FUNCTIONS)).model
        model.metadata_props["stride"] = "32"
        model.graph.opset_imports["trt"] = 1
        model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'a']"
        model.graph[0].outputs[0].metadata_props["origin"] = "test"
        back = from_graphsurgeon(to_graphsurgeon(model), like=model)
        assert digest_of(back) == digest_of(model)
        assert back.graph.opset_imports == model.graph.opset_imports
        assert back.metadata_props == {"stride": "32"}
        assert list(back.functions) == list(model.functions)
        assert back.graph[0].metadata_props == model.graph[0].metadata_props
        assert [(v.shape, v.type, v.metadata_props) for n in back.graph for v in n.outputs] == [
            (v.shape, v.type, v.metadata_props) for n in model.graph for v in n.outputs
        ]

    def test_an_edit_survives(self, tmp_path: Path) -> None:
        model = load_model(written(tmp_path, dense_model())).model
        graph = to_graphsurgeon(model)
        graph.nodes[1].op = "Sigmoid"
        back = from_graphsurgeon(graph, like=model)
        assert [n.op_type for n in back.graph] == ["MatMul", "Sigmoid", "MatMul"]
        assert not back.graph[1].metadata_props  # another operator: not the node the metadata spoke of
        assert [n.op_type for n in model.graph] == ["MatMul", "Relu", "MatMul"]


def test_a_proto_cannot_hold_more_than_two_gigabytes() -> None:
    shape = ir.Shape([2**29 + 1])
    tensor = ir.LazyTensor(lambda: pytest.fail("the weights were read"), dtype=ir.DataType.FLOAT, shape=shape, name="w")
    value = ir.Value(name="w", shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 20}, name="g")
    with pytest.raises(UsageError, match=r"more than the 2 GB .* Where: .* Fix: write it with save_model"):
        to_proto(ir.Model(graph, ir_version=10))
