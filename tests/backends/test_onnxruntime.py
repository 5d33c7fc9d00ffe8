import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from backend_models import batch, conv_text, matmul_text, model_text
from onnx import parser

from deploycc.backends import onnxruntime as backend
from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.backend import BuildOptions
from deploycc.core.errors import BackendError
from deploycc.core.formats import BF16, FORMATS, FP8, MXFP8, NVFP4
from deploycc.core.target import Target

CPU = Target("onnxruntime")


def executor(text, **options):
    return OnnxRuntime().executor(ir.from_onnx_text(text), **options)


def rounded(values, fmt):
    """Return ``values`` after a Q/DQ pair of scale 1/32, computed without ONNX Runtime."""
    import ml_dtypes

    steps = np.asarray(values, np.float32) * 32
    quantized = np.clip(np.round(steps), -128, 127) if fmt == "int8" else steps.astype(ml_dtypes.float8_e4m3fn)
    return quantized.astype(np.float32) / 32


@pytest.mark.parametrize("simulate", [False, True])
@pytest.mark.parametrize("base", ["fp32", "fp16"])
@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_qdq_is_simulated_where_the_file_places_it(fmt, base, simulate):
    x = np.random.default_rng(0).uniform(-2, 2, (3, 64)).astype(np.float32 if base == "fp32" else np.float16)
    y = executor(matmul_text(base, fmt), simulate=simulate)({"x": x})["y"]
    expected = np.maximum(rounded(x, fmt) @ np.full((64, 64), 0.25, np.float32), 0)
    bound = 1e-5 if base == "fp32" else 2**-11 * np.abs(expected).max() + 1e-3
    assert np.abs(y.astype(np.float32) - expected).max() <= bound


def test_outputs_are_returned_by_name_and_can_be_chosen():
    run = executor(model_text("a = Relu(x) b = Neg(x)", inputs="float[N] x", outputs="float[N] a, float[N] b"))
    x = np.array([1.0, -2.0], np.float32)
    assert list(run({"x": x})) == ["a", "b"]
    assert list(run({"x": x}, ["b"])) == ["b"]
    assert run({"x": x}, []) == {}


def test_sessions_report_to_nobody():
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_feeds_of_a_simulation_may_keep_the_types_of_the_model():
    y = executor(matmul_text("fp16"), simulate=True)({"x": np.ones((2, 64), np.float16)})["y"]
    assert y.dtype == np.float32
    assert (y == 16).all()


def test_constants_in_one_file_stay_there(tmp_path):
    tensor = ir.tensor(np.eye(64, dtype=np.float32) * 3, name="w")
    model = with_initializer(tensor)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=1)
    loaded = ir.load(tmp_path / "m.onnx")
    y = OnnxRuntime().executor(loaded)({"x": np.ones((1, 64), np.float32)})["y"]
    assert (y == 3).all()
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_large_constants_travel_through_a_folder_that_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "INLINE_LIMIT", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = with_initializer(ir.tensor(np.eye(64, dtype=np.float32) * 3, name="w"))
    run = OnnxRuntime().executor(model)
    assert list(tmp_path.iterdir()) == []
    assert (run({"x": np.ones((1, 64), np.float32)})["y"] == 3).all()
    assert not isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def with_initializer(tensor):
    model = ir.from_onnx_text(model_text("y = MatMul(x, w)", inputs="float[N,64] x, float[64,64] w", outputs="float[N,64] y"))
    weight = model.graph.inputs.pop(1)
    weight.const_value = tensor
    model.graph.register_initializer(weight)
    return model


def test_a_node_without_a_kernel_is_named():
    with pytest.raises(BackendError, match=r"Could not find an implementation for MatMul.*Where: node 'fc' of model 'g'"):
        executor(matmul_text("bf16"))


