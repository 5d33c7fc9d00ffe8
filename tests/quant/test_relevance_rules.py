"""Every rule against a case computed by hand, its formula written as loops, and autograd where it is gradient times input."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graphs import graph, random, weight
from torch.nn import functional
from walked import Walked, walked

from deploycc.core.dcnv3 import DCNv3, make_node, provide_functions
from deploycc.core.errors import UsageError
from deploycc.quant.lrp.rules import bilinear, rule, safe_divide
from plugins_trt.dcnv3 import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# The image has a rule of its own (z^B). This activation changes nothing and passes relevance on, and what reads it reads no image.
HIDDEN = "h = LeakyRelu<alpha=1.0>(x)"


def hidden(shape: str, nodes: str, **constants: np.ndarray) -> ir.Model:
    """Return a graph whose nodes read ``h``, which equals the input ``x``."""
    return graph(f"(float[{shape}] x) => (float y) {{ {HIDDEN} {nodes} }}", **constants)


def array(*rows: Sequence[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def positive_shares(x: np.ndarray, w: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Return ``R_j = sum_i [x_j w_ji > 0] x_j w_ji / (sum over j' of the same) R_i``, by loops."""
    result = np.zeros(x.shape)
    for n, i in itertools.product(range(len(x)), range(w.shape[1])):
        positive = [j for j in range(len(w)) if x[n, j] * w[j, i] > 0]
        whole = sum(float(x[n, j] * w[j, i]) for j in positive)
        for j in positive:
            result[n, j] += x[n, j] * w[j, i] / whole * relevance[n, i]
    return result


def matrix_of(convolve: Callable[..., torch.Tensor], w: np.ndarray, shape: tuple[int, ...], **options: int) -> np.ndarray:
    """Return the matrix ``[inputs, outputs]`` of a convolution, row by row from unit images."""
    units = torch.eye(int(np.prod(shape))).reshape(-1, *shape)
    return convolve(units, torch.from_numpy(w), **options).flatten(1).numpy()


# Linear layers


def test_linear_by_hand() -> None:
    """x = (1, -2, 3): contributions (2, -2, -3) to the first output and (-1, -2, 12) to the second; R = (4, 10)."""
    model = hidden("1,3", "y = MatMul(h, w)", w=array([2, -1], [1, 1], [-1, 4]))
    found = walked(model, array([4, 10]), x=array([1, -2, 3]))
    assert found.relevance["x"].tolist() == [pytest.approx([4, 0, 10])]


def test_linear_shares_among_the_positive_contributions() -> None:
    """x = (1, -2): contributions (3, 2) of which the first gets 3/5; a bias takes nothing."""
    model = hidden("1,2", "m = MatMul(h, w) y = Add(m, b)", w=array([3], [-1]), b=array([100]))
    assert walked(model, array([1]), x=array([1, -2])).relevance["x"].tolist() == [pytest.approx([0.6, 0.4])]


@pytest.mark.parametrize("nodes", ["y = MatMul(h, w)", "y = Gemm(h, w, b)", 'y = Einsum<equation="ni,io->no">(h, w)'])
def test_linear_by_loops(nodes: str) -> None:
    x, w, relevance = random(3, 8), weight(8, 5), random(3, 5, seed=3)
    found = walked(hidden("3,8", nodes, w=w, b=weight(5)), relevance, x=x)
    np.testing.assert_allclose(found.relevance["x"], positive_shares(x, w, relevance), rtol=1e-4, atol=1e-6)


def test_a_constant_on_the_left() -> None:
    x, w, relevance = random(8, 3), weight(5, 8), random(5, 3, seed=3)
    found = walked(hidden("8,3", "y = MatMul(w, h)", w=w), relevance, x=x)
    np.testing.assert_allclose(found.relevance["x"], positive_shares(x.T, w.T, relevance.T).T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"stride": 1, "padding": 1}, {"stride": 2, "padding": 0}, {"stride": 1, "padding": 0, "groups": 3}])
