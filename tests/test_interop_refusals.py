"""Every refusal of the loader says what is wrong, where, and what to do; none is a traceback."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycc.core.errors import UsageError
from deploycc.interop import load_model
from deploycc.interop.admission import check_admissible
from deploycc.interop.damage import check_whole
from deploycc.interop.external import check_external_data
from deploycc.interop.numbers import count_non_finite
from deploycc.interop.reading import read_proto
from deploycc.interop.weights import detach

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEADER = '<ir_version: 10, opset_import: ["": 20]>'
RELU = HEADER + "g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"


def refusal(path: Path) -> str:
    """Return the text of the refusal, after checking its form."""
    with pytest.raises(UsageError) as caught:
        load_model(path)
    error = caught.value
    assert error.exit_code == 2
    assert error.what
    assert path.name in error.at, error.at
    assert error.fix
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def text_model(tmp_path: Path, text: str) -> Path:
    return proto_model(tmp_path, onnx.parser.parse_model(text))


def proto_model(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def relu() -> onnx.ModelProto:
    return onnx.parser.parse_model(RELU)


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_text("")
        text = refusal(tmp_path / "modell.onnx")
        assert "does not exist" in text
        assert "its folder holds model.onnx" in text

    def test_missing_folder(self, tmp_path: Path) -> None:
        assert "does not exist" in refusal(tmp_path / "no" / "m.onnx")

    def test_directory(self, tmp_path: Path) -> None:
        (tmp_path / "inner.onnx").write_text("")
        assert "is a directory" in (text := refusal(tmp_path))
        assert "inner.onnx" in text

    def test_unreadable(self, tmp_path: Path) -> None:
        path = proto_model(tmp_path, relu())
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user reads everything")
        assert "cannot be read" in refusal(path)

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
    def test_truncated(self, tmp_path: Path, share: float) -> None:
        weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
        proto = onnx.parser.parse_model(RELU.replace("Relu (x)", "MatMul (x, w)"))
        proto.graph.initializer.append(weight)
        data = proto.SerializeToString()
        path = tmp_path / "m.onnx"
        path.write_bytes(data[: int(len(data) * share)])
        assert "truncated" in refusal(path)

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"", "is empty"),
            (b"\x89PNG\r\n\x1a\n" + bytes(40), "looks like a PNG image"),
            (b"hello, this is no model\n", "not an ONNX model"),
            (np.random.default_rng(0).bytes(4000), "not an ONNX model"),
            (bytes(4000), "not an ONNX model"),
            (b"<!DOCTYPE html><html></html>", "HTML"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
            ((64).to_bytes(8, "little") + b'{"w": {}}' + bytes(80), "safetensors"),
            (b"\x80\x02}q\x00.", "pickle"),
            (b"ftrt" + bytes(60), "TensorRT engine"),
            (bytes(4) + b"TFL3" + bytes(60), "TensorFlow Lite"),
        ],
    )
    def test_other_files(self, tmp_path: Path, data: bytes, expected: str) -> None:
        (tmp_path / "m.onnx").write_bytes(data)
        assert expected in refusal(tmp_path / "m.onnx")

    def test_a_pytorch_checkpoint(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
            archive.writestr("m/data.pkl", b"")
        text = refusal(tmp_path / "m.pt")
        assert "looks like a PyTorch checkpoint" in text
        assert "deploycc export" in text

    def test_another_archive(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
            archive.writestr("m.onnx", b"")
        assert "ZIP archive" in refusal(tmp_path / "m.zip")

    def test_without_a_graph(self, tmp_path: Path) -> None:
        proto = onnx.ModelProto(ir_version=10, opset_import=[helper.make_opsetid("", 20)])
        assert "holds no graph" in refusal(proto_model(tmp_path, proto))

    def test_with_an_empty_graph(self, tmp_path: Path) -> None:
        proto = relu()
        del proto.graph.node[:]
        assert "has no node" in refusal(proto_model(tmp_path, proto))

    def test_without_an_input(self, tmp_path: Path) -> None:
        proto = relu()
        proto.graph.initializer.append(numpy_helper.from_array(np.ones((2, 4), np.float32), "x"))
        assert "the graph has no input" in refusal(proto_model(tmp_path, proto))

    def test_quantized_asymmetrically(self, tmp_path: Path) -> None:
        pair = "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)"
        text = HEADER + f"g (float[N,4] x) => (float[N,4] y) <float s = {{0.1}}, uint8 z = {{128}}> {{ {pair} }}"
        assert "zero point other than zero, which TensorRT has not. Where: node" in refusal(text_model(tmp_path, text))


def _duplicate_initializer(p: onnx.ModelProto) -> None:
    p.graph.initializer.extend([numpy_helper.from_array(np.ones(2, np.float32), "w")] * 2)


def _cycle(p: onnx.ModelProto) -> None:
    del p.graph.node[:]
    p.graph.node.extend([helper.make_node("Add", ["x", "b"], ["a"], name="first"), helper.make_node("Relu", ["a"], ["b"])])
    p.graph.node.append(helper.make_node("Relu", ["b"], ["y"]))


def _recursion(p: onnx.ModelProto) -> None:
    node = helper.make_node("again", ["v"], ["w"], domain="my")
    p.functions.append(helper.make_function("my", "again", ["v"], ["w"], [node], [helper.make_opsetid("my", 1)]))


def _circle(p: onnx.ModelProto) -> None:
    for name, other in (("ping", "pong"), ("pong", "ping")):
        node = helper.make_node(other, ["v"], ["w"], domain="my")
        p.functions.append(helper.make_function("my", name, ["v"], ["w"], [node], [helper.make_opsetid("my", 1)]))


def _explosion(p: onnx.ModelProto) -> None:
    for level in range(40):
        inner = [
            helper.make_node(f"f{level + 1}" if level < 39 else "Relu", ["v"], [o], domain="my" if level < 39 else "") for o in ("u", "w")
        ]
        imports = [helper.make_opsetid("my", 1), helper.make_opsetid("", 20)]
        p.functions.append(helper.make_function("my", f"f{level}", ["v"], ["w"], inner, imports))
    p.graph.node[0].op_type, p.graph.node[0].domain = "f0", "my"
    p.opset_import.append(helper.make_opsetid("my", 1))


def _sparse(p: onnx.ModelProto) -> None:
    values, indices = numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, np.int64), "i")
    p.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


class TestGraphs:
    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (_duplicate_initializer, "the initializer 'w' is defined 2 times"),
            (lambda p: p.graph.output.append(p.graph.output[0]), "the output 'y' is defined 2 times"),
            (lambda p: p.graph.input.append(p.graph.input[0]), "the input 'x' is defined 2 times"),
            (lambda p: p.graph.node.append(p.graph.node[0]), "the value 'y' is defined 2 times"),
            (lambda p: p.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "y")), "both computed and given"),
            (_cycle, "has a cycle. Where: node 'first' (Add)"),
            (_recursion, "my::again is recursive"),
            (_circle, "is recursive"),
            (_explosion, "expand to"),
            (_sparse, "sparse weights"),
            (lambda p: p.opset_import.append(helper.make_opsetid("ai.onnx", 19)), "declared twice"),
            (lambda p: p.opset_import.pop(), "declares no ONNX opset"),
            (lambda p: setattr(p.opset_import[0], "version", 6), "has opset 6"),
            (lambda p: setattr(p.opset_import[0], "version", 99), "has opset 99"),
            (lambda p: p.graph.node[0].input.append("nobody"), "not valid ONNX"),
            (lambda p: p.graph.node[0].input.__setitem__(0, "nobody"), "not valid ONNX"),
        ],
    )
    def test_unsound(self, tmp_path: Path, change: Callable[[onnx.ModelProto], object], expected: str) -> None:
        proto = relu()
        change(proto)
        assert expected in refusal(proto_model(tmp_path, proto))

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ("y = Relux (x)", "the operator Relux is not an ONNX operator"),
            ("y = com.microsoft.Gelu (x)", "the operator Gelu of domain 'com.microsoft' is unknown"),
            ("y = zzz.Relu (x)", "the operator Relu of domain 'zzz' is unknown"),
            ("y = ai.onnx.ml.Scaler (x)", "classical machine learning"),
            ("y = RMSNormalization (x, x)", "exists since opset 23, and the file says opset 20"),
            ("y = DepthToSpace <blocksize = 0> (x)", "contradict each other"),
            ("c = Concat <axis = 1> (x, x) y = MatMul (c, x)", "contradict each other"),
        ],
    )
    def test_operators(self, tmp_path: Path, body: str, expected: str) -> None:
        text = (
            RELU.replace("float[N,4]", "float[3,4]")
            .replace("y = Relu (x)", body)
            .replace('"": 20', '"": 20, "com.microsoft": 1, "zzz": 1, "ai.onnx.ml": 3')
        )
        assert expected in refusal(text_model(tmp_path, text))

    def test_operators_inside_branches(self, tmp_path: Path) -> None:
        text = HEADER + "g (bool c, float[4] x) => (float[4] y) {"
        text += "y = If (c) <then_branch = t () => (a) { a = Bad (x) }, else_branch = e () => (b) { b = Neg (x) }> }"
        assert "the unnamed Bad node that produces 'a'" in refusal(text_model(tmp_path, text))

    def test_a_node_with_a_name_is_named(self, tmp_path: Path) -> None:
        proto = relu()
        proto.graph.node[0].op_type, proto.graph.node[0].name = "Relux", "head/act"
        assert "node 'head/act' (Relux)" in refusal(proto_model(tmp_path, proto))

    def test_a_hang_of_onnx_is_an_error(self, tmp_path: Path) -> None:
        text = HEADER + "g (float[4] x) => (float[M] y) <int64 a = {0}, int64 e = {1099511627776}, int64 s = {1}>"
        text += "{ r = Range (a, e, s) c = Cast <to = 1> (r) y = Add (c, x) }"
        path = text_model(tmp_path, text)
        with pytest.raises(UsageError) as caught:
            load_model(path, timeout=3)
        assert "m.onnx" in str(caught.value)


class TestTypes:
    @pytest.mark.parametrize("kind", ["STRING", "UINT4", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "DOUBLE", "COMPLEX64"])
    def test_of_inputs(self, tmp_path: Path, kind: str) -> None:
        proto = relu()
        proto.graph.node[0].op_type = "Identity"
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.elem_type = getattr(TensorProto, kind)
        text = refusal(proto_model(tmp_path, proto))
        assert f"the input 'x' is of type {kind}" in text
        assert "cast it to one of" in text

    def test_of_outputs(self, tmp_path: Path) -> None:
        text = HEADER + "g (float[N,4] x) => (double[N,4] y) { y = Cast <to = 11> (x) }"
        assert "the output 'y' is of type DOUBLE" in refusal(text_model(tmp_path, text))

    def test_sequences(self, tmp_path: Path) -> None:
        text = HEADER + "g (seq(float[N,4]) x) => (float[M,4] y) { y = ConcatFromSequence <axis = 0> (x) }"
        assert "the input 'x' is a sequence" in refusal(text_model(tmp_path, text))

    def test_text_inside(self, tmp_path: Path) -> None:
        text = HEADER + "g (float[N,4] x) => (float[N,4] y) { t = Cast <to = 8> (x) y = Cast <to = 1> (t) }"
        assert "'t' is of type STRING" in refusal(text_model(tmp_path, text))

    def test_images_of_bytes_are_fine(self, tmp_path: Path) -> None:
        text = HEADER + "g (uint8[N,3,4,4] x) => (float[N,3,4,4] y) { y = Cast <to = 1> (x) }"
        assert load_model(text_model(tmp_path, text)).model.graph.inputs[0].dtype == ir.DataType.UINT8

    def test_quantized_models_are_fine(self, tmp_path: Path) -> None:
        text = HEADER + "g (float[N,4] x) => (float[N,4] y) <float s = {0.1}, int8 z = {0}>"
        text += "{ q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }"
        assert load_model(text_model(tmp_path, text)).model.graph.num_nodes() == 2

    def test_our_own_domains_are_fine(self, tmp_path: Path) -> None:
        text = '<ir_version: 10, opset_import: ["": 17, "trt": 1]> g (float[N,4] x) => (float[N,4] y) { h = trt.Plugin (x) y = Relu (h) }'
        assert [n.op_type for n in load_model(text_model(tmp_path, text)).model.graph] == ["Plugin", "Relu"]


class TestNumbers:
    def weighted(self, tmp_path: Path, op: str, array: np.ndarray) -> Path:
        proto = onnx.parser.parse_model(RELU.replace("Relu (x)", f"{op} (x, w)"))
        proto.graph.node[0].name = "head"
        proto.graph.initializer.append(numpy_helper.from_array(array, "w"))
        return proto_model(tmp_path, proto)

    def test_nan(self, tmp_path: Path) -> None:
        array = np.ones((4, 4), np.float32)
        array[1, 2:] = np.nan
        text = refusal(self.weighted(tmp_path, "MatMul", array))
        assert "the constant 'w' holds 2 NaN among 16 numbers" in text
        assert "'head' (MatMul)" in text

    def test_infinity_in_a_weight(self, tmp_path: Path) -> None:
        array = np.full((4, 4), np.inf, np.float32)
        text = refusal(self.weighted(tmp_path, "MatMul", array))
        assert "the weight 'w' holds 16 infinite among 16 numbers" in text

    def test_infinity_in_a_mask_is_fine(self, tmp_path: Path) -> None:
        load_model(self.weighted(tmp_path, "Add", np.full(4, -np.inf, np.float32)))

    def test_infinity_behind_a_transpose(self, tmp_path: Path) -> None:
        proto = onnx.parser.parse_model(RELU.replace("y = Relu (x)", "t = Transpose (w) y = MatMul (x, t)"))
        proto.graph.initializer.append(numpy_helper.from_array(np.full((4, 4), np.inf, np.float32), "w"))
        assert "the weight 'w' holds 16 infinite" in refusal(proto_model(tmp_path, proto))

    def test_external_data_is_read_too(self, tmp_path: Path) -> None:
        proto = onnx.load(self.weighted(tmp_path, "MatMul", np.full((4, 2000), np.nan, np.float32)))
        proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2000
        onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        assert "8000 NaN" in refusal(tmp_path / "m.onnx")

    @pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE])
    def test_every_float_type_is_counted(self, dtype: ir.DataType) -> None:
        array = np.array([0, 1, np.nan, -np.nan, np.inf, -np.inf, -np.inf, 1e-3]).astype(dtype.numpy())
        assert count_non_finite(ir.Tensor(array, dtype=dtype)) == (2, 3)


class TestExternalData:
    def model(self, tmp_path: Path, **changes: str) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        proto = onnx.parser.parse_model(RELU.replace("Relu (x)", "MatMul (x, w)"))
        proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
        onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        proto = onnx.load(folder / "m.onnx", load_external_data=False)
        tensor = proto.graph.initializer[0]
        entries = {e.key: e.value for e in tensor.external_data} | changes
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        (tmp_path / "secret").write_bytes(bytes(64))
        return folder / "m.onnx"

    def test_sound(self, tmp_path: Path) -> None:
        load_model(self.model(tmp_path))

    def test_missing(self, tmp_path: Path) -> None:
        path = self.model(tmp_path)
        (path.parent / "w.bin").unlink()
        assert "the external data is missing" in (text := refusal(path))
        assert "'w'" in text

    @pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "C:\\secret", "..\\secret", "a/../../secret", ""])
    def test_outside(self, tmp_path: Path, location: str) -> None:
        assert "must lie in the folder of the model" in refusal(self.model(tmp_path, location=location))

    def test_a_directory(self, tmp_path: Path) -> None:
        assert "is not a file" in refusal(self.model(tmp_path, location="."))

    def test_a_link_outside(self, tmp_path: Path) -> None:
        path = self.model(tmp_path)
        (path.parent / "w.bin").unlink()
        (path.parent / "w.bin").symlink_to(tmp_path / "secret")
        assert "link that leaves the folder" in refusal(path)

    def test_a_hard_link(self, tmp_path: Path) -> None:
        path = self.model(tmp_path)
        (path.parent / "w.bin").unlink()
        (path.parent / "w.bin").hardlink_to(tmp_path / "secret")
        assert "hard link" in refusal(path)

    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("offset", "32", "bytes 32 to 96"),
            ("offset", "99999999999999999999", "has 64 bytes"),
            ("offset", "-4", "is no number"),
            ("offset", "four", "is no number"),
            ("length", "12", "needs 64 bytes and its external data has 12"),
            ("length", "1e3", "is no number"),
        ],
    )
    def test_wrong_range(self, tmp_path: Path, key: str, value: str, expected: str) -> None:
        assert expected in refusal(self.model(tmp_path, **{key: value}))


def _mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Change, drop or insert a few bytes near the ends, where the structure of the file is."""
    result = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(0, 300))
        place = place if rng.random() < 0.5 else max(0, len(result) - 1 - place)
        kind = rng.random()
        if kind < 0.7:
            result[place] = rng.integers(256)
        elif kind < 0.85:
            del result[place : place + int(rng.integers(1, 6))]
        else:
            result[place:place] = rng.bytes(2)
    return bytes(result)