def test_a_node_that_fails_on_a_batch_is_named():
    text = model_text("[bad] y = Reshape(x, n)", inputs="float[N] x, int64[1] n", outputs="float[M] y")
    with pytest.raises(BackendError, match=r"Where: node 'bad' of this batch"):
        executor(text)({"x": np.ones(4, np.float32), "n": np.array([3])})


def test_a_feed_that_is_missing_or_misshapen_is_an_error():
    run = executor(matmul_text("fp32"))
    with pytest.raises(BackendError, match="x"):
        run({})
    with pytest.raises(BackendError, match="64"):
        run({"x": np.ones((2, 63), np.float32)})


def test_the_engine_is_the_file_with_its_external_data(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    ir.save(
        with_initializer(ir.tensor(np.eye(64, dtype=np.float32), name="w")),
        source / "m.onnx",
        external_data="m.data",
        size_threshold_bytes=1,
    )
    engine = OnnxRuntime().build(source / "m.onnx", CPU, out=out / "onnxruntime.onnx", profiles=batch(64), options=BuildOptions())
    assert sorted(p.name for p in out.iterdir()) == ["m.data", "onnxruntime.onnx"]
    assert engine.bytes == sum(p.stat().st_size for p in out.iterdir()) > 64 * 64 * 4
    assert engine.peak_rss_mb > 10
    onnx.checker.check_model(str(engine.path))


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_a_quantized_model_builds(tmp_path, fmt):
    engine = OnnxRuntime().build(saved(conv_text("fp16", fmt), tmp_path), CPU, out=tmp_path / "e.onnx", profiles=[], options=BuildOptions())
    assert engine.path.read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_a_file_that_does_not_load_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(BackendError, match="ONNX Runtime refused the model"):
        OnnxRuntime().build(tmp_path / "m.onnx", CPU, out=tmp_path / "e.onnx", profiles=[], options=BuildOptions())
    with pytest.raises(BackendError, match="Where: node 'fc'"):
        OnnxRuntime().build(saved(matmul_text("bf16"), tmp_path), CPU, out=tmp_path / "e.onnx", profiles=[], options=BuildOptions())
    assert not (tmp_path / "e.onnx").exists()


def saved(text, folder):
    path = folder / "m.onnx"
    path.write_bytes(parser.parse_model(text).SerializeToString())
    return path


def test_every_format_runs_but_bf16_and_those_of_operators_that_are_tensorrts_own():
    cpu = OnnxRuntime()
    assert cpu.formats(CPU) == frozenset(FORMATS.values()) - {BF16, NVFP4, MXFP8}
    assert all("does not have the operators" in cpu.unsupported_reason(CPU, f) for f in (NVFP4, MXFP8))
    assert cpu.unsupported_reason(CPU, FP8) == ""
    assert "no BF16 convolution" in cpu.unsupported_reason(CPU, BF16)
    assert cpu.resolve(CPU) == CPU
    assert cpu.doctor()["available"] is True


@pytest.mark.parametrize(
    "clip", ["r = Relu(x)", "low = Constant<value = float {0}>() high = Constant<value = float {6}>() r = Clip(x, low, high)"]
)
@pytest.mark.parametrize("code", [ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN])
def test_an_activation_before_quantization_is_kept(code, clip):
    """ONNX Runtime's own optimizer drops a Relu before FP8, whose codes know negative numbers, and refuses a Clip."""
    body = f"s = Constant<value = float {{0.03125}}>() {clip} q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)"
    model = ir.from_onnx_text(model_text(body, inputs="float[N,4] x, uint8 z", outputs="float[N,4] y"))
    zero = model.graph.inputs.pop()
    zero.type, zero.const_value = ir.TensorType(code), ir.tensor(np.zeros((), code.numpy()), name="z")
    model.graph.register_initializer(zero)
    negative = np.array([[-1.0, -0.5, 0.5, 1.0]], np.float32)
    np.testing.assert_array_equal(OnnxRuntime().executor(model)({"x": negative})["y"], [[0.0, 0.0, 0.5, 1.0]])