def test_convolution_by_loops(options: dict[str, int]) -> None:
    x, w = random(2, 3, 5, 4), weight(6, 3 // options.get("groups", 1), 3, 2)
    stride, pad, group = options["stride"], options["padding"], options.get("groups", 1)
    nodes = f"y = Conv<strides=[{stride},{stride}],pads=[{pad},{pad},{pad},{pad}],group={group}>(h, w, b)"
    matrix = matrix_of(functional.conv2d, w, (3, 5, 4), **options)
    relevance = random(2, matrix.shape[1], seed=3)
    model = hidden("2,3,5,4", nodes, w=w, b=weight(6))
    shape = walked(model, None, x=x).outputs["y"].shape
    found = walked(model, relevance.reshape(shape), x=x).relevance["x"]
    np.testing.assert_allclose(found.reshape(2, -1), positive_shares(x.reshape(2, -1), matrix, relevance), rtol=1e-4, atol=1e-6)


def test_transposed_convolution_by_loops() -> None:
    x, w, relevance = random(2, 3, 5, 4), weight(3, 6, 2, 2), random(2, 6, 10, 8, seed=3)
    matrix = matrix_of(functional.conv_transpose2d, w, (3, 5, 4), stride=2)
    model = hidden("2,3,5,4", "y = ConvTranspose<strides=[2,2]>(h, w, b)", w=w, b=weight(6))
    found = walked(model, relevance, x=x).relevance["x"]
    wanted = positive_shares(x.reshape(2, -1), matrix, relevance.reshape(2, -1))
    np.testing.assert_allclose(found.reshape(2, -1), wanted, rtol=1e-4, atol=1e-6)


def test_positive_networks_share_by_gradient_times_input() -> None:
    """Without negative numbers and biases a ReLU network is homogeneous: relevance is gradient times input."""
    w1, w2 = np.abs(weight(4, 3, 3, 3)), np.abs(weight(64, 5))
    nodes = "c = Conv<pads=[1,1,1,1]>(h, w1) r = Relu(c) f = Flatten(r) y = MatMul(f, w2)"
    x = np.abs(random(2, 3, 4, 4))
    found = walked(hidden("2,3,4,4", nodes, w1=w1, w2=w2), walked(hidden("2,3,4,4", nodes, w1=w1, w2=w2), x=x).outputs["y"], x=x)
    gradient = walked(hidden("2,3,4,4", nodes, w1=w1, w2=w2), x=x).gradients["x"]
    # Seeded with y itself, so that R_y = y and the seed of the gradient is divided out.
    leaf = torch.from_numpy(x).requires_grad_()
    y = functional.conv2d(leaf, torch.from_numpy(w1), padding=1).relu().flatten(1) @ torch.from_numpy(w2)
    y.sum().backward()
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.relevance["x"], x * gradient, rtol=1e-4)


# The image


def test_the_image_by_hand() -> None:
    """z^B with x = (0, 1), so l = 0 and h = 1, and W = (-2, 1): contributions ``x w - l w+ - h w-`` are 2 and 1, which share R = 3."""
    model = graph("(float[1,2] x) => (float[1,1] y) { y = MatMul(x, w) }", w=array([-2], [1]))
    assert walked(model, array([3]), x=array([0, 1])).relevance["x"].tolist() == [pytest.approx([2, 1])]


