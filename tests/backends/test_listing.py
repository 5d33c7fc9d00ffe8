import pytest
from backend_models import batch, constant_text, conv_text, matmul_text, model_text, quantize_text, scale_text

from deploycc.backends.listing import engine_version, read_listing

HEADS = "float16[N,2,64,32]"


def attention_text(fmt=None, *, bias=False):
    """Return softmax(q kT) v, with a bias table on request; with ``fmt`` its four operands and its output are quantized."""
    scores = "[qk] m = MatMul({q}, {k}) [bias] a = Add(m, table)" if bias else "[qk] a = MatMul({q}, {k})"
    head = f"{constant_text('whole', '1,2,64,64').replace('int8', 'int32')} table = Cast<to = 10>(whole)" if bias else ""
    if fmt is None:
        body, out = f"{head} {scores.format(q='q', k='k')} [softmax] p = Softmax<axis = -1>(a) [pv] y = MatMul(p, v)", "y"
    else:
        pairs = {name: quantize_text(name, fmt) for name in "qkvpo"}
        inputs = f"{scale_text('fp16')} {pairs['q']} {pairs['k']} {pairs['v']}"
        products = scores.format(q="q_dq", k="k_dq")
        core = f"{head} {products} [softmax] p = Softmax<axis = -1>(a) {pairs['p']} [pv] o = MatMul(p_dq, v_dq) {pairs['o']}"
        body, out = f"{inputs} {core}", "o_dq"
    return model_text(body, inputs=f"{HEADS} q, float16[N,2,32,64] k, {HEADS} v", outputs=f"{HEADS} {out}")


def attention_profiles():
    return [*batch(2, 64, 32, name="q"), *batch(2, 32, 64, name="k"), *batch(2, 64, 32, name="v")]


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_a_quantized_convolution_shows_its_operand_types(build, fmt):
    realised = build(conv_text("fp16", fmt), "tensorrt-rtx:sm_89+sm_120", batch(16, 14, 14)).realised
    assert realised.operands["stage_conv"] == (fmt, fmt)
    assert realised.counts[f"conv_{fmt}"] == 1
    assert "TensorRT-RTX 1.7" in realised.source
    assert realised.note == ""


@pytest.mark.parametrize(("base", "fmt", "expected"), [("fp16", "int8", "int8"), ("fp32", None, "fp32"), ("bf16", None, "bf16")])
def test_a_matrix_product_shows_its_operand_types(build, base, fmt, expected):
    realised = build(matmul_text(base, fmt), "tensorrt-rtx:sm_80", batch(64)).realised
    assert realised.operands["fc"] == (expected, expected)
    assert realised.counts[f"fc_{expected}"] == 1


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("fmt", "expected"), [(None, "fp16"), ("int8", "int8"), ("fp8", "fp8")])
def test_fused_attention_is_counted_with_its_operand_types(build, fmt, expected, bias):
    realised = build(attention_text(fmt, bias=bias), profiles=attention_profiles()).realised
    assert realised.fused_attention == 1
    assert realised.operands["qk"] == realised.operands["pv"] == (expected,) * 3


def test_a_weight_only_convolution_is_seen_to_dequantize_at_run_time(build):
    body = f"{constant_text('w_q', '32,16,3,3')} {scale_text('fp16')} [w_DQ] w_dq = DequantizeLinear(w_q, s) [c] y = Conv(x, w_dq)"
    text = model_text(body, inputs="float16[N,16,14,14] x", outputs="float16[N,32,12,12] y")
    realised = build(text, profiles=batch(16, 14, 14)).realised
    assert realised.operands["c"] == ("fp16", "fp16")
    assert realised.counts["weights_dequantised_at_run_time"] == 1


def test_a_weight_only_product_is_seen_to_dequantize_on_the_fly(build):
    body = f"{constant_text('w_q', '64,64')} {scale_text('fp16')} [w_DQ] w_dq = DequantizeLinear(w_q, s) [fc] y = MatMul(x, w_dq)"
    realised = build(model_text(body, inputs="float16[N,64] x", outputs="float16[N,64] y"), profiles=batch(64)).realised
    assert realised.operands["fc"] == ("fp16", "int8")
    assert realised.counts["fc_dequantised"] == 1


def test_a_model_without_products_says_so(build):
    realised = build(model_text("y = Sigmoid(x)", inputs="float[2,3] x", outputs="float[2,3] y")).realised
    assert realised.operands == {}
    assert "no matrix product" in realised.note


def test_no_damage_to_the_engine_raises(build):
    engine = build(conv_text("fp16", "int8"), profiles=batch(16, 14, 14)).path.read_bytes()
    for length in range(0, len(engine), 997):
        read_listing(engine[:length])
    assert read_listing(engine[:5000] + b"\xff\x00" * 500 + engine[6000:]).source


def test_an_engine_of_another_version_is_not_read(build):
    engine = build(matmul_text("fp16"), profiles=batch(64)).path.read_bytes()
    assert engine_version(engine)[:2] == (1, 7)
    newer = read_listing(engine[:24] + bytes([1, 8, 0, 0]) + engine[28:])
    assert newer.operands == {}
    assert "version found: 1.8.0.0" in newer.note
    assert "version found: none" in read_listing(b"something else").note
