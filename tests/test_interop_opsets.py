"""Loading a model raises its opset and keeps its meaning: every operator whose form changed, at every opset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycc.interop import from_proto, load_model, to_bytes
from deploycc.interop.frontend import normalized
from deploycc.interop.weights import attach, detach

RNG = np.random.default_rng(7)
BOUND = 1e-5  # both sides compute the same float32 operations, at most in another order


@dataclass
class Sketch:
    """Nodes and constants of a model under construction."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def const(self, name: str, values: object, dtype: type = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def axes(self, values: list[int], since: int) -> tuple[list[str], dict[str, object]]:
        """Return axes as an attribute, or as an input from opset ``since`` on."""
        return ([self.const("axes", values, np.int64)], {}) if self.opset >= since else ([], {"axes": values})

    def node(self, op: str, inputs: list[str], **attributes: object) -> None:
        outputs = attributes.pop("outputs", ["y"])
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 4).astype(np.float32)


Build = Callable[[Sketch], None]
CASES: dict[str, tuple[tuple[int, ...], range, Build]] = {}


def case(shape: tuple[int, ...], since: int = 7, until: int = 23) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        CASES[build.__name__] = (shape, range(since, until + 1), build)
        return build

    return register


@case((2, 3, 4, 1))
def squeeze(s: Sketch) -> None:
    axes, attributes = s.axes([3], 13)
    s.node("Squeeze", ["x", *axes], **attributes)


@case((2, 3, 1, 4))
def squeeze_negative(s: Sketch) -> None:
    axes, attributes = s.axes([-2] if s.opset >= 11 else [2], 13)
    s.node("Squeeze", ["x", *axes], **attributes)


@case((2, 3, 4))
def unsqueeze(s: Sketch) -> None:
    axes, attributes = s.axes([1, 4], 13)
    s.node("Unsqueeze", ["x", *axes], **attributes)


@case((2, 3, 4))
def reduce_sum(s: Sketch) -> None:
    axes, attributes = s.axes([1], 13)
    s.node("ReduceSum", ["x", *axes], keepdims=0, **attributes)


@case((2, 3, 4, 4))
def reduce_mean(s: Sketch) -> None:
    axes, attributes = s.axes([2, 3], 18)
    s.node("ReduceMean", ["x", *axes], keepdims=1, **attributes)


@case((2, 3, 4))
def reduce_max_all(s: Sketch) -> None:
    s.node("ReduceMax", ["x"], keepdims=1)


@case((2, 3, 4))
def reduce_l2(s: Sketch) -> None:
    axes, attributes = s.axes([-1] if s.opset >= 11 else [2], 18)
    s.node("ReduceL2", ["x", *axes], keepdims=1, **attributes)


@case((2, 6, 4))
def split_sizes(s: Sketch) -> None:
    inputs, attributes = ([s.const("sizes", [2, 4], np.int64)], {}) if s.opset >= 13 else ([], {"split": [2, 4]})
    s.node("Split", ["x", *inputs], outputs=["a", "b"], axis=1, **attributes)
    s.node("Concat", ["b", "a"], axis=1)


@case((2, 6, 4))
def split_equal(s: Sketch) -> None:
    attributes = {"num_outputs": 2} if s.opset >= 18 else {}
    s.node("Split", ["x"], outputs=["a", "b"], axis=1, **attributes)
    s.node("Concat", ["b", "a"], axis=1)


@case((2, 3, 4))
def softmax_default(s: Sketch) -> None:
    s.node("Softmax", ["x"])


@case((2, 3, 4, 5))
def softmax_axis(s: Sketch) -> None:
    s.node("Softmax", ["x"], axis=2)


@case((2, 3, 4))
def log_softmax(s: Sketch) -> None:
    s.node("LogSoftmax", ["x"], axis=1)