@pytest.mark.parametrize("before", ["", "s = Sub(x, mean) d = Div(s, std) "])
def test_the_image_by_loops(before: str) -> None:
    x, w = random(2, 3, 5, 4), weight(6, 3, 3, 2)
    text = f"(float[2,3,5,4] x) => (float[2,6,3,3] y) {{ {before}y = Conv({'d' if before else 'x'}, w, b) }}"
    mean, std = np.float32(0.4), np.float32(0.5)
    model = graph(text, w=w, b=weight(6), **({"mean": mean, "std": std} if before else {}))
    seen, relevance = ((x - mean) / std if before else x).reshape(2, -1), random(2, 54, seed=3)
    matrix = matrix_of(functional.conv2d, w, (3, 5, 4))
    wanted = np.zeros(seen.shape)
    for n, i in itertools.product(range(2), range(54)):
        low, high, column = seen[n].min(), seen[n].max(), matrix[:, i].astype(np.float64)
        z = seen[n] * column - low * column.clip(min=0) - high * column.clip(max=0)
        assert z.min() >= -1e-6
        wanted[n] += z / z.sum() * relevance[n, i]
    found = walked(model, relevance.reshape(2, 6, 3, 3), x=x).relevance["x"]
    np.testing.assert_allclose(found.reshape(2, -1), wanted, rtol=1e-3, atol=1e-5)


# Sums, products, branches


def test_addition_by_hand() -> None:
    """u = (1, 3), v = (3, -1), R = (4, 4): u R/(u+v) = (1, 6), v R/(u+v) = (3, -2); sums 7 and 1 keep 7/8 and 1/8 of 8."""
    model = graph("(float[1,2] x, float[1,2] z) => (float[1,2] y) { y = Add(x, z) }")
    found = walked(model, array([4, 4]), x=array([1, 3]), z=array([3, -1])).relevance
    assert found["x"].tolist() == [pytest.approx([1, 6])]
    assert found["z"].tolist() == [pytest.approx([3, -2])]


def test_addition_is_rescaled() -> None:
    """u = (2, 2), v = (-1, -1), R = (1, 2): (2, 4) and (-1, -2), sums 6 and -3, shares 2/3 and 1/3 of 3: 2 and 1."""
    model = graph("(float[1,2] x, float[1,2] z) => (float[1,2] y) { y = Add(x, z) }")
    found = walked(model, array([1, 2]), x=array([2, 2]), z=array([-1, -1])).relevance
    assert found["x"].tolist() == [pytest.approx([2 / 3, 4 / 3])]
    assert found["z"].tolist() == [pytest.approx([1 / 3, 2 / 3])]


@pytest.mark.parametrize("nodes", ["y = Sub(x, z)", "m = Neg(z) y = Add(x, m)", "m = Neg(z) y = Sum(x, m)"])
def test_a_difference_is_a_sum(nodes: str) -> None:
    model, feeds = graph(f"(float[3,8] x, float[3,8] z) => (float[3,8] y) {{ {nodes} }}"), {"x": random(3, 8), "z": random(3, 8, seed=2)}
    wanted = walked(graph("(float[3,8] x, float[3,8] z) => (float[3,8] y) { y = Sub(x, z) }"), random(3, 8, seed=5), **feeds).relevance
    found = walked(model, random(3, 8, seed=5), **feeds).relevance
    np.testing.assert_allclose(found["z"], wanted["z"], rtol=1e-4)


def test_sums_of_the_addition_are_those_of_one_sample() -> None:
    """Also where a sample's rows are no longer on the first axis, or several to a sample."""
    nodes = "t = Transpose<perm=[1,0,2]>(x) a = Relu(t) b = Add(t, a) w = Reshape(b, split) c = Tanh(w) y = Add(w, c)"
    model = graph(f"(float[N,4,6] x) => (float[4,N,2,3] y) {{ {nodes} }}", split=np.array([0, 0, 2, 3]))
    x = random(3, 4, 6)
    together = walked(model, x=x).relevance["x"]
    for n in range(3):
        np.testing.assert_allclose(together[n], walked(model, x=x[n : n + 1]).relevance["x"][0], rtol=1e-3, atol=1e-5)


def test_a_constant_operand_takes_nothing() -> None:
    model = hidden("3,8", "a = Add(h, c) b = Mul(a, s) d = Sub(c, b) y = Div(d, s)", c=weight(8), s=weight(8, seed=3))
    relevance = random(3, 8, seed=4)
    np.testing.assert_array_equal(walked(model, relevance, x=random(3, 8)).relevance["x"], relevance)


