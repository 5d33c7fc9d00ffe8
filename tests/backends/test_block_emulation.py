"""What the reference executes for TensorRT's operators in blocks is what the formulas give, number by number."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from deploycc.backends.block_emulation import expand_blocks, uses_blocks
from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.blocks import DOMAIN, Blocks, dynamic_quantizer, encode_blocks
from deploycc.core.formats import MXFP8, NVFP4
from deploycc.core.graph import add_initializer
from deploycc.quant.lrp.local import fake_quantized

WHOLE = 0.004


def dynamic(format, dtype="float"):
    """Return a model that quantizes ``x [N, 3, 64]`` on the fly and dequantizes it."""
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 23]> g ({dtype}[N,3,64] x) => ({dtype}[N,3,64] y) {{ y = Identity(x) }}'
    )
    graph, identity = model.graph, model.graph[0]
    kind = graph.inputs[0].dtype.numpy()
    scale = add_initializer(graph, "s", np.array(WHOLE, kind)) if format == NVFP4 else None
    nodes = dynamic_quantizer(graph.inputs[0], format=format, scale=scale)
    for i, node in enumerate(nodes):
        node.name = f"n{i}"
        for j, out in enumerate(node.outputs):
            out.name = f"n{i}_{j}"
    graph.insert_before(identity, nodes)
    identity.replace_input_with(0, nodes[-1].outputs[0])
    graph.opset_imports[DOMAIN] = 1
    return model


def expected(x, format, whole=WHOLE):
    """Return ``x`` quantized in blocks along its last axis, in NumPy with the types of ml_dtypes."""
    blocks = x.reshape(*x.shape[:-1], -1, format.block)
    limit = np.abs(blocks).max(axis=-1)
    if format == NVFP4:
        scale = np.clip(limit / np.float32(6 * np.float32(whole)), 0, 448).astype(ml_dtypes.float8_e4m3fn)
    else:
        power = np.ceil(np.log2(np.maximum(limit, 1e-30).astype(np.float64) / 448))
        scale = np.where(limit > 0, power + 127, 127).astype(np.uint8)
        whole = None
    wide = Blocks(np.ones_like(x), scale, axis=x.ndim - 1, size=format.block, whole=whole).decoded()
    codes = encode_blocks(np.divide(x, wide, out=np.zeros_like(x), where=wide > 0), format)
    return codes.astype(np.float32) * wide


def sample():
    x = np.random.default_rng(3).standard_normal((2, 3, 64)).astype(np.float32) * np.float32(3)
    x[0, 0] = 0.0
    x[1, 1, :16] = np.linspace(-6, 6, 16) * WHOLE * 448  # ties of E2M1, and a scale that is exact
    x[1, 2, 32:] = 448.0
    return x


@pytest.mark.parametrize("format", [NVFP4, MXFP8])
def test_the_reference_computes_the_formulas(format):
    x = sample()
    model = dynamic(format)
    assert uses_blocks(model)
    np.testing.assert_array_equal(OnnxRuntime().executor(model, simulate=True)({"x": x})["y"], expected(x, format))


@pytest.mark.parametrize("format", [NVFP4, MXFP8])
def test_in_16_bits_results_are_rounded_besides(format):
    x = sample().astype(np.float16).astype(np.float32)
    y = OnnxRuntime().executor(dynamic(format, "float16"), simulate=True)({"x": x})["y"]
    whole = float(np.float16(WHOLE))
    np.testing.assert_allclose(y, expected(x, format, whole), rtol=2**-9, atol=1e-6)


@pytest.mark.parametrize("format", [NVFP4, MXFP8])
def test_sensitivity_measures_with_the_same_numbers(format):
    x = sample()
    np.testing.assert_allclose(fake_quantized(torch.from_numpy(x), WHOLE, format).numpy(), expected(x, format), rtol=1e-6)


def test_a_model_without_blocks_is_left_alone():
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 20]> g (float[N] x) => (float[N] y) { y = Relu(x) }')
    assert not uses_blocks(model)


def test_expansion_holds_standard_operators_only_and_leaves_the_model():
    model = dynamic(NVFP4)
    expanded = expand_blocks(model)
    assert {n.domain for n in expanded.graph} == {""}
    assert any(n.domain == DOMAIN for n in model.graph)