@case((1, 3, 4, 4))
def pad_constant(s: Sketch) -> None:
    pads = [0, 0, 1, 2, 0, 0, 2, 1]
    if s.opset >= 11:
        s.node("Pad", ["x", s.const("pads", pads, np.int64), s.const("fill", 0.5)], mode="constant")
    else:
        s.node("Pad", ["x"], pads=pads, value=0.5, mode="constant")


@case((1, 3, 5, 5))
def pad_reflect(s: Sketch) -> None:
    pads = [0, 0, 1, 2, 0, 0, 2, 1]
    if s.opset >= 11:
        s.node("Pad", ["x", s.const("pads", pads, np.int64)], mode="reflect")
    else:
        s.node("Pad", ["x"], pads=pads, mode="reflect")


def _resize(s: Sketch, **attributes: object) -> None:
    scales = s.const("scales", [1, 1, 2, 2])
    roi = s.const("roi", []) if s.opset < 13 else ""
    s.node("Resize", ["x", roi, scales], **attributes)


@case((1, 3, 4, 4), since=11)
def resize_linear_half_pixel(s: Sketch) -> None:
    _resize(s, mode="linear", coordinate_transformation_mode="half_pixel")


@case((1, 3, 4, 4), since=11)
def resize_cubic_align_corners(s: Sketch) -> None:
    _resize(s, mode="cubic", coordinate_transformation_mode="align_corners", cubic_coeff_a=-0.75)


