"""Random graphs built from the fragments that exporters leave behind, with an a-priori bound on their rounding error.

Each fragment says how far it can carry an error (its Lipschitz constant in the maximum norm), how large its inner values can get,
and how many roundings one output element goes through. The bound is the forward error analysis of that chain:
``error' = lipschitz * error + roundings * eps * magnitude``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points

import numpy as np
from dcnv3_fragments import decomposed, deformable
from hypothesis import assume
from hypothesis import strategies as st
from merge_fragments import MERGEABLE, bordered, convolutions, layers, padded, parallel, scaled, shared

Draw = Callable[[st.SearchStrategy[object]], object]


@dataclass(slots=True)
class Builder:
    """The text of a graph that grows, the shape of its last value, and the analysis so far."""

    rng: np.random.Generator
    dtype: str
    value: str = "x"
    shape: tuple[int, ...] = (4, 4, 4)  # without the dynamic batch
    lines: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    taps: list[str] = field(default_factory=list)
    unrounded: float = 0.0  # the error in units of eps
    magnitude: float = 3.0
    count: int = 0
    last: str = "Neg"

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def node(self, operation: str) -> str:
        """Append a node and return the name of its output."""
        output = self.name("v")
        self.lines.append(f"{output} = {operation}")
        return output

    def tensor(self, array: np.ndarray, dtype: str | None = None) -> str:
        """Add an initializer and return its name."""
        name = self.name("w")
        flat = ", ".join(repr(v) for v in np.asarray(array).ravel().tolist())
        shape = f"[{','.join(map(str, np.shape(array)))}]" if np.ndim(array) else ""
        self.constants.append(f"{dtype or self.dtype}{shape} {name} = {{{flat}}}")
        return name

    def weights(self, *shape: int) -> np.ndarray:
        """Return numbers of a few bits, so that text carries them exactly, of about unit row sum."""
        return self.rng.integers(-8, 9, shape) / 8 / max(1, int(np.prod(shape[1:])) / 4)

    def number(self, value: float, style: int) -> str:
        """Return a scalar as an initializer, a Constant node or a CastLike of one."""
        if style == 0:
            return self.tensor(np.float64(value))
        constant = self.node(f"Constant<value_float={value!r}>()")
        return self.node(f"CastLike({constant}, {self.value})")

    def becomes(self, value: str, *, lipschitz: float, roundings: float, magnitude: float, inner: float = 0.0) -> None:
        """Make ``value`` the last one and carry the analysis on."""
        self.unrounded = lipschitz * self.unrounded + roundings * max(magnitude, inner)
        self.value, self.magnitude = value, magnitude

    def text(self) -> str:
        """Return the graph; taps and the last value are its outputs."""
        self.lines.append(f"y = {self.last}({self.value})")
        ranks = [("y", len(self.shape)), *self._tapped()]
        outputs = ", ".join(f"{self.dtype}[{','.join('?' * (1 + rank))}] {name}" for name, rank in ranks)
        constants = ", ".join(self.constants) or f"{self.dtype} unused = {{0}}"
        return f"({self.dtype}[N,4,4,4] x) => ({outputs}) <{constants}> {{ {' '.join(self.lines)} }}"

    def _tapped(self) -> list[tuple[str, int]]:
        return [(name, int(rank)) for name, rank in (t.split(":") for t in self.taps)]


def convolution(b: Builder, draw: Draw) -> None:
    if len(b.shape) != 3:
        relu(b, draw)
        return
    kernel, groups = draw(st.sampled_from([(3, 1), (1, 2), (3, 4), (1, 1)]))  # type: ignore[misc]
    padding = draw(st.sampled_from([1, 0])) if kernel == 3 and b.shape[1] >= 3 else int(kernel == 3)
    weight = b.weights(4, 4 // groups, kernel, kernel)
    name, bias = b.tensor(weight), draw(st.sampled_from(["none", "constant", "expanded"]))
    extra, size = "", 0.0
    if bias == "constant":
        shift = b.weights(4)
        extra, size = f", {b.tensor(shift)}", float(np.abs(shift).max())
    elif bias == "expanded":
        sizes = b.node(f"Shape<start=0, end=1>({name})")
        extra = f", {b.node(f'Expand({b.number(0.25, 1)}, {sizes})')}"
        size = 0.25
    pads = f"<group={groups}, pads=[{','.join([str(padding)] * 4)}]>"
    gain = float(np.abs(weight).reshape(4, -1).sum(axis=1).max())
    output = b.node(f"Conv{pads}({b.value}, {name}{extra})")
    b.shape = (4, *(d + 2 * int(padding) - kernel + 1 for d in b.shape[1:]))  # type: ignore[call-overload]
    b.becomes(output, lipschitz=gain, roundings=weight[0].size + 2, magnitude=gain * b.magnitude + size)


def normalization(b: Builder, draw: Draw) -> None:
    if len(b.shape) == 2:
        layernorm(b, draw)
        return
    channels = b.shape[0]
    gamma, beta, mean = (b.rng.integers(-8, 9, channels) / 8 for _ in range(3))
    variance = b.rng.integers(4, 16, channels) / 8
    names = [b.tensor(a) for a in (gamma, beta, mean, variance)]
    factor = float(np.abs(gamma / np.sqrt(variance)).max())
    output = b.node(f"BatchNormalization({b.value}, {', '.join(names)})")
    b.becomes(output, lipschitz=factor, roundings=10, magnitude=factor * (b.magnitude + 1) + 1, inner=b.magnitude + 1)


def product(b: Builder, draw: Draw) -> None:
    rows = b.shape[-1]
    if len(b.shape) == 3:
        flatten(b, draw)
        return
    weight, shift = b.weights(4, rows), b.weights(4)
    gain = float(np.abs(weight).sum(axis=1).max())
    if len(b.shape) == 1 and draw(st.booleans()):
        transposed = draw(st.booleans())
        name = b.tensor(weight if transposed else weight.T)
        output = b.node(f"Gemm<transB={int(bool(transposed))}, beta=0.5>({b.value}, {name}, {b.tensor(shift)})")
    else:
        name = b.node(f"Transpose<perm=[1,0]>({b.tensor(weight)})")
        output = b.node(f"Add({b.node(f'MatMul({b.value}, {name})')}, {b.tensor(shift)})")
    b.shape = (*b.shape[:-1], 4)
    b.becomes(output, lipschitz=gain, roundings=rows + 3, magnitude=gain * b.magnitude + float(np.abs(shift).max()))


def convolution_and_normalization(b: Builder, draw: Draw) -> None:
    """Put a convolution and a normalization side by side, in either order, perhaps with a second reader between them."""
    first, second = (convolution, normalization) if draw(st.booleans()) else (normalization, convolution)
    first(b, draw)
    between = b.value
    draw_between = draw(st.sampled_from(["nothing", "reader", "tap"]))
    if draw_between == "tap":
        tap(b, draw)
    size, error, magnitude = b.shape, b.unrounded, b.magnitude
    second(b, draw)
    if draw_between == "reader" and b.shape == size:
        sum_of_both = b.node(f"Add({b.value}, {between})")
        b.unrounded += error
        b.becomes(sum_of_both, lipschitz=1, roundings=1, magnitude=b.magnitude + magnitude)


def flatten(b: Builder, draw: Draw) -> None:
    """Reshape to one or two axes, the batch computed from Shape or written as -1."""
    total = int(np.prod(b.shape))
    shape = draw(st.sampled_from([(total,), (4, total // 4)]))
    rest = b.tensor(np.array(shape), "int64")
    batch = b.node(f"Shape<start=0, end=1>({b.value})") if draw(st.booleans()) else b.node("Constant<value_ints=[-1]>()")
    b.value = b.node(f"Reshape<allowzero=1>({b.value}, {b.node(f'Concat<axis=0>({batch}, {rest})')})")
    b.shape = tuple(shape)  # type: ignore[arg-type]


def transposes(b: Builder, draw: Draw) -> None:
    order = draw(st.permutations(range(1, len(b.shape) + 1)))
    back = [0, *(1 + int(i) for i in np.argsort(order))]  # type: ignore[arg-type]
    forth = b.node(f"Transpose<perm=[{','.join(map(str, [0, *order]))}]>({b.value})")  # type: ignore[misc]
    if draw(st.booleans()):
        b.value = b.node(f"Transpose<perm=[{','.join(map(str, back))}]>({forth})")
        return
    second = [0, *draw(st.permutations(range(1, len(b.shape) + 1)))]  # type: ignore[misc]
    composed = [[0, *order][axis] for axis in second]  # type: ignore[misc]
    b.value = b.node(f"Transpose<perm=[{','.join(map(str, second))}]>({forth})")
    b.shape = tuple(b.shape[axis - 1] for axis in composed[1:])


def nothing(b: Builder, draw: Draw) -> None:
    operation = draw(st.sampled_from(["Identity({})", "Dropout({})", "Concat<axis=1>({})", "Cast<to={kind}>({})"]))
    b.value = b.node(str(operation).format(b.value, kind=1 if b.dtype == "float" else 11))


def relu(b: Builder, draw: Draw) -> None:
    b.becomes(b.node(f"Relu({b.value})"), lipschitz=1, roundings=0, magnitude=b.magnitude)


def pointwise(b: Builder, draw: Draw) -> None:
    operator, number = draw(st.sampled_from([("Mul", 0.5), ("Add", 0.25), ("Sub", 1.0), ("Div", 2.0)]))  # type: ignore[misc]
    output = b.node(f"{operator}({b.value}, {b.number(number, int(bool(draw(st.booleans()))))})")
    b.becomes(output, lipschitz=1, roundings=1, magnitude=b.magnitude + 1)


def residual(b: Builder, draw: Draw) -> None:
    """Add a function of a value to it, so that the value has two readers."""
    branch = b.node(f"Relu({b.value})")
    b.becomes(b.node(f"Add({b.value}, {branch})"), lipschitz=2, roundings=1, magnitude=2 * b.magnitude)


def tap(b: Builder, draw: Draw) -> None:
    """Make the last value an output of the graph as well."""
    if b.value != "x" and not any(t.startswith(f"{b.value}:") for t in b.taps):
        b.taps.append(f"{b.value}:{len(b.shape)}")


def layernorm(b: Builder, draw: Draw) -> None:
    """Normalize the last axis; epsilon is large, so that the analysis stays meaningful."""
    size, epsilon = b.shape[-1], 2.0
    gamma, beta = b.rng.integers(-8, 9, size) / 8, b.rng.integers(-8, 9, size) / 8
    axis = b.node("Constant<value_ints=[-1]>()")
    centred = b.node(f"Sub({b.value}, {b.node(f'ReduceMean({b.value}, {axis})')})")
    square = b.node(f"Mul({centred}, {centred})") if draw(st.booleans()) else b.node(f"Pow({centred}, {b.number(2.0, 0)})")
    variance = b.node(f"Add({b.node(f'ReduceMean({square}, {axis})')}, {b.number(epsilon, int(bool(draw(st.booleans()))))})")
    output = b.node(f"Div({centred}, {b.node(f'Sqrt({variance})')})")
    if draw(st.booleans()):
        output = b.node(f"Add({b.node(f'Mul({output}, {b.tensor(gamma)})')}, {b.tensor(beta)})")
    largest = size**0.5 + 1
    # The derivative is (I - 11'/n - zz'/n) / sigma with |z| <= sqrt(n) and the mean of |z| <= 1; the mean costs n roundings of x.
    gain = (2 + size**0.5) / epsilon**0.5
    inner = gain * (size + 4) * b.magnitude + 8 * largest
    b.becomes(output, lipschitz=gain, roundings=1, magnitude=largest, inner=inner)


def gelu(b: Builder, draw: Draw) -> None:
    half, one = b.number(0.5, int(bool(draw(st.booleans())))), b.number(1.0, 0)
    if draw(st.booleans()):
        inner = b.node(f"Erf({b.node(f'Div({b.value}, {b.number(2**0.5, 0)})')})")
    else:
        cube = b.node(f"Pow({b.value}, {b.number(3.0, 0)})")
        total = b.node(f"Add({b.value}, {b.node(f'Mul({cube}, {b.number(0.044715, 0)})')})")
        inner = b.node(f"Tanh({b.node(f'Mul({total}, {b.number((2 / np.pi) ** 0.5, 0)})')})")
    grown = b.node(f"Add({inner}, {one})")
    if draw(st.booleans()):
        output = b.node(f"Mul({b.node(f'Mul({b.value}, {grown})')}, {half})")
    else:
        output = b.node(f"Mul({b.node(f'Mul({b.value}, {half})')}, {grown})")
    # The slope of GELU is below 1.13; an error d in the inner argument moves the output by at most |x| d, where it is not saturated.
    b.becomes(output, lipschitz=1.13, roundings=24, magnitude=b.magnitude, inner=b.magnitude + 3)


def softmax(b: Builder, draw: Draw) -> None:
    """Normalize the last axis to a distribution, in one node or in the steps that it stands for."""
    b.value, b.magnitude = b.node(f"Mul({b.value}, {b.number(1 / 16, 0)})"), b.magnitude / 16
    size, axis = b.shape[-1], b.node("Constant<value_ints=[-1]>()")
    shifted = b.node(f"Sub({b.value}, {b.node(f'ReduceMax({b.value}, {axis})')})") if draw(st.booleans()) else b.value
    grown = b.node(f"Exp({shifted})")
    total = b.node(f"ReduceSum({grown}, {axis})")
    if draw(st.integers(0, 3)) == 0:
        b.taps.append(f"{grown}:{len(b.shape)}")
    # A change of d in every argument moves the distribution by at most 2 d, all entries together.
    b.becomes(b.node(f"Div({grown}, {total})"), lipschitz=1 / 8, roundings=size + 8, magnitude=1, inner=float(np.exp(b.magnitude)))


def attention(b: Builder, draw: Draw) -> None:
    """Attend from a value to itself, with the scale on the scores, on the query, on the key, or spread."""
    b.value, b.magnitude = b.node(f"Mul({b.value}, {b.number(1 / 8, 0)})"), b.magnitude / 8
    if len(b.shape) == 1:
        relu(b, draw)
        return
    rows, width, order = b.shape[-2], b.shape[-1], list(range(len(b.shape) + 1))
    query, value, size = b.value, b.value, b.magnitude
    key = b.node(f"Transpose<perm=[{','.join(map(str, [*order[:-2], order[-1], order[-2]]))}]>({b.value})")
    places = draw(st.sets(st.sampled_from(["scores", "query", "key", "late"])))
    query, key = (b.node(f"Mul({v}, {b.number(0.5, 0)})") if p in places else v for v, p in ((query, "query"), (key, "key")))  # type: ignore[operator]
    scores = b.node(f"MatMul({query}, {key})")
    if "scores" in places:  # type: ignore[operator]
        scores = b.node(f"Div({scores}, {b.number(2.0, 0)})")
    if draw(st.booleans()):
        scores = b.node(f"Add({scores}, {b.tensor(b.weights(rows, rows))})")
    if "late" in places:  # type: ignore[operator]
        scores = b.node(f"Mul({scores}, {b.number(0.5, 0)})")
    if draw(st.integers(0, 3)) == 0:
        b.taps.append(f"{scores}:{len(b.shape)}")
    weights = b.node(f"Softmax<axis=-1>({scores})")
    steep = 1 + 2 * size * 2 * width * size
    inner = (2 * size * (width + 6) + 4) * width * size**2 + (rows + 8) * size
    b.becomes(b.node(f"MatMul({weights}, {value})"), lipschitz=steep / 8, roundings=1, magnitude=size, inner=inner)


FRAGMENTS = (
    convolution_and_normalization,
    gelu,
    transposes,
    convolution_and_normalization,
    normalization,
    product,
    flatten,
    transposes,
    nothing,
    relu,
    pointwise,
    residual,
    tap,
    layernorm,
    gelu,
    *MERGEABLE,
)


# What a pass works on, where that is one fragment of many; a third party brings its own by entry point.
TOWARD = {
    **{point.name: point.load() for point in entry_points(group="deploycc.law_fragments")},
    "canonicalize-attention": attention,
    "fold-border": bordered,
    "fold-layerscale": scaled,
    "fold-pad": padded,
    "fuse-dcnv3-center": deformable,
    "fuse-dcnv3-projections": deformable,
    "fuse-dcnv3-softmax": deformable,
    "fuse-layernorm": layernorm,
    "fuse-softmax": softmax,
    "lower-shared-kernel": shared,
    "merge-branches": parallel,
    "merge-convolutions": convolutions,
    "merge-linears": layers,
    "raise-dcnv3": decomposed,
}


@st.composite
def graphs(draw: Draw, largest: int = 6, toward: str = "") -> tuple[str, float]:
    """Draw the text of a graph in FP32, and a bound on its rounding error in units of eps; ``toward`` is a pass that it is to occupy."""
    builder = Builder(np.random.default_rng(draw(st.integers(0, 2**16))), "float")  # type: ignore[call-overload]
    chosen = [*draw(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=largest - 3 * (toward in TOWARD)))]  # type: ignore[misc]
    if toward in TOWARD:
        chosen.insert(draw(st.integers(0, 1)), TOWARD[toward])  # type: ignore[call-overload]
    for fragment in chosen:
        fragment(builder, draw)
    # A bound that lets a wrong result pass tests nothing.
    assume(builder.unrounded * np.finfo(np.float32).eps < 1e-4)
    builder.last = str(draw(st.sampled_from(["Neg", "Identity", "Relu"])))
    return builder.text(), builder.unrounded
