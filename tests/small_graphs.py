"""Small graphs with constants, from ONNX text and arrays, and what they compute in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.core.data import open_data

if TYPE_CHECKING:
    from pathlib import Path

    from deploycc.core.data import Dataset

SEED = 7


def graph(text: str, *, opset: int = 21, **constants: np.ndarray) -> ir.Model:
    """Parse ``(inputs) => (outputs) { nodes }``, add constants, name each node after its output, and infer the shapes."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}')
    for node in proto.graph.node:
        node.name = node.name or f"n_{node.output[0]}"
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def weight(*shape: int, seed: int = SEED) -> np.ndarray:
    """Return normal numbers of a size that keeps the variance of what they multiply."""
    fan_in = max(1, int(np.prod(shape[1:])) if len(shape) != 2 else shape[0])
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def random(*shape: int, seed: int = SEED + 1) -> np.ndarray:
    """Return standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compute(model: ir.Model, *, simulate: bool = False, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Run a graph; with ``simulate``, 16-bit types are emulated."""
    return OnnxRuntime().executor(model, simulate=simulate)(feeds)


def operators(model: ir.Model) -> list[str]:
    """Return the operator of every node."""
    return [n.op_type for n in model.graph]


def check(model: ir.Model) -> None:
    """Check a graph as strictly as ONNX can."""
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


def dataset(folder: Path, model: ir.Model, **arrays: np.ndarray) -> Dataset:
    """Write arrays to a file and open it as data for ``model``."""
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return open_data(str(path), model.graph.inputs, [], seed=0)


RESIDUAL = """(float[N,16,6,6] x) => (float[N,20] y) {
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) r1 = Relu(c1) c2 = Conv<pads=[1,1,1,1]>(r1, w2) s = Conv(x, w3)
    a = Add(s, c2) r2 = Relu(a) f = Flatten(r2) y = Gemm<transB=1>(f, w4, b4) }"""

TRANSFORMER = """(float[N,16,64] x) => (float[N,16,64] y) {
    ln = LayerNormalization(x, g, b)
    q0 = MatMul(ln, wq) k0 = MatMul(ln, wk) v0 = MatMul(ln, wv)
    q2 = Reshape(q0, heads) k2 = Reshape(k0, heads) v2 = Reshape(v0, heads)
    q = Transpose<perm=[0,2,1,3]>(q2) k = Transpose<perm=[0,2,3,1]>(k2) v = Transpose<perm=[0,2,1,3]>(v2)
    s0 = MatMul(q, k) s1 = Mul(s0, scale) p = Softmax<axis=-1>(s1) o = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, flat) y0 = MatMul(o2, wo) y1 = Add(x, y0) y = Relu(y1) }"""


def residual() -> ir.Model:
    """Return a small convolutional network with a skip and a classifier."""
    convs = {"w1": weight(32, 16, 3, 3, seed=1), "w2": weight(32, 32, 3, 3, seed=2), "w3": weight(32, 16, 1, 1, seed=3)}
    return graph(RESIDUAL, **convs, b1=weight(32, seed=4), w4=weight(1152, 20, seed=5).T.copy(), b4=weight(20, seed=6))


def transformer() -> ir.Model:
    """Return one attention block: a normalisation, three projections, two heads."""
    products = {name: weight(64, 64, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    vectors = {"g": np.linspace(0.5, 1.5, 64, dtype=np.float32), "b": np.zeros(64, np.float32), "scale": np.float32(0.18)}
    return graph(TRANSFORMER, heads=np.array([0, 16, 2, 32]), flat=np.array([0, 16, 64]), **products, **vectors)