@case((1, 3, 4, 4), since=11)
def resize_nearest_asymmetric(s: Sketch) -> None:
    _resize(s, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@case((1, 3, 4, 4), since=11)
def resize_sizes(s: Sketch) -> None:
    roi, scales = (s.const("roi", []), s.const("scales", [])) if s.opset < 13 else ("", "")
    s.node(
        "Resize", ["x", roi, scales, s.const("sizes", [1, 3, 7, 9], np.int64)], mode="linear", coordinate_transformation_mode="half_pixel"
    )


@case((1, 3, 4, 4), since=10, until=10)
def resize_ten_linear(s: Sketch) -> None:
    s.node("Resize", ["x", s.const("scales", [1, 1, 2, 2])], mode="linear")


@case((1, 3, 4, 4), since=10, until=10)
def resize_ten_nearest(s: Sketch) -> None:
    s.node("Resize", ["x", s.const("scales", [1, 1, 2, 3])], mode="nearest")


@case((1, 3, 8, 8), since=10, until=10)
def resize_ten_shrinks(s: Sketch) -> None:
    s.node("Resize", ["x", s.const("scales", [1, 1, 0.5, 0.75])], mode="nearest")


@case((1, 3, 4, 4), since=10, until=10)
def resize_ten_fraction(s: Sketch) -> None:
    s.node("Resize", ["x", s.const("scales", [1, 1, 1.5, 2.5])], mode="nearest")


@case((1, 3, 4, 4), until=9)
def upsample_nearest(s: Sketch) -> None:
    if s.opset >= 9:
        s.node("Upsample", ["x", s.const("scales", [1, 1, 2, 2])], mode="nearest")
    else:
        s.node("Upsample", ["x"], scales=[1.0, 1.0, 2.0, 2.0], mode="nearest")


@case((1, 3, 4, 4), until=9)
def upsample_linear(s: Sketch) -> None:
    if s.opset >= 9:
        s.node("Upsample", ["x", s.const("scales", [1, 1, 2, 2])], mode="linear")
    else:
        s.node("Upsample", ["x"], scales=[1.0, 1.0, 2.0, 2.0], mode="linear")


@case((2, 3, 4))
def clip(s: Sketch) -> None:
    if s.opset >= 11:
        s.node("Clip", ["x", s.const("low", 0.0), s.const("high", 0.5)])
    else:
        s.node("Clip", ["x"], min=0.0, max=0.5)


@case((2, 3, 4))
def clip_one_side(s: Sketch) -> None:
    if s.opset >= 11:
        s.node("Clip", ["x", "", s.const("high", 0.5)])
    else:
        s.node("Clip", ["x"], max=0.5)


@case((2, 3, 4))
def dropout(s: Sketch) -> None:
    s.node("Dropout", ["x"], **({"ratio": 0.3} if s.opset < 12 else {}))


@case((2, 3, 4, 4))
def batch_normalization(s: Sketch) -> None:
    s.node("BatchNormalization", ["x", s.const("g", weight(3)), s.const("t", weight(3)), s.const("m", weight(3)), s.const("v", [1, 2, 3])])


@case((1, 2, 5, 5), since=16)
def grid_sample(s: Sketch) -> None:
    mode = "bilinear" if s.opset < 20 else "linear"
    s.node("GridSample", ["x", s.const("grid", RNG.uniform(-1, 1, (1, 4, 4, 2)))], mode=mode, padding_mode="border", align_corners=1)


@case((1, 2, 5, 5), since=16)
def grid_sample_cubic(s: Sketch) -> None:
    mode = "bicubic" if s.opset < 20 else "cubic"
    s.node("GridSample", ["x", s.const("grid", RNG.uniform(-1, 1, (1, 4, 4, 2)))], mode=mode)


@case((1, 2, 6, 6))
def average_pool(s: Sketch) -> None:
    s.node("AveragePool", ["x"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], count_include_pad=1)


@case((1, 2, 7, 7), since=10)
def average_pool_ceil(s: Sketch) -> None:
    s.node("AveragePool", ["x"], kernel_shape=[3, 3], pads=[0, 0, 0, 0], strides=[2, 2], ceil_mode=1)


@case((1, 2, 6, 6))
def max_pool(s: Sketch) -> None:
    s.node("MaxPool", ["x"], kernel_shape=[3, 3], strides=[2, 2])


@case((2, 3, 4))
def cast(s: Sketch) -> None:
    s.node("Cast", ["x"], outputs=["whole"], to=TensorProto.INT64)
    s.node("Cast", ["whole"], to=TensorProto.FLOAT)


@case((2, 8))
def top_k(s: Sketch) -> None:
    if s.opset >= 10:
        s.node("TopK", ["x", s.const("k", [3], np.int64)], outputs=["y", "index"], axis=1)
    else:
        s.node("TopK", ["x"], outputs=["y", "index"], k=3, axis=1)


@case((2, 3, 4))
def reshape(s: Sketch) -> None:
    s.node("Reshape", ["x", s.const("shape", [0, -1], np.int64)])


@case((2, 3, 4))
def shape_of(s: Sketch) -> None:
    s.node("Shape", ["x"], outputs=["dims"])
    s.node("Gather", ["dims", s.const("which", [0, 2], np.int64)], outputs=["some"], axis=0)
    s.node("Concat", ["some", s.const("rest", [-1], np.int64)], outputs=["target"], axis=0)
    s.node("Reshape", ["x", "target"])


@case((2, 6, 4))
def slice_step(s: Sketch) -> None:
    if s.opset >= 10:
        names = [s.const(n, v, np.int64) for n, v in (("starts", [1]), ("ends", [6]), ("where", [1]), ("steps", [2]))]
        s.node("Slice", ["x", *names])
    else:
        s.node("Slice", ["x"], starts=[1], ends=[6], axes=[1])


@case((2, 40))
def gemm(s: Sketch) -> None:
    s.node("Gemm", ["x", s.const("w", weight(50, 40)), s.const("b", weight(50))], transB=1)


@case((2, 8))
def gemm_without_bias(s: Sketch) -> None:
    s.node("Gemm", ["x", s.const("w", weight(8, 5)), *([s.const("b", weight(5))] if s.opset < 11 else [])])


@case((1, 16, 6, 6))
def convolution(s: Sketch) -> None:
    s.node("Conv", ["x", s.const("w", weight(16, 16, 3, 3)), s.const("b", weight(16))], pads=[1, 1, 1, 1])


@case((2, 4, 6), since=17)
def layer_normalization(s: Sketch) -> None:
    s.node("LayerNormalization", ["x", s.const("g", weight(6)), s.const("t", weight(6))], epsilon=1e-5)


@case((2, 4, 6, 6), since=18)
def group_normalization(s: Sketch) -> None:
    width = 4 if s.opset >= 21 else 2
    s.node("GroupNormalization", ["x", s.const("g", [0.5] * width), s.const("t", [0.1] * width)], num_groups=2)


@case((2, 3, 4))
def global_pool_flatten(s: Sketch) -> None:
    s.node("GlobalAveragePool", ["x"], outputs=["pooled"])
    s.node("Flatten", ["pooled"])


@case((2, 4, 3, 3), since=11)
def depth_to_space(s: Sketch) -> None:
    s.node("DepthToSpace", ["x"], blocksize=2, mode="CRD")


@case((2, 3, 4), since=9)
def where_mask(s: Sketch) -> None:
    s.node("Greater", ["x", s.const("zero", 0.0)], outputs=["keep"])
    s.node("Where", ["keep", "x", s.const("minus", -np.inf)], outputs=["masked"])
    s.node("Concat", ["masked", s.const("pad", np.ones((2, 3, 1)))], outputs=["wide"], axis=2)
    s.node("Softmax", ["wide"], axis=2)


@case((2, 3, 4), since=14)
def hardswish(s: Sketch) -> None:
    s.node("HardSwish", ["x"])


@case((2, 3, 4), since=10)
def quantize(s: Sketch) -> None:
    scale, zero = s.const("scale", 0.05), s.const("zero", 0, np.int8)
    s.node("QuantizeLinear", ["x", scale, zero], outputs=["q"])
    s.node("DequantizeLinear", ["q", scale, zero])


@case((2, 3, 4))
def branches(s: Sketch) -> None:
    then = helper.make_graph([helper.make_node("Mul", ["x", "two"], ["t"])], "then", [], [_info("t", None)])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "else", [], [_info("e", None)])
    s.const("two", 2.0)
    s.nodes.append(helper.make_node("Constant", [], ["flag"], value=numpy_helper.from_array(np.array(True))))
    s.node("If", ["flag"], then_branch=then, else_branch=other)


