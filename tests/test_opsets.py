"""Models of every opset from 11 to 23 become engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycc.pipeline import build
from deploycc.request import BuildRequest


def classifier(opset: int) -> onnx.ModelProto:
    """A classifier of ops whose form changed between opsets: BatchNormalization, Clip, Squeeze, ReduceMean, Softmax, Pad."""
    draw = np.random.default_rng(opset)
    constants = {
        "w": draw.normal(0, 0.1, (32, 3, 3, 3)),
        "gamma": draw.uniform(0.5, 1.5, 32),
        "beta": draw.normal(0, 0.1, 32),
        "mean": draw.normal(0, 0.1, 32),
        "variance": draw.uniform(0.5, 1.5, 32),
        "fc": draw.normal(0, 0.1, (32, 16)),
        "zero": np.array(0.0),
        "six": np.array(6.0),
    }
    initializers = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in constants.items()]
    integers = {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "axes": [2, 3]}
    initializers += [numpy_helper.from_array(np.array(a, np.int64), name) for name, a in integers.items()]
    reduce_inputs, reduce_axes = (["clipped", "axes"], {}) if opset >= 18 else (["clipped"], {"axes": [2, 3]})
    squeeze_inputs, squeeze_axes = (["mean2d", "axes"], {}) if opset >= 13 else (["mean2d"], {"axes": [2, 3]})
    nodes = [
        helper.make_node("Pad", ["image", "pads"], ["padded"]),
        helper.make_node("Conv", ["padded", "w"], ["conv"], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["conv", "gamma", "beta", "mean", "variance"], ["normal"]),
        helper.make_node("Clip", ["normal", "zero", "six"], ["clipped"]),
        helper.make_node("ReduceMean", reduce_inputs, ["mean2d"], keepdims=1, **reduce_axes),
        helper.make_node("Squeeze", squeeze_inputs, ["features"], **squeeze_axes),
        helper.make_node("MatMul", ["features", "fc"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 16])
    graph = helper.make_graph(nodes, "classifier", [image], [scores], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 19 else 10)


@pytest.mark.parametrize("opset", range(11, 24))
def test_a_model_of_this_opset_becomes_an_int8_engine(opset: int, tmp_path: Path) -> None:
    onnx.save(classifier(opset), tmp_path / "model.onnx")
    request = {"precision": "int8", "targets": ("tensorrt-rtx:sm_80",), "shapes": ("image=1:16:32",), "out": tmp_path / "out"}
    report, _ = build(BuildRequest(tmp_path / "model.onnx", **request))
    assert report.engines[0]["counts"]["conv_int8"] == 1
    assert report.engines[0]["counts"]["fc_int8"] == 1
    assert report.verification[0]["sqnr_db"] > 25
