"""Files as InternImage's own exporter writes them, nodes of the domain mmdeploy included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from pass_graphs import apply, execute, graph, operators

from deploycc.core.contract import CANONICAL, violations
from deploycc.core.dcnv3 import attributes_of, nodes_of
from deploycc.core.errors import UsageError
from deploycc.interop import load_model
from deploycc.pipeline import build
from deploycc.request import BuildRequest
from passes.import_dcnv3 import ImportDcnv3
from plugins_trt.dcnv3 import DCNv3, reference

TWELVE = {
    "kernel_h": 3,
    "kernel_w": 3,
    "stride_h": 1,
    "stride_w": 1,
    "pad_h": 1,
    "pad_w": 1,
    "dilation_h": 1,
    "dilation_w": 1,
    "group": 2,
    "group_channels": 4,
    "offset_scale": 1.0,
    "im2col_step": 256,
}


def text(changes: dict[str, object] | None = None, *, points: int = 9, rows: int = 4, columns: int = 5) -> str:
    attributes = {k: v for k, v in {**TWELVE, **(changes or {})}.items() if v is not None}
    written = ", ".join(f"{k}={v}" for k, v in attributes.items())
    shapes = f"float[N,4,5,8] x, float[N,{rows},{columns},{4 * points}] o, float[N,{rows},{columns},{2 * points}] m"
    return f"({shapes}) => (float[N,?,?,8] y) {{ d = mmdeploy.TRTDCNv3<{written}>(x, o, m) y = Relu(d) }}"


@pytest.mark.parametrize(
    ("changes", "expected", "places"),
    [
        ({}, DCNv3(group=2), {}),
        ({"remove_center": 0}, DCNv3(group=2), {}),
        ({"remove_center": 1}, DCNv3(group=2, remove_center=1), {"points": 8}),
        (
            {"stride_h": 2, "stride_w": 2, "offset_scale": 2.0},
            DCNv3(group=2, stride_h=2, stride_w=2, offset_scale=2.0),
            {"rows": 2, "columns": 3},
        ),
    ],
)
def test_both_versions_of_the_operator(changes: dict[str, object], expected: DCNv3, places: dict[str, int]) -> None:
    after = apply(graph(text(changes, **places)), ImportDcnv3())
    assert operators(after) == ["DCNv3", "Relu"]
    assert attributes_of(nodes_of(after)[0]) == expected
    draw = np.random.default_rng(0)
    shapes = [[2, *(int(d) for d in v.shape[1:])] for v in after.graph.inputs if v.shape is not None]  # type: ignore[call-overload]
    x, o, m = (draw.standard_normal(s).astype(np.float32) for s in shapes)
    found = execute(after, {"x": x, "o": o, "m": m})[0]
    np.testing.assert_allclose(found, np.maximum(reference(x, o, m, expected), 0), atol=2e-5)


def test_shapes_behind_the_node_are_inferred() -> None:
    after = apply(graph(text({"stride_h": 2}, rows=2)), ImportDcnv3())
    assert next(list(n.outputs[0].shape or []) for n in after.graph)[1:] == [2, 5, 8]
    assert not list(violations(after, CANONICAL))
    assert list(violations(graph(text()), CANONICAL)) == ["'n_d' is still mmdeploy::TRTDCNv3"]


@pytest.mark.parametrize(
    ("changes", "places", "message"),
    [
        ({"kernel_w": None}, {}, "it has no attribute kernel_w"),
        ({"group_channels": 8}, {}, "2 groups of 8 channels do not make the 8 channels of x"),
        ({"stride_h": 0}, {}, "the attribute stride_h of DCNv3 is 0"),
        ({"stride_h": 2, "stride_w": 2}, {}, r"offset has the shape \[1, 4, 5, 36\], and \[1, 2, 3, 36\] was expected"),
    ],
)
def test_refuses(changes: dict[str, object], places: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply(graph(text(changes, **places)), ImportDcnv3())


@pytest.mark.parametrize("opset", [11, 16])
def test_a_build_takes_such_a_file(tmp_path: Path, opset: int) -> None:
    """The loader admits the node, the import makes it executable, and the reports say what was done."""
    path = tmp_path / "model.onnx"
    proto = onnx.parser.parse_model(f'<ir_version: 7, opset_import: ["": {opset}, "mmdeploy": 1]> g {text()}')
    onnx.save(proto, path)
    assert operators(load_model(path).model) == ["TRTDCNv3", "Relu"]
    report, _ = build(BuildRequest(model=path, precision="fp16", data="synthetic:2", targets=("onnxruntime",), out=tmp_path / "out"))
    assert any("imported with 12 attributes" in str(row["rewrites"]) for row in report.passes)
    assert report.verification[0]["sqnr_db"] > 40


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (("float", "bfloat16", "float"), "offset is BFLOAT16"),
        (("float", "float", "int8"), "mask is INT8"),
        (("int8", "float16", "float16"), "x is INT8"),
    ],
)
def test_types_that_no_kernel_takes_are_refused_in_any_file(types: tuple[str, str, str], message: str) -> None:
    x, o, m = types
    text = f"({x}[N,4,5,8] x, {o}[N,4,5,36] o, {m}[N,4,5,18] m) => ({x}[N,4,5,8] y) {{ y = deploycc.DCNv3<group=2>(x, o, m) }}"
    with pytest.raises(UsageError, match=message):
        ImportDcnv3()(graph(text))


def test_shapes_of_a_node_of_our_own_are_checked_too() -> None:
    text = "(float[N,4,5,8] x, float[N,4,5,36] o, float[N,4,5,20] m) => (float[N,4,5,8] y) { y = deploycc.DCNv3<group=2>(x, o, m) }"
    with pytest.raises(UsageError, match=r"mask has the shape \[1, 4, 5, 20\], and \[1, 4, 5, 18\] was expected"):
        ImportDcnv3()(graph(text))
