"""What torch computes is what ONNX Runtime computes, operator by operator; gradients are those of finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from small_graphs import compute, graph, random, residual, transformer, weight
from walked import walked

from deploycc.core.errors import UsageError

MAP = (2, 4, 6, 7)
CASES = {
    "unary": "a = Relu(x) b = Sigmoid(a) c = Tanh(b) d = Erf(c) e = Exp(d) f = Sqrt(e) y = Log(f)",
    "more-unary": "a = Abs(x) b = Neg(a) c = Softplus(b) d = Reciprocal(c) e = Mish(d) f = Sin(e) "
    "g = Cos(f) h = Softsign(g) i = Floor(h) j = Ceil(x) k = Round(j) l = Sign(k) y = Sum(h, i, l)",
    "activations": "a = LeakyRelu<alpha=0.3>(x) b = Elu<alpha=0.7>(a) c = HardSigmoid<alpha=0.3>(b) "
    'd = HardSwish(x) e = Gelu(d) f = Gelu<approximate="tanh">(x) g = Add(c, e) y = Add(g, f)',
    "clip": "low = Constant<value_float=-0.5>() y = Clip(x, low)",
    "arithmetic": "a = Mul(x, x) b = Sub(a, x) c = Add(a, one) d = Div(b, c) e = Pow(c, half) "
    "f = Max(d, e, x) g = Min(f, one) y = Mean(g, d)",
    "where": "m = Greater(x, one) n = Not(m) o = Or(m, n) p = And(n, o) y = Where(p, x, one)",
    "prelu": "y = PRelu(x, slope)",
    "softmax": "a = Softmax<axis=1>(x) y = LogSoftmax(a)",
    "layernorm": "y = LayerNormalization<axis=-1,epsilon=0.01>(x, g7, b7)",
    "layernorm-two-axes": "y = LayerNormalization<axis=2>(x, g67)",
    "batchnorm": "y = BatchNormalization<epsilon=0.02>(x, c1, c2, c3, v4)",
    "instancenorm": "y = InstanceNormalization(x, c1, c2)",
    "groupnorm": "y = GroupNormalization<num_groups=2>(x, c1, c2)",
    "lpnorm": "y = LpNormalization<axis=1,p=1>(x)",
    "conv": "y = Conv<strides=[2,1],pads=[1,2,1,2],dilations=[1,2]>(x, w6, b6)",
    "conv-uneven-pads": "y = Conv<pads=[0,1,2,0]>(x, w6, b6)",
    "conv-same-lower": 'y = Conv<auto_pad="SAME_LOWER",strides=[2,2]>(x, w6)',
    "conv-group": "y = Conv<group=4,pads=[1,1,1,1]>(x, dw)",
    "conv-1d": "f = Reshape(x, to_1d) y = Conv<pads=[1,1]>(f, w1d, b6)",
    "conv-transpose": "y = ConvTranspose<strides=[2,2],pads=[1,0,1,1],output_padding=[1,0]>(x, wt, b6)",
    "conv-transpose-group": "y = ConvTranspose<group=2,dilations=[2,1]>(x, wtg)",
    "conv-transpose-shape": "y = ConvTranspose<strides=[2,2],output_shape=[12,15]>(x, wt)",
    "gemm": "f = Flatten(x) y = Gemm<alpha=0.5,beta=2.0,transB=1>(f, w168, b5)",
    "matmul": "t = Transpose<perm=[0,1,3,2]>(x) y = MatMul(x, t)",
    "einsum": 'y = Einsum<equation="nchw,w->nch">(x, g7)',
    "maxpool": "y = MaxPool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,0,1]>(x)",
    "maxpool-ceil": "y = MaxPool<kernel_shape=[2,3],strides=[2,2],ceil_mode=1>(x)",
    "averagepool": "y = AveragePool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,0]>(x)",
    "averagepool-pads": "y = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1>(x)",
    "averagepool-ceil": "y = AveragePool<kernel_shape=[3,2],strides=[2,2],ceil_mode=1>(x)",
    "global": "a = GlobalAveragePool(x) b = GlobalMaxPool(x) y = Add(a, b)",
    "reduce": "ax = Constant<value_ints=[2,-1]>() a = ReduceMean(x, ax) b = ReduceMax(x, ax) "
    "c = ReduceSum(x, ax) d = ReduceL2(x, ax) e = ReduceMin(x, ax) f = ReduceLogSumExp(x, ax) g = ReduceSumSquare(x, ax) "
    "h = ReduceL1(x, ax) y = Sum(a, b, c, d, e, f, g, h)",
    "movement": "a = Reshape(x, to_1d) b = Transpose<perm=[0,2,1]>(a) ax = Constant<value_ints=[1]>() "
    "c = Unsqueeze(b, ax) d = Squeeze(c, ax) e, f = Split<axis=1,num_outputs=2>(d) y = Concat<axis=-1>(e, f, e)",
    "uneven-split": "a, b = Split<axis=3,num_outputs=2>(x) y = Concat<axis=-1>(b, a)",
    "slice": "s = Constant<value_ints=[5,1]>() e = Constant<value_ints=[-99,99]>() "
    "ax = Constant<value_ints=[2,3]>() st = Constant<value_ints=[-2,3]>() y = Slice(x, s, e, ax, st)",
    "gather": "i = Constant<value=int64[2,2]{0,-1,3,3}>() y = Gather<axis=2>(x, i)",
    "gather-elements": "f = Constant<value_ints=[1]>() s = Shape<start=0,end=1>(x) t = Concat<axis=0>(s, rest) "
    "i = ConstantOfShape<value=int64[1]{3}>(t) y = GatherElements<axis=2>(x, i)",
    "gathernd": "i = Constant<value=int64[2,2]{0,1,1,-1}>() y = GatherND(x, i)",
    "expand": "ax = Constant<value_ints=[4]>() u = Unsqueeze(x, ax) t = Constant<value_ints=[1,5]>() y = Expand(u, t)",
    "tile": "r = Constant<value_ints=[1,2,1,3]>() y = Tile(x, r)",
    "pad": "p = Constant<value_ints=[1,0,2,3]>() v = Constant<value_float=1.5>() ax = Constant<value_ints=[2,3]>() y = Pad(x, p, v, ax)",
    "pad-negative": "p = Constant<value_ints=[0,0,-1,1,0,0,0,-2]>() y = Pad(x, p)",
    "pad-reflect": 'p = Constant<value_ints=[0,0,2,1,0,0,0,3]>() y = Pad<mode="reflect">(x, p)',
    "pad-edge": 'p = Constant<value_ints=[0,0,2,1,0,0,0,3]>() y = Pad<mode="edge">(x, p)',
    "shuffle": "a = DepthToSpace<blocksize=2>(x) b = SpaceToDepth<blocksize=2>(a) "
    'c = DepthToSpace<blocksize=2,mode="CRD">(x) d = SpaceToDepth<blocksize=2>(c) y = Concat<axis=3>(b, d)',
    "trilu": "k = Constant<value=int64{1}>() y = Trilu<upper=0>(x, k)",
    "cast": "a = Cast<to=7>(x) b = Cast<to=1>(a) y = Add(b, x)",
    "dropout": "a = Dropout(x) y = Identity(a)",
    "shape-arithmetic": "s = Shape(x) i = Constant<value_ints=[0]>() n = Gather(s, i) m = Constant<value_ints=[-1]>() "
    "t = Concat<axis=0>(n, m) y = Reshape(x, t)",
    "scalars": "s = Shape(x) i = Constant<value_int=1>() n = Gather(s, i) t = Div(n, i) "
    "u = Unsqueeze(t, first) v = Squeeze(u) w = Unsqueeze(v, first) e = Concat<axis=0>(w, seven) "
    "r = Cast<to=1>(v) y0 = Expand(r, e) y = Add(x, y0)",
    "range": "a = Constant<value_float=0.0>() b = Constant<value_float=7.0>() c = Constant<value_float=1.0>() "
    "r = Range(a, b, c) y = Add(x, r)",
    "resize-nearest": 'y = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">(x, , scales)',
    "resize-round": 'y = Resize<mode="nearest">(x, , , sizes)',
    "resize-linear": 'y = Resize<mode="linear">(x, , scales)',
    "resize-align": 'y = Resize<mode="linear",coordinate_transformation_mode="align_corners">(x, , , sizes)',
    "resize-torch": 'y = Resize<mode="linear",coordinate_transformation_mode="pytorch_half_pixel">(x, , , sizes)',
    "resize-cubic": 'y = Resize<mode="cubic">(x, , scales)',
    "grid-sample": "y = GridSample(x, grid)",
    "grid-sample-border": 'y = GridSample<mode="nearest",padding_mode="border",align_corners=1>(x, grid)',
}
CONSTANTS = {
    "one": np.float32(1.0),
    "half": np.float32(0.5),
    "slope": weight(4, 1, 1),
    "g7": weight(7),
    "b7": weight(7, seed=3),
    "g67": weight(6, 7),
    "c1": weight(4, seed=1),
    "c2": weight(4, seed=2),
    "c3": weight(4, seed=3),
    "v4": np.abs(weight(4, seed=4)) + 0.5,
    "w6": weight(6, 4, 3, 3),
    "b6": weight(6),
    "dw": weight(4, 1, 3, 3),
    "w1d": weight(6, 4, 3),
    "wt": weight(4, 6, 3, 3),
    "wtg": weight(4, 2, 2, 3),
    "to_1d": np.array([0, 4, -1]),
    "w168": weight(5, 168),
    "b5": weight(5),
    "rest": np.array([4, 2, 7]),
    "scales": np.array([1, 1, 2, 3], np.float32),
    "sizes": np.array([2, 4, 9, 4]),
    "first": np.array([0]),
    "seven": np.array([6, 7]),
    "grid": random(2, 3, 5, 2) * 0.8,
}


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_torch_computes_what_onnx_says(text: str) -> None:
    used = {name: array for name, array in CONSTANTS.items() if name in text.replace(",", " ").replace(")", " ").replace("(", " ").split()}
    model, x = graph(f"(float[N,4,6,7] x) => (float y) {{ {text} }}", **used), random(*MAP)
    wanted = compute(model, x=x)["y"]
    found = walked(model, fallback="gradient", x=x).outputs["y"]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("make", "shape"), [(residual, (3, 16, 6, 6)), (transformer, (3, 16, 64))])
def test_gradients_are_those_of_finite_differences(make: object, shape: tuple[int, ...]) -> None:
    model, x = make(), random(*shape)  # type: ignore[operator]
    found, step = walked(model, x=x), random(*shape, seed=99)
    small = 1e-3
    ahead, behind = (compute(model, x=x + sign * small * step)["y"].astype(np.float64).sum() for sign in (1, -1))
    assert float(np.sum(found.gradients["x"].astype(np.float64) * step)) == pytest.approx((ahead - behind) / (2 * small), rel=2e-2)


def test_what_no_gradient_passes_is_evaluated_by_onnx() -> None:
    """TopK's indices, a sum over them and a comparison need no torch."""
    text = """(float[N,5] x) => (float[N,5] y) { k = Constant<value_ints=[1]>() v, i = TopK(c, k) f = Cast<to=1>(i) y = Add(x, f) }"""
    model, x = graph(text, c=weight(1, 5)), random(2, 5)
    np.testing.assert_allclose(walked(model, x=x).outputs["y"], compute(model, x=x)["y"], rtol=1e-6)


def test_an_operator_that_torch_was_not_taught_names_its_node() -> None:
    model = graph("(float[N,5] x) => (float[N,5] y) { a = Relu(x) y = Hardmax(a) }")
    with pytest.raises(UsageError, match=r"the operator Hardmax has no computation in torch.*node 'n_y'.*--sensitivity sqnr"):
        walked(model, x=random(2, 5))


def test_an_option_that_torch_was_not_taught_names_its_node() -> None:
    text = '(float[N,4,6,7] x) => (float[N,4,9,4] y) { y = Resize<mode="linear",antialias=1>(x, , , sizes) }'
    with pytest.raises(UsageError, match=r"a Resize with antialias or exclude_outside has no computation in torch.*node 'n_y'"):
        walked(graph(text, sizes=np.array([2, 4, 9, 4])), x=random(*MAP))