def test_a_gate_takes_half() -> None:
    """x Sigmoid(x): half goes by the gate, and both meet at x."""
    model = graph("(float[2,5] x, float[2,1] z) => (float[2,5] y) { g = Sigmoid(z) y = Mul(x, g) }")
    relevance = random(2, 5, seed=4)
    found = walked(model, relevance, x=random(2, 5), z=random(2, 1)).relevance
    np.testing.assert_allclose(found["x"], relevance / 2)
    np.testing.assert_allclose(found["z"], relevance.sum(1, keepdims=True) / 2, rtol=1e-5)


def test_matmul_by_hand() -> None:
    """u = (1, 2), v = (3, 1): u v = 5. R = 10 is shared 3 : 2 by each operand, each half: 3 and 2."""
    model = graph("(float[1,2] x, float[2,1] z) => (float[1,1] y) { y = MatMul(x, z) }")
    found = walked(model, array([10]), x=array([1, 2]), z=array([3], [1])).relevance
    assert found["x"].tolist() == [pytest.approx([3, 2])]
    assert found["z"].reshape(-1).tolist() == pytest.approx([3, 2])


@pytest.mark.parametrize("nodes", ["y = MatMul(x, z)", 'y = Einsum<equation="bij,bjk->bik">(x, z)'])
def test_matmul_by_autograd(nodes: str) -> None:
    model = graph(f"(float[2,3,4] x, float[2,4,5] z) => (float[2,3,5] y) {{ {nodes} }}")
    x, z, relevance = random(2, 3, 4), random(2, 4, 5, seed=2), random(2, 3, 5, seed=3)
    u, v = (torch.from_numpy(a).requires_grad_() for a in (x, z))
    product = u @ v
    product.backward(torch.from_numpy(relevance) / product.detach())
    found = walked(model, relevance, x=x, z=z)
    np.testing.assert_allclose(found.relevance["x"], x * u.grad.numpy() / 2, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.relevance["z"], z * v.grad.numpy() / 2, rtol=1e-3, atol=1e-5)
    assert found.sums["n_y"][1] == pytest.approx(relevance.sum(), rel=1e-3)


def test_branches_are_summed() -> None:
    model = hidden("2,4", "a = Relu(h) b = Tanh(h) y = Concat<axis=1>(a, b)")
    relevance = random(2, 8, seed=4)
    np.testing.assert_allclose(walked(model, relevance, x=random(2, 4)).relevance["x"], relevance[:, :4] + relevance[:, 4:], rtol=1e-6)


# What passes relevance on unchanged


@pytest.mark.parametrize(
    "nodes",
    [
        *(
            f"y = {op}(h)"
            for op in ("Relu", "Gelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Erf", "Elu", "Softplus", "Exp", "Mish")
        ),
        *(
            "y = Softmax(h)",
            "y = LogSoftmax(h)",
            "y = LayerNormalization(h, g, b)",
            "y = Clip(h, zero)",
            "y = Max(h, zero)",
            "y = Min(zero, h)",
        ),
        *(
            "y = BatchNormalization(h, g, b, b, v)",
            "y = InstanceNormalization(r, g4, b4)",
            "y = GroupNormalization<num_groups=2>(r, g4, b4)",
        ),
        *("y = Dropout(h)", "y = Identity(h)", "y = Pow(h, two)", "y = Div(h, v)", "y = PRelu(h, g)", "y = LpNormalization(h)"),
    ],
)
def test_activations_and_normalizations_pass_it_on(nodes: str) -> None:
    constants = {"g": weight(8), "b": weight(8, seed=2), "v": np.abs(weight(8)) + 1, "zero": np.float32(0), "two": np.float32(2)}
    if "(r," in nodes:
        nodes = f"r = Reshape(h, to) {nodes.replace('y =', 'n =')} y = Flatten(n)"
        constants |= {"to": np.array([3, 4, 2]), "g4": weight(4), "b4": weight(4, seed=2)}
    used = {k: c for k, c in constants.items() if k in nodes.replace(",", " ").replace("(", " ").replace(")", " ").split()}
    relevance = random(3, 8, seed=4)
    np.testing.assert_array_equal(walked(hidden("3,8", nodes, **used), relevance, x=random(3, 8)).relevance["x"], relevance)


