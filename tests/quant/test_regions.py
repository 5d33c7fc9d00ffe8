"""Regions: what TensorRT fuses shares one decision, whatever the nodes are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from small_graphs import graph, weight

from deploycc.core.identity import scope_of
from deploycc.quant.regions import partition

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.plan import Region

WIDE = "float[N,32,8,8]"
CONV = "Conv<pads=[1,1,1,1]>"


def nodes(model: ir.Model) -> list[tuple[str, ...]]:
    return [region.nodes for region in partition(model)]


def only(model: ir.Model) -> Region:
    (region,) = partition(model)
    return region


def conv_weights(*names: str) -> dict[str, np.ndarray]:
    return {name: weight(32, 32, 3, 3, seed=i) for i, name in enumerate(names)}


def renamed(model: ir.Model) -> dict[str, str]:
    """Give every node and every inner value a name that sorts the other way round; return new names by old."""
    names = {}
    for count, node in enumerate(model.graph):
        for value in node.outputs:
            if not value.is_graph_output():
                names[value.name], value.name = f"v{999 - count}", f"v{999 - count}"
        names[node.name], node.name = f"z{999 - count}", f"z{999 - count}"
    for count, value in enumerate(list(model.graph.initializers.values())):
        names[value.name], value.name = f"c{999 - count}", f"c{999 - count}"
    return {old or "": new for old, new in names.items()}


RESNET = f"""({WIDE} x) => ({WIDE} y) {{
    c1 = {CONV}(x, w1) r1 = Relu(c1) c2 = {CONV}(r1, w2) c3 = {CONV}(c2, w3)
    s = {CONV}(r1, w4) a = Add(s, c3) r2 = Relu(a) c5 = {CONV}(r2, w5) b = Add(c5, r2) y = Relu(b) }}"""

ATTENTION = """(float[N,16,64] x) => (float[N,16,64] y) {{
    ln = LayerNormalization(x, g, b)
    q0 = MatMul(ln, wq) q1 = Add(q0, bq) k0 = MatMul(ln, wk) k1 = Add(k0, bq) v0 = MatMul(ln, wv) v1 = Add(v0, bq)
    q2 = Reshape(q1, heads) k2 = Reshape(k1, heads) v2 = Reshape(v1, heads)
    q = Transpose<perm=[0,2,1,3]>(q2) k = Transpose<perm=[0,2,3,1]>(k2) v = Transpose<perm=[0,2,1,3]>(v2)
    s0 = MatMul(q, k) {between} p = Softmax<axis=-1>(s9) o = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, flat) y0 = MatMul(o2, wo) y = Add(x, y0) }}"""


def attention(between: str = "s9 = Mul(s0, scale)", heads: int = 2, width: int = 64, **more: np.ndarray) -> ir.Model:
    constants = {name: weight(width, width, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    vectors = {"g": np.ones(width, np.float32), "b": np.zeros(width, np.float32), "bq": np.zeros(width, np.float32)}
    shapes = {"heads": np.array([0, 16, heads, width // heads]), "flat": np.array([0, 16, width])}
    return graph(ATTENTION.format(between=between), scale=np.float32(0.125), **constants, **vectors, **shapes, **more)


def test_convolution_with_bias_and_activation() -> None:
    model = graph(
        f"({WIDE} x) => ({WIDE} y) {{ c = {CONV}(x, w) a = Add(c, bias) y = Relu(a) }}",
        **conv_weights("w"),
        bias=np.ones((32, 1, 1), np.float32),
    )
    region = only(model)
    assert region.nodes == ("n_c", "n_a", "n_y")
    assert (region.kind, region.anchors, region.activations, region.weights, region.residuals) == ("conv", ("n_c",), ("x",), ("w",), ())
    assert region.formats == ("int8", "fp8")
    assert region.parameters == 32 * 32 * 9
    assert region.macs == 32 * 32 * 9 * 64
    assert region.activation_elements == 2 * 32 * 64


def test_an_activation_with_two_readers_ends_the_region() -> None:
    model = graph(f"({WIDE} x) => ({WIDE} y) {{ c = {CONV}(x, w) r = Relu(c) t = Tanh(r) y = Add(r, t) }}", **conv_weights("w"))
    assert nodes(model) == [("n_c", "n_r")]


def test_a_graph_output_inside_ends_the_region() -> None:
    model = graph(f"({WIDE} x) => ({WIDE} c, {WIDE} y) {{ c = {CONV}(x, w) y = Relu(c) }}", **conv_weights("w"))
    assert nodes(model) == [("n_c",)]


class TestResidual:
    def test_the_identity_is_the_skip(self) -> None:
        """P4: the Add joins the convolution; the other operand is quantized."""
        model = graph(f"({WIDE} x) => ({WIDE} y) {{ r = Relu(x) c = {CONV}(r, w) a = Add(r, c) y = Relu(a) }}", **conv_weights("w"))
        region = only(model)
        assert region.nodes == ("n_c", "n_a", "n_y")
        assert region.residuals == ("r",)

    def test_a_graph_input_is_a_skip(self) -> None:
        model = graph(f"({WIDE} x) => ({WIDE} y) {{ c = {CONV}(x, w) y = Add(c, x) }}", **conv_weights("w"))
        assert only(model).residuals == ("x",)

    def test_of_two_convolutions_the_longer_path_is_the_main_branch(self) -> None:
        regions = {r.name: r for r in partition(graph(RESNET, **conv_weights("w1", "w2", "w3", "w4", "w5")))}
        assert regions["n_c3"].nodes == ("n_c3", "n_a", "n_r2")
        assert regions["n_c3"].residuals == ("s",)
        assert regions["n_s"].nodes == ("n_s",)
        assert regions["n_s"].residuals == ()
        assert regions["n_c5"].residuals == ("r2",)

    def test_of_two_equal_paths_neither_is(self) -> None:
        model = graph(f"({WIDE} x) => ({WIDE} y) {{ c = {CONV}(x, w) d = {CONV}(x, u) y = Add(c, d) }}", **conv_weights("w", "u"))
        assert [(r.nodes, r.residuals) for r in partition(model)] == [(("n_c",), ()), (("n_d",), ())]

    def test_a_second_skip_ends_the_region(self) -> None:
        model = graph(f"({WIDE} x, {WIDE} z) => ({WIDE} y) {{ c = {CONV}(x, w) a = Add(c, x) y = Add(a, z) }}", **conv_weights("w"))
        assert only(model).nodes == ("n_c", "n_a")

    def test_the_skip_of_a_matrix_product_stays_as_it_is(self) -> None:
        region = only(graph("(float[N,4,64] x) => (float[N,4,64] y) { m = MatMul(x, w) y = Add(x, m) }", w=weight(64, 64)))
        assert region.nodes == ("n_m", "n_y")
        assert region.residuals == ()


class TestGate:
    def test_silu_joins_its_convolution(self) -> None:
        """P11: nothing is quantized between the convolution and the product with its own sigmoid."""
        text = f"({WIDE} x) => ({WIDE} y) {{ c = {CONV}(x, w) s = Sigmoid(c) m = Mul(c, s) d = {CONV}(m, u) y = Relu(d) }}"
        assert nodes(graph(text, **conv_weights("w", "u"))) == [("n_c", "n_s", "n_m"), ("n_d", "n_y")]

    def test_silu_behind_a_bias(self) -> None:
        model = graph(
            "(float[N,64] x) => (float[N,64] y) { m = MatMul(x, w) a = Add(m, b) s = Sigmoid(a) y = Mul(s, a) }",
            w=weight(64, 64),
            b=weight(64),
        )
        assert nodes(model) == [("n_m", "n_a", "n_s", "n_y")]

    def test_the_gate_of_another_value_does_not(self) -> None:
        model = graph(f"({WIDE} x, {WIDE} z) => ({WIDE} y) {{ c = {CONV}(x, w) s = Sigmoid(c) y = Mul(z, s) }}", **conv_weights("w"))
        assert nodes(model) == [("n_c", "n_s")]


class TestAttention:
    @pytest.mark.parametrize(
        ("between", "inside"),
        [
            ("s9 = Mul(s0, scale)", ("n_s9",)),
            ("s9 = Div(s0, scale)", ("n_s9",)),
            ("s1 = Mul(s0, scale) s9 = Add(s1, mask)", ("n_s1", "n_s9")),
            ("s9 = Add(mask, s0)", ("n_s9",)),
            ("s1 = Reshape(s0, split) s2 = Add(s1, mask) s9 = Reshape(s2, back)", ("n_s1", "n_s2", "n_s9")),
        ],
    )
    def test_the_core_is_one_region(self, between: str, inside: tuple[str, ...]) -> None:
        more = {"mask": np.zeros((16, 16), np.float32), "split": np.array([-1, 1, 2, 16, 16]), "back": np.array([-1, 2, 16, 16])}
        regions = {r.kind: r for r in partition(attention(between, **more))}
        core = regions["attention"]
        assert core.nodes == ("n_s0", *inside, "n_p", "n_o")
        assert core.anchors == ("n_s0", "n_o")
        assert core.activations == ("q", "k", "p", "v")

    def test_a_scaled_query_leaves_nothing_between(self) -> None:
        model = graph(
            "(float[N,2,16,32] q, float[N,2,32,16] k, float[N,2,16,32] v) => (float[N,2,16,32] o)"
            " { s = MatMul(q, k) p = Softmax(s) d = Dropout(p) o = MatMul(d, v) }"
        )
        region = only(model)
        assert region.nodes == ("n_s", "n_p", "n_d", "n_o")
        assert region.macs == 2 * (2 * 16 * 16 * 32)
        assert region.parameters == 0

    def test_projections_of_one_value_are_one_region(self) -> None:
        """P13."""
        region = partition(attention())[0]
        assert region.anchors == ("n_q0", "n_k0", "n_v0")
        assert region.activations == ("ln",)
        assert region.nodes == ("n_q0", "n_q1", "n_k0", "n_k1", "n_v0", "n_v1")
        assert region.parameters == 3 * 64 * 64

    def test_scores_that_are_read_elsewhere_are_no_core(self) -> None:
        model = graph(
            "(float[N,2,16,32] q, float[N,2,32,16] k, float[N,2,16,32] v) => (float[N,2,16,32] o, float[N,2,16,16] s)"
            " { s = MatMul(q, k) p = Softmax(s) o = MatMul(p, v) }"
        )
        assert partition(model) == ()

    def test_a_product_with_a_constant_is_no_core(self) -> None:
        model = graph(
            "(float[N,16,64] x) => (float[N,16,32] o) { s = MatMul(x, w) p = Softmax(s) o = MatMul(p, u) }",
            w=weight(64, 32),
            u=weight(32, 32),
        )
        assert [r.kind for r in partition(model)] == ["linear", "linear"]


@pytest.mark.parametrize("make", [lambda: graph(RESNET, **conv_weights("w1", "w2", "w3", "w4", "w5")), attention])
def test_no_node_is_in_two_regions(make: object) -> None:
    members = [name for region in nodes(make()) for name in region]  # type: ignore[operator]
    assert len(members) == len(set(members))


@pytest.mark.parametrize("make", [lambda: graph(RESNET, **conv_weights("w1", "w2", "w3", "w4", "w5")), attention])
def test_names_do_not_matter(make: object) -> None:
    model = make()  # type: ignore[operator]
    before = partition(model)
    new = renamed(model)
    after = partition(model)
    for one, other in zip(before, after, strict=True):
        for field in ("anchors", "nodes", "activations", "weights", "residuals"):
            assert tuple(new.get(name, name) for name in getattr(one, field)) == getattr(other, field)
        assert (one.kind, one.formats, one.rules, one.macs) == (other.kind, other.formats, other.rules, other.macs)


class TestCrossings:
    def test_a_value_and_a_residual_come_from_regions(self) -> None:
        model = graph(RESNET, **conv_weights("w1", "w2", "w3", "w4", "w5"))
        regions = {r.nodes[-1]: r for r in partition(model)}
        by_value = {c.value: (c.producer, c.elements, c.shared) for r in regions.values() for c in r.crossings}
        first, last = partition(model)[0], partition(model)[-1]
        assert by_value["r1"] == (first.name, 32 * 8 * 8, False)
        # What the last convolution reads is also what its region adds: one value, quantized for both.
        assert [c.value for c in last.crossings] == ["r2"]
        assert not last.crossings[0].shared

    def test_elements_may_move_between(self) -> None:
        model = attention()
        core = next(r for r in partition(model) if r.kind == "attention")
        assert [(c.value, c.elements, c.shared) for c in core.crossings] == [(v, 16 * 64, False) for v in ("q1", "k1", "v1")]
        after = partition(model)[-1]
        assert [c.value for c in after.crossings] == ["o"]

    def test_other_readers_are_noticed(self) -> None:
        text = f"({WIDE} x) => ({WIDE} y, {WIDE} z) {{ c1 = {CONV}(x, w1) y = {CONV}(c1, w2) z = Sin(c1) }}"
        (crossing,) = partition(graph(text, **conv_weights("w1", "w2")))[1].crossings
        assert crossing.shared
        text = f"({WIDE} x) => ({WIDE} y) {{ c1 = {CONV}(x, w1) s = Sin(c1) y = {CONV}(s, w2) }}"
        assert [r.crossings for r in partition(graph(text, **conv_weights("w1", "w2")))] == [(), ()]

    def test_one_region_may_read_codes_and_the_whole_value(self) -> None:
        """The product behind h takes codes, the Add behind that does not."""
        text = "(float[N,16,32] x) => (float[N,16,32] y) { h = MatMul(x, w1) b = MatMul(h, w2) c = Relu(b) y = Add(c, h) }"
        first, second = partition(graph(text, w1=weight(32, 32), w2=weight(32, 32, seed=1)))
        assert [(c.value, c.producer, c.shared) for c in second.crossings] == [("h", first.name, True)]

    def test_parts_of_a_value_cross_as_one(self) -> None:
        text = """(float[N,16,32] x) => (float[N,16,32] y) {
            h = MatMul(x, w1) a, b = Split<axis=-1, num_outputs=2>(h) c = MatMul(a, w2) d = MatMul(b, w3) y = Concat<axis=-1>(c, d) }"""
        model = graph(text, w1=weight(32, 64), w2=weight(32, 16, seed=1), w3=weight(32, 16, seed=2))
        assert [[(c.value, c.shared) for c in r.crossings] for r in partition(model)] == [[], [("h", False)], [("h", False)]]


class TestWork:
    def test_does_not_depend_on_a_static_batch(self) -> None:
        counts = set()
        for batch in ("N", "1", "6"):
            shape = WIDE.replace("N", batch)
            region = only(graph(f"({shape} x) => ({shape} y) {{ c = {CONV}(x, w) y = Relu(c) }}", **conv_weights("w")))
            counts.add((region.macs, region.activation_elements))
        assert len(counts) == 1

    def test_of_a_transposed_convolution(self) -> None:
        model = graph("(float[N,8,5,5] x) => (float[N,4,10,10] y) { y = ConvTranspose<strides=[2,2]>(x, w) }", w=weight(8, 4, 2, 2))
        # Every one of the 8 x 25 inputs meets 4 x 2 x 2 weights.
        assert only(model).macs == 8 * 25 * 16

    @pytest.mark.parametrize(("op", "shape"), [("Gemm<transB=1>", (24, 64)), ("Gemm", (64, 24)), ("MatMul", (64, 24))])
    def test_of_a_matrix_product(self, op: str, shape: tuple[int, int]) -> None:
        assert only(graph(f"(float[N,64] x) => (float[N,24] y) {{ y = {op}(x, w) }}", w=weight(*shape))).macs == 64 * 24


def test_the_module_path_is_recorded() -> None:
    model = graph(f"({WIDE} x) => ({WIDE} y) {{ y = {CONV}(x, w) }}", **conv_weights("w"))
    node = model.graph[0]
    assert scope_of(node) == ""
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'stages', 'stages.0', 'conv2d']"
    assert scope_of(node) == only(model).source == "stages.0"
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "not a list"
    assert scope_of(node) == ""