def test_damaged_bytes_are_refused_or_read_but_never_crash(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(11), tmp_path / "m.onnx"
    proto = onnx.parser.parse_model(RELU.replace("Relu (x)", "MatMul (x, w)"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 500), np.float32), "w"))
    whole, refused = proto.SerializeToString(), list[UsageError]()
    for _ in range(400):
        path.write_bytes(_mutated(whole, rng))
        try:
            received = read_proto(path)
            check_whole(received, path)
            check_admissible(received, path)
            check_external_data(received, path)
            detach(received, tmp_path)
        except UsageError as error:
            refused.append(error)
    assert 200 < len(refused) < 400
    assert all(error.at and error.fix for error in refused)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: setattr(t, "raw_data", t.raw_data[:-4]), "needs 8000 bytes and has 7996"),
        (lambda t: setattr(t, "data_type", 99), "unknown type 99"),
        (lambda t: t.dims.__setitem__(0, -4), "has the shape [-4, 500]"),
        (lambda t: (t.ClearField("raw_data"), t.float_data.extend([1.0] * 9)), "needs 2000 numbers and has 9"),
        (lambda t: t.segment.SetInParent(), "stored in segments"),
    ],
)
def test_broken_tensors(tmp_path: Path, change: Callable[[onnx.TensorProto], object], expected: str) -> None:
    proto = onnx.parser.parse_model(RELU.replace("Relu (x)", "MatMul (x, w)"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 500), np.float32), "w"))
    change(proto.graph.initializer[0])
    assert expected in refusal(proto_model(tmp_path, proto))


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(relu().SerializeToString().replace(b"Relu", b"\xff\xfelu"))
    assert "is not text" in refusal(path)
