"""The skip rules, one test each: which formats a region may use, and the rule that took one away."""

from __future__ import annotations

import numpy as np
import pytest
from small_graphs import graph, weight

from deploycc.core.formats import FP8, INT4, INT8
from deploycc.core.rules import RULES
from deploycc.quant.allocate import pays
from deploycc.quant.regions import partition


def conv(out: int, per_group: int, kernel: tuple[int, ...], group: int = 1) -> tuple[tuple[str, ...], tuple[str, ...]]:
    channels, size = per_group * group, ",".join("9" for _ in kernel)
    model = graph(f"(float[N,{channels},{size}] x) => (float y) {{ y = Conv<group={group}>(x, w) }}", w=weight(out, per_group, *kernel))
    (region,) = partition(model)
    return region.formats, region.rules


def linear(k: int, n: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    (region,) = partition(graph(f"(float[N,{k}] x) => (float[N,{n}] y) {{ m = MatMul(x, w) y = Relu(m) }}", w=weight(k, n)))
    return region.formats, region.rules


def attention(sequence: int, head: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    shapes = f"float[N,2,{sequence},{head}] q, float[N,2,{head},{sequence}] k, float[N,2,{sequence},{head}] v"
    (region,) = partition(graph(f"({shapes}) => (float o) {{ s = MatMul(q, k) p = Softmax(s) o = MatMul(p, v) }}"))
    return region.formats, region.rules


BOTH = ("int8", "fp8")
BLOCKED = ("int4", "nvfp4", "mxfp8")


class TestS1:
    @pytest.mark.parametrize(("k", "n"), [(15, 64), (64, 15), (64, 1)])
    def test_small_products_are_left_alone(self, k: int, n: int) -> None:
        assert linear(k, n) == ((), ("S1",))

    def test_sixteen_is_enough(self) -> None:
        assert linear(16, 16) == (BOTH, ("R6",))

    @pytest.mark.parametrize(
        ("rows", "batch", "narrow"),
        [("1,1", 0, True), ("1,15", 32, True), ("1,16", 0, False), ("B", 0, False), ("B", 15, True), ("B", 16, False), ("B,2", 8, False),
         ("B,T", 1, False), ("?,?", 3, False)],
    )  # fmt: skip
    def test_few_rows_only_wait_for_their_weight(self, rows: str, batch: int, narrow: bool) -> None:
        model = graph(f"(float[{rows},64] x) => (float[{rows},64] y) {{ y = MatMul(x, w) }}", w=weight(64, 64))
        (region,) = partition(model, batch=batch)
        assert (region.formats, region.rules) == ((*BOTH, *BLOCKED), ("S1",) if narrow else ())
        assert [pays(region, f) for f in (INT8, FP8, INT4)] == [not narrow, not narrow, True]


class TestS2:
    def test_few_channels(self) -> None:
        assert conv(8, 8, (3, 3)) == ((), ("S2", "S3"))
        assert conv(32, 12, (3, 5)) == ((), ("S2", "S3"))

    def test_a_first_layer_of_a_square_kernel_still_has_a_kernel(self) -> None:
        assert conv(32, 3, (3, 3)) == (("int8",), ("S3",))

    def test_sixteen_is_enough(self) -> None:
        assert conv(16, 16, (3, 3))[0] == ("int8",)


class TestS3:
    def test_sixteen_is_not_enough(self) -> None:
        assert conv(16, 32, (3, 3)) == (("int8",), ("S3",))
        assert conv(17, 17, (3, 3)) == (BOTH, ())

    def test_large_kernels(self) -> None:
        assert conv(32, 32, (6, 6)) == (("int8",), ("S3",))
        assert conv(32, 32, (4, 8)) == (BOTH, ())


def test_s4_a_computed_weight_makes_no_region() -> None:
    model = graph("(float[N,32,9,9] x, float[32,32,3,3] w) => (float y) { y = Conv(x, w) }")
    assert partition(model) == ()


class TestS5:
    def test_channels_of_a_group_in_fours(self) -> None:
        assert conv(36, 6, (3, 3), group=6) == ((), ("S5", "S3"))
        assert conv(32, 8, (3, 3), group=4) == (BOTH, ())

    def test_depthwise(self) -> None:
        assert conv(32, 1, (3, 3), group=32) == (("int8",), ("S3",))
        assert conv(32, 1, (1, 1), group=32) == ((), ("S5", "S3"))


class TestS6:
    def test_long_sequences(self) -> None:
        assert attention(512, 32) == (BOTH, ())
        assert attention(513, 32) == (("fp8",), ("S6",))

    def test_head_sizes(self) -> None:
        assert attention(64, 48) == (("fp8",), ("S6",))


def test_s7_head_sizes() -> None:
    assert attention(64, 8) == ((), ("S6", "S7"))
    assert attention(64, 256) == (("fp8",), ("S6",))
    assert attention(64, 264) == ((), ("S6", "S7"))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("(float[N,32,9,9] x) => (float y) { y = ConvTranspose(x, w) }", (32, 32, 2, 2)),
        ("(float[N,32,9,9,9] x) => (float y) { y = Conv(x, w) }", (32, 32, 3, 3, 3)),
    ],
)
def test_t1_what_tensorrt_computes_in_floating_point(text: str, shape: tuple[int, ...]) -> None:
    (region,) = partition(graph(text, w=weight(*shape)))
    assert (region.formats, region.rules) == ((), ("T1",))


