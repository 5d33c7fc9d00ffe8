import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from backend_models import NAMES, matmul_text, model_text

from deploycc.backends.emulation import EMULATED, emulate, uses_emulated_types
from deploycc.backends.onnxruntime import OnnxRuntime

TYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def run(text, **feeds):
    return OnnxRuntime().executor(ir.from_onnx_text(text), simulate=True)(feeds)


@pytest.mark.parametrize("base", ["bf16", "fp16"])
def test_every_result_is_rounded_as_in_the_16_bit_type(base):
    kind = TYPES[base]
    text = model_text("a = Mul(x, x) b = Add(a, x) y = Sqrt(b)", inputs=f"{NAMES[base]}[N] x", outputs=f"{NAMES[base]}[N] y")
    x = np.random.default_rng(1).uniform(0.1, 30, 1000).astype(kind)
    expected = np.sqrt((((x * x).astype(kind) + x).astype(kind)).astype(np.float32)).astype(kind)
    assert np.array_equal(run(text, x=x)["y"], expected.astype(np.float32))


def test_a_matrix_product_of_bfloat16_is_exact_up_to_the_rounding_of_its_result():
    x = np.random.default_rng(2).standard_normal((5, 64)).astype(ml_dtypes.bfloat16)
    product = x.astype(np.float64) @ np.full((64, 64), 0.25)
    y = run(matmul_text("bf16"), x=x)["y"]
    assert np.abs(y - np.maximum(product, 0)).max() <= 2**-8 * np.abs(product).max()
    assert np.array_equal(y, y.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_an_overflow_between_fp16_nodes_is_seen():
    text = model_text("a = Mul(x, x) h = Constant<value = float {0.001}>() k = Cast<to = 10>(h) y = Mul(a, k)", **FP16)
    x = np.array([300, 2], np.float16)
    assert np.isinf(run(text, x=x)["y"][0])
    native = OnnxRuntime().executor(ir.from_onnx_text(text))({"x": x})["y"]
    assert np.isfinite(native).all(), "if ONNX Runtime rounds by itself one day, FP16 needs no emulation"


FP16 = {"inputs": "float16[N] x", "outputs": "float16[N] y"}


def test_bodies_of_branches_and_functions_are_emulated():
    functions = (
        '<ir_version: 10, opset_import: ["": 21, "my": 1]> g (bfloat16[N] x, bool c) => (bfloat16[N] y) '
        "{ s = my.square(x) y = If(c) <then_branch = t () => (bfloat16[N] p) { p = Mul(s, s) }, "
        "else_branch = e () => (bfloat16[N] q) { q = Identity(s) }> } "
        '<opset_import: ["": 21], domain: "my"> square (a) => (b) { b = Mul(a, a) }'
    )
    x = np.array([1.5, 3.3], ml_dtypes.bfloat16)
    assert np.array_equal(run(functions, x=x, c=np.array(True))["y"], (x * x * (x * x)).astype(np.float32))


def test_constants_of_16_bits_are_widened_where_they_stand():
    model = ir.from_onnx_text(matmul_text("bf16"))
    weight = ir.tensor(np.full((64, 64), 0.3, ml_dtypes.bfloat16), name="k")
    model.graph.register_initializer(ir.Value(name="k", shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight))
    model.graph.node("fc").replace_input_with(1, model.graph.initializers["k"])
    copy = emulate(model)
    assert copy.graph.initializers["k"].dtype == ir.DataType.FLOAT
    assert copy.graph.initializers["k"].const_value.numpy()[0, 0] == np.float32(ml_dtypes.bfloat16(0.3))
    assert model.graph.initializers["k"].dtype == ir.DataType.BFLOAT16


def test_the_model_itself_is_left_alone_and_the_copy_computes_in_float():
    model = ir.from_onnx_text(matmul_text("bf16"))
    before = ir.to_proto(model).SerializeToString()
    copy = emulate(model)
    assert ir.to_proto(model).SerializeToString() == before
    computing = [n for n in copy.graph if n.op_type != "Cast"]
    assert not [v for n in computing for v in (*n.inputs, *n.outputs) if v is not None and v.dtype in EMULATED]
    assert [v.name for v in copy.graph.outputs] == ["y"]


def test_a_model_in_float_needs_no_emulation():
    text = model_text("y = Relu(x)", inputs="float[N] x", outputs="float[N] y")
    model = ir.from_onnx_text(text)
    assert not uses_emulated_types(model)
    assert uses_emulated_types(ir.from_onnx_text(matmul_text("fp16")))