def test_a_normalizer_takes_nothing() -> None:
    """x / |x| written out: the divisor is a scale."""
    model = graph("(float[3,8] x) => (float[3,8] y) { ax = Constant<value_ints=[1]>() n = ReduceL2(x, ax) y = Div(x, n) }")
    relevance = random(3, 8, seed=4)
    np.testing.assert_array_equal(walked(model, relevance, x=random(3, 8)).relevance["x"], relevance)


# What moves, copies or selects


def test_movement_by_position() -> None:
    """Numbers that say where they are: what comes back must be where it came from."""
    places = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4) + 1
    for nodes, arrange in {
        "y = Reshape(h, flat)": lambda p: p.reshape(1, 24),
        "y = Flatten<axis=2>(h)": lambda p: p.reshape(2, 12),
        "y = Transpose<perm=[3,0,2,1]>(h)": lambda p: p.transpose(3, 0, 2, 1),
        "y = Unsqueeze(h, two)": lambda p: p[:, :, None],
        "y = Squeeze(h)": lambda p: p[0],
        "a, b = Split<axis=3,num_outputs=2>(h) y = Concat<axis=2>(b, a)": lambda p: np.concatenate([p[..., 2:], p[..., :2]], 2),
        "y = Cast<to=1>(h)": lambda p: p,
        "y = Pad(h, pads)": lambda p: np.pad(p, [(0, 0), (0, 0), (1, 0), (0, 2)]),
    }.items():
        used = {
            k: c
            for k, c in {"flat": np.array([1, 24]), "two": np.array([2]), "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2])}.items()
            if k in nodes
        }
        model = hidden("1,2,3,4", nodes, **used)
        assert walked(model, arrange(places), x=random(1, 2, 3, 4)).relevance["x"].tolist() == places.tolist(), nodes


def test_selection_takes_and_copies_are_summed() -> None:
    relevance = np.array([[1, 2, 4, 8, 16, 32]], np.float32)
    cases = {
        "y = Slice(h, one, end, one)": ("1,7", [[0, 1, 2, 4, 8, 16, 32]]),
        "y = Gather<axis=1>(h, picks)": ("1,3", [[1 + 4, 2 + 32, 8 + 16]]),
        "y = Expand(h, wide)": ("1,1", [[63]]),
        "y = Tile(h, twice)": ("1,3", [[1 + 8, 2 + 16, 4 + 32]]),
        "y = Where(mask, h, zero)": ("1,6", [[1, 0, 4, 0, 16, 0]]),
    }
    constants = {
        "one": np.array([1]), "end": np.array([99]), "picks": np.array([0, 1, 0, 2, 2, 1]), "wide": np.array([1, 6]),
        "twice": np.array([1, 2]), "mask": np.array([[1, 0, 1, 0, 1, 0]], bool), "zero": np.float32(0),
    }  # fmt: skip
    for nodes, (shape, wanted) in cases.items():
        used = {k: c for k, c in constants.items() if k in nodes}
        x = random(*(int(d) for d in shape.split(",")))
        assert walked(hidden(shape, nodes, **used), relevance, x=x).relevance["x"].tolist() == wanted, nodes


def test_the_winner_takes_all() -> None:
    x = np.array([[[[1, 5, 2, 0], [3, 4, 7, 6]]]], np.float32)
    model = hidden("1,1,2,4", "y = MaxPool<kernel_shape=[2,2],strides=[2,2]>(h)")
    assert walked(model, np.array([[[[10, 20]]]], np.float32), x=x).relevance["x"].tolist() == [[[[0, 10, 0, 0], [0, 0, 20, 0]]]]
    both = graph("(float[1,3] x, float[1,3] z) => (float[1,3] y) { y = Max(x, z) }")
    found = walked(both, array([1, 2, 4]), x=array([1, 5, 2]), z=array([3, 4, 1])).relevance
    assert (found["x"].tolist(), found["z"].tolist()) == ([[0, 2, 4]], [[1, 0, 0]])


@pytest.mark.parametrize(
    "nodes",
    [
        "y = ReduceMean<keepdims=0>(h, last)",
        "y = ReduceSum<keepdims=0>(h, last)",
        "y = AveragePool<kernel_shape=[4]>(h)",
        "y = GlobalAveragePool(h)",
    ],
)
def test_averages_share_among_the_positive(nodes: str) -> None:
    """(1, 3, -2, 0): 1 and 3 share 8 as 1 : 3. (-1, -3, 0, 0): nothing is positive, and they share by themselves."""
    model = hidden("1,2,4", nodes, **({"last": np.array([2])} if "last" in nodes else {}))
    x = np.array([[[1, 3, -2, 0], [-1, -3, 0, 0]]], np.float32)
    relevance = np.array([[8, 4]], np.float32).reshape(walked(model, x=x).outputs["y"].shape)
    found = walked(model, relevance, x=x).relevance["x"]
    assert found[0].tolist() == [pytest.approx([2, 6, 0, 0]), pytest.approx([1, 3, 0, 0])]


def test_interpolation_by_hand() -> None:
    """Twice as wide, nearest: each place is read twice."""
    model = hidden(
        "1,1,1,3",
        'y = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">(h, , s)',
        s=np.float32([1, 1, 1, 2]),
    )
    relevance = np.array([[[[1, 2, 4, 8, 16, 32]]]], np.float32)
    assert walked(model, relevance, x=random(1, 1, 1, 3)).relevance["x"].tolist() == [[[[3, 12, 48]]]]


def test_interpolation_by_autograd() -> None:
    model = hidden("2,3,4,5", 'y = Resize<mode="linear">(h, , s)', s=np.float32([1, 1, 2, 3]))
    x, relevance = random(2, 3, 4, 5), random(2, 3, 8, 15, seed=2)
    leaf = torch.from_numpy(x).requires_grad_()
    functional.interpolate(leaf, scale_factor=(2, 3), mode="bilinear").backward(torch.from_numpy(relevance))
    found = walked(model, relevance, x=x)
    np.testing.assert_allclose(found.relevance["x"], leaf.grad.numpy(), rtol=1e-4, atol=1e-5)
    assert found.sums["n_y"][1] == pytest.approx(relevance.sum(), rel=1e-4)


def test_sampling_by_autograd() -> None:
    """The grid gets a gradient and no relevance."""
    model = graph("(float[2,3,4,5] x, float[2,6,7,2] z) => (float[2,3,6,7] y) { g = Tanh(z) y = GridSample(x, g) }")
    x, grid, relevance = random(2, 3, 4, 5), random(2, 6, 7, 2), random(2, 3, 6, 7, seed=2)
    leaf = torch.from_numpy(x).requires_grad_()
    functional.grid_sample(leaf, torch.from_numpy(np.tanh(grid)), align_corners=False).backward(torch.from_numpy(relevance))
    found = walked(model, relevance, x=x, z=grid)
    np.testing.assert_allclose(found.relevance["x"], leaf.grad.numpy(), rtol=1e-4, atol=1e-5)
    assert set(found.relevance) == {"x"}
    assert np.any(found.gradients["z"])


# DCNv3


def deformable(what: DCNv3, channels: int) -> ir.Model:
    """Return a model whose only node is the operator, with values, offsets and masks as inputs."""
    shapes = {"x": ["N", "H", "W", channels], "offset": ["N", "H", "W", what.group * 18], "mask": ["N", "H", "W", what.group * 9]}
    inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(s)) for n, s in shapes.items()]
    node = make_node(inputs, what, name="dcn")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 20, "deploycc": 1}, name="dcn"), ir_version=10)
    provide_functions(model)
    return model