@pytest.mark.parametrize("bias", ["", "y = Add(m, b)"])
def test_p16_the_classifier_of_a_transformer_is_not_fp8(bias: str) -> None:
    tail = f"m = MatMul(o, w) {bias}" if bias else "y = MatMul(o, w)"
    text = "(float[N,16,32] q, float[N,32,16] k) => (float y) { s = MatMul(q, k) p = Softmax(s) o = MatMul(p, q) " + tail + " }"
    model = graph(text, w=weight(32, 64), b=np.zeros(64, np.float32))
    region = next(r for r in partition(model) if r.kind == "linear")
    assert (region.formats, region.rules) == (("int8",), ("P16",))


def test_the_classifier_of_a_cnn_may_be_fp8() -> None:
    (region,) = partition(graph("(float[N,32] x) => (float y) { y = MatMul(x, w) }", w=weight(32, 64)))
    assert region.formats[:2] == BOTH


class TestR6:
    @pytest.mark.parametrize(
        ("k", "blocked"),
        [(16, ()), (32, ("nvfp4",)), (48, ("nvfp4",)), (64, ("int4", "nvfp4", "mxfp8")), (250, ()), (256, ("int4", "nvfp4", "mxfp8"))],
    )
    def test_products_over_two_whole_blocks_or_more(self, k: int, blocked: tuple[str, ...]) -> None:
        assert linear(k, 64) == ((*BOTH, *blocked), () if blocked else ("R6",))

    def test_the_longer_side_counts_that_is_summed_over(self) -> None:
        text = "(float[N,64] x) => (float y) { y = Gemm<transB=1>(x, w) }"
        (region,) = partition(graph(text, w=weight(250, 64)))
        assert region.formats == (*BOTH, "int4", "nvfp4", "mxfp8")

    def test_a_transposed_activation_has_its_blocks_elsewhere(self) -> None:
        (region,) = partition(graph("(float[64,N] x) => (float y) { y = Gemm<transA=1>(x, w) }", w=weight(64, 64)))
        assert region.formats == BOTH

    def test_convolutions_have_none(self) -> None:
        assert conv(64, 64, (3, 3))[0] == BOTH


def test_every_rule_that_is_cited_is_written_down() -> None:
    assert set(RULES) >= {"S1", "S2", "S3", "S4", "S5", "S6", "S7", "P16", "T1", "T2"}