def _info(name: str, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model_of(name: str, opset: int) -> onnx.ModelProto:
    shape, _, build = CASES[name]
    sketch = Sketch(opset)
    build(sketch)
    inputs = [_info("x", shape)]
    if opset < 9:  # before IR version 4 every initializer is an input too
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in sketch.constants]
    graph = helper.make_graph(sketch.nodes, name, inputs, [_info("y", None)], sketch.constants)
    ir_version = 3 if opset < 9 else 8 if opset < 20 else 10
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def outputs_of(model: bytes, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options).run(["y"], {"x": x})[0]


@pytest.mark.parametrize(("name", "opset"), [(n, o) for n, (_, opsets, _) in CASES.items() for o in opsets])
def test_every_opset_keeps_its_meaning(name: str, opset: int) -> None:
    before = model_of(name, opset)
    x = RNG.standard_normal(CASES[name][0]).astype(np.float32)
    expected = outputs_of(before.SerializeToString(), x)

    held = detach(skeleton := onnx.ModelProto.FromString(before.SerializeToString()), Path())
    loaded = from_proto(normalized(skeleton, opset=20, path="m.onnx"))
    attach(loaded, held)

    assert loaded.graph.opset_imports[""] == max(opset, 20)
    assert [v.name for v in loaded.graph.inputs] == ["x"]
    assert all(node.name for node in loaded.graph)
    np.testing.assert_allclose(outputs_of(to_bytes(loaded), x), expected, rtol=BOUND, atol=BOUND)


def test_a_file_is_raised_in_a_child_process(tmp_path: Path) -> None:
    onnx.save(model_of("convolution", 11), tmp_path / "m.onnx")
    artefact = load_model(tmp_path / "m.onnx")
    assert artefact.model.graph.opset_imports[""] == 20
