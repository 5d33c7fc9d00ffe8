import numpy as np
import onnx
import onnx_ir as ir
from backend_models import chain_model, model_text
from onnx import parser

from deploycc.backends.modelfile import copy_model, count_nodes


def test_nodes_are_counted_in_the_graph_and_in_functions(tmp_path):
    (tmp_path / "m.onnx").write_bytes(chain_model(100))
    assert count_nodes(tmp_path / "m.onnx") == 100 + 2 + 4
    text = '<ir_version: 10, opset_import: ["": 21, "my": 1]> g (float[N] x) => (float[N] y) { y = my.f(x) } '
    text += '<opset_import: ["": 21], domain: "my"> f (a) => (b) { c = Neg(a) b = Abs(c) }'
    (tmp_path / "f.onnx").write_bytes(parser.parse_model(text).SerializeToString())
    assert count_nodes(tmp_path / "f.onnx") == 3


def test_a_damaged_file_counts_nothing(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    assert count_nodes(tmp_path / "m.onnx") == 0


def test_a_copy_brings_its_external_data_into_any_folder(tmp_path):
    model = ir.from_onnx_text(model_text("y = Add(x, w)", inputs="float[9] x, float[9] w", outputs="float[9] y"))
    weight = model.graph.inputs.pop(1)
    weight.const_value = ir.tensor(np.arange(9, dtype=np.float32), name="w")
    model.graph.register_initializer(weight)
    (tmp_path / "a" / "data").mkdir(parents=True)
    ir.save(model, tmp_path / "a" / "m.onnx", external_data="data/m.bin", size_threshold_bytes=1)
    size = copy_model(tmp_path / "a" / "m.onnx", tmp_path / "b" / "n.onnx")
    assert size == (tmp_path / "b" / "n.onnx").stat().st_size + 36
    copied = onnx.load(tmp_path / "b" / "n.onnx")
    assert (onnx.numpy_helper.to_array(copied.graph.initializer[0]) == np.arange(9)).all()


def test_a_copy_onto_itself_changes_nothing(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(chain_model(10))
    assert copy_model(path, path) == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