def operands(what: DCNv3, channels: int) -> dict[str, np.ndarray]:
    mask = np.exp(random(2, 4, 5, what.group, 9, seed=3))
    mask = (mask / mask.sum(-1, keepdims=True)).reshape(2, 4, 5, -1)
    return {"x": random(2, 4, 5, channels), "offset": random(2, 4, 5, what.group * 18, seed=2), "mask": mask}


WHAT = DCNv3(group=2, pad_h=1, pad_w=1)


def test_deformable_convolution_is_bilinear_in_values_and_mask() -> None:
    feeds, relevance = operands(WHAT, 6), random(2, 4, 5, 6, seed=5)
    found = walked(deformable(WHAT, 6), relevance, **feeds)
    np.testing.assert_allclose(found.outputs["y"], reference(*feeds.values(), WHAT), rtol=1e-4, atol=1e-5)
    assert set(found.relevance) == {"x", "mask"}
    for name in ("x", "mask"):
        # By the reference implementation: the operator is linear in this operand, so a unit of it is a column of its Jacobian.
        shares, flat = relevance / found.outputs["y"], feeds[name].reshape(-1)
        for place in range(0, flat.size, 17):
            unit = np.zeros_like(flat)
            unit[place] = 1.0
            column = reference(**{**feeds, name: unit.reshape(feeds[name].shape)}, what=WHAT)
            assert found.relevance[name].reshape(-1)[place] == pytest.approx(flat[place] * np.sum(column * shares) / 2, rel=1e-2, abs=1e-3)


