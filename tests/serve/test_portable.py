"""The portable form computes what the model computes, in FP32 and in an opset of old runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import check, compute, graph, operators, random, weight

from deploycc.core.errors import BackendError
from deploycc.interop import load_model
from deploycc.serve.opset import NoOlderForm, lower_opset
from deploycc.serve.portable import OPSET, widened, write_portable

if TYPE_CHECKING:
    from pathlib import Path

SCALE, ZERO = np.array(0.05, np.float32), np.array(0, np.int8)


def codes(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(-127, 128, shape).astype(np.int8)


class TestWidened:
    def test_pairs_on_activations_go_and_weights_keep_their_value(self) -> None:
        before = graph(
            "(float[N,4] x) => (float[N,3] y) "
            "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) w = DequantizeLinear<axis=1>(c, t, u) y = MatMul(d, w) }",
            s=SCALE, z=ZERO, c=codes(4, 3), t=np.array([0.1, 0.2, 0.4], np.float32), u=np.zeros(3, np.int8),
        )  # fmt: skip
        after = widened(before)
        assert operators(after) == ["MatMul"]
        (decoded,) = (v.const_value.numpy() for v in after.graph.initializers.values() if v.const_value.dtype == ir.DataType.FLOAT)
        np.testing.assert_array_equal(decoded, codes(4, 3) * np.array([0.1, 0.2, 0.4], np.float32))

    def test_16_bit_types_become_fp32(self) -> None:
        before = graph(
            "(float[N,4] x) => (float[N,3] y) { h = Cast<to=10>(x) m = MatMul(h, w) a = Add(m, b) y = Cast<to=1>(a) }",
            w=weight(4, 3).astype(np.float16), b=np.ones(3, np.float16),
        )  # fmt: skip
        after = widened(before)
        assert operators(after) == ["MatMul", "Add"]
        x = random(2, 4)
        np.testing.assert_allclose(compute(after, x=x)["y"], x @ weight(4, 3).astype(np.float16).astype(np.float32) + 1, rtol=1e-6)

    def test_the_original_stays_as_it_was(self) -> None:
        before = graph("(float[2] x) => (float[2] y) { h = Cast<to=10>(x) y = Cast<to=1>(h) }")
        widened(before)
        assert operators(before) == ["Cast", "Cast"]
        assert before.graph[0].outputs[0].dtype == ir.DataType.FLOAT16

    def test_inputs_of_16_bits_are_refused(self) -> None:
        with pytest.raises(BackendError, match=r"'x' is FLOAT16.*Fix: export the model with FP32"):
            widened(graph("(float16[2] x) => (float16[2] y) { y = Relu(x) }"))

    def test_codes_from_elsewhere_are_refused(self) -> None:
        with pytest.raises(BackendError, match="codes that no QuantizeLinear made"):
            widened(graph("(int8[2] x) => (float[2] y) { y = DequantizeLinear(x, s, z) }", s=SCALE, z=ZERO))


class TestLowerOpset:
    def test_axes_become_an_attribute(self) -> None:
        text = "(float[N,4,3] x) => (float[N,4] y) {{ y = ReduceMean<keepdims=0{}>(x{}) }}"
        model = graph(text.format("", ", a"), opset=20, a=np.array([-1], np.int64))
        x = random(2, 4, 3)
        wanted = compute(model, x=x)["y"]
        lower_opset(model, 13)
        assert model.opset_imports[""] == 13
        assert list(model.graph[0].attributes["axes"].value) == [-1]
        np.testing.assert_array_equal(compute(model, x=x)["y"], wanted)

    def test_new_attributes_at_their_default_go(self) -> None:
        model = graph("(float[2,4] x) => (float[4,2] y) { y = Reshape<allowzero=0>(x, s) }", opset=20, s=np.array([4, 2], np.int64))
        lower_opset(model, 13)
        assert not model.graph[0].attributes
        check(model)

    @pytest.mark.parametrize(
        ("text", "constants", "reason"),
        [
            ("(float[4] x) => (float[4] y) { y = Gelu(x) }", {}, "Gelu came after opset 13"),
            ("(float[2,4] x) => (float[4,2] y) { y = Reshape<allowzero=1>(x, s) }", {"s": np.array([4, 2])}, "'allowzero' of node 'n_y'"),
            ("(float[2,4] x, int64[1] a) => (float[2] y) { y = ReduceMean<keepdims=0>(x, a) }", {}, "are computed"),
        ],
    )
    def test_what_the_older_opset_cannot_say_is_refused(self, text: str, constants: dict[str, np.ndarray], reason: str) -> None:
        with pytest.raises(NoOlderForm, match=reason):
            lower_opset(graph(text, opset=20, **constants), 13)


def test_a_build_has_a_portable_form_that_computes_the_same(built: Path, tmp_path: Path) -> None:
    model = load_model(built / "model.onnx").model
    assert "QuantizeLinear" in operators(model)
    assert write_portable(model, tmp_path / "portable.onnx") == ""
    portable = ir.load(tmp_path / "portable.onnx")
    check(portable)
    assert portable.opset_imports[""] == OPSET
    assert set(operators(portable)) == {"Conv", "Relu", "ReduceMean", "Gemm"}
    x = random(3, 16, 6, 6, seed=5)
    exact, quantized = compute(portable, x=x)["y"], compute(model, simulate=True, x=x)["y"]
    noise, signal = np.sum((exact - quantized) ** 2), np.sum(exact**2)
    assert 0 < noise < 1e-2 * signal  # Rounded activations make INT8's noise; weights have the same values in both.


def test_a_model_beyond_the_old_opset_keeps_its_own(tmp_path: Path) -> None:
    note = write_portable(graph("(float[4] x) => (float[4] y) { y = Gelu(x) }", opset=20), tmp_path / "p.onnx")
    assert note == "kept in opset 20: node 'n_y': Gelu came after opset 13"
    assert ir.load(tmp_path / "p.onnx").opset_imports[""] == 20