def test_deformable_convolution_conserves() -> None:
    found = walked(deformable(WHAT, 6), **operands(WHAT, 6))
    assert found.relevance["x"].sum() == pytest.approx(120, rel=1e-3)
    assert found.relevance["mask"].sum() == pytest.approx(120, rel=1e-3)


def test_logits_of_a_deformable_convolution_take_nothing() -> None:
    """The operator is not linear in them."""
    what = DCNv3(group=2, pad_h=1, pad_w=1, softmax=1)
    found = walked(deformable(what, 6), **operands(what, 6))
    assert set(found.relevance) == {"x"}
    assert found.relevance["x"].sum() == pytest.approx(240, rel=1e-3)


# Extension and refusal

ODD = "a = Relu(h) r = ReduceL2<keepdims=1>(a, last) y = Identity(r)"


def test_an_operator_without_a_rule_names_its_node() -> None:
    with pytest.raises(UsageError) as caught:
        walked(hidden("2,5", ODD, last=np.array([1])), x=random(2, 5))
    assert str(caught.value) == (
        "relevance cannot pass the operator ReduceL2, which has no rule. Where: node 'n_r'. "
        "Fix: use --relevance-fallback gradient, or register a rule with deploycc.quant.lrp.rules.rule."
    )


def test_the_fallback_shares_by_gradient_times_input() -> None:
    """``x dy/dx R/y`` of a norm is ``x^2 / |x|^2 R``."""
    x = np.abs(random(2, 5))
    found = walked(hidden("2,5", ODD, last=np.array([1])), fallback="gradient", x=x).relevance["x"]
    np.testing.assert_allclose(found, x**2 / np.sum(x**2, axis=1, keepdims=True), rtol=1e-5)


def test_a_rule_is_one_decorated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import deploycc.quant.lrp.rules as rules

    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    rule("ReduceL2")(bilinear)
    assert isinstance(walked(hidden("2,5", ODD, last=np.array([1])), x=random(2, 5)), Walked)


def test_safe_division() -> None:
    a, b = torch.tensor([1.0, 1.0, -3.0, 1.0]), torch.tensor([2.0, 0.0, -1.5, -1e-9])
    quotient = safe_divide(a, b)
    assert quotient[:3].tolist() == pytest.approx([0.5, 0.0, 2.0])
    assert torch.isfinite(quotient).all()
