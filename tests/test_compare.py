"""Two models side by side: outputs, layers, formats, sizes, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import graph, random, residual, weight

from deploycc import cli
from deploycc.compare import compare
from deploycc.core.contract import QUANTIZED
from deploycc.core.errors import UsageError
from deploycc.core.formats import FP32, INT8
from deploycc.core.passes import run
from deploycc.core.plan import Assignment, PrecisionPlan
from deploycc.pipeline import build
from deploycc.quant.regions import partition
from deploycc.request import BuildRequest
from passes.insert_qdq import InsertQdq


def quantized(*names: str) -> ir.Model:
    """Return the residual network with some regions in INT8, on a coarse scale."""
    model = residual()
    regions = partition(model)
    chosen = tuple(Assignment(r, INT8 if r.name in names else FP32, "test") for r in regions)
    scales = {v: {"int8": 0.1} for r in regions for v in (*r.activations, *r.residuals)}
    return run(model, [InsertQdq(PrecisionPlan(FP32, chosen, scales))], contract=QUANTIZED)[0]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return the network as it is, with one region in INT8, and data with labels."""
    first = partition(residual())[0].name
    a, b, data = tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "data.npz"
    ir.save(residual(), a)
    ir.save(quantized(first), b)
    np.savez(data, x=random(6, 16, 6, 6), labels=np.arange(6))
    return a, b, data


def test_what_differs_between_two_files(saved: tuple[Path, Path, Path]) -> None:
    a, b, data = saved
    found = compare(a, b, data=str(data))
    first = partition(residual())[0].name
    assert found.changed == [{"region": first, "torch": "", "a": "fp32", "b": "int8"}]
    assert (found.unmatched, [o.output for o in found.outputs]) == (0, ["y"])
    assert 10 < found.outputs[0].sqnr_db < 60
    layers = {row["region"]: row for row in found.layers}
    assert layers[first]["sqnr_db"] < 60
    parallel = next(r.name for r in partition(residual()) if r.activations == ("x",) and r.name != first)
    assert layers[parallel]["sqnr_db"] == 200  # It reads the input, and nothing of it is quantized.
    assert found.b.model_bytes < found.a.model_bytes
    assert found.b.latency_us > found.a.latency_us  # TensorRT-RTX runs a kernel of its own behind a convolution in INT8.
    assert found.accuracy["metric"] == "top-1"
    assert found.accuracy["samples"] == 6


def test_a_model_equals_itself(saved: tuple[Path, Path, Path]) -> None:
    a, _, data = saved
    found = compare(a, a, data=str(data))
    assert (found.changed, [o.sqnr_db for o in found.outputs]) == ([], [200.0])
    assert "every region has the same format" in str(found)


def test_text_and_json(saved: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, data = saved
    monkeypatch.setattr("sys.argv", ["deploycc", "compare", str(a), str(b), "--data", str(data), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    body = json.loads(capsys.readouterr().out)
    assert (ended.value.code, body["schema"], body["a"]["regions"]) == (0, "deploycc.comparison/1", {"fp32": 4})
    text = str(compare(a, b, data=str(data)))
    for words in ("1 regions in another format:", "fp32 -> int8", "output y: SQNR", "top-1: A ", "a roofline estimate, not a measurement"):
        assert words in text


def test_a_build_is_compared_with_the_file_that_it_is_from(tmp_path: Path) -> None:
    """The file's normalization is folded first: otherwise the convolution's output would mean another thing on either side."""
    norm = {name: np.full(32, value, np.float32) for name, value in {"g": 1.5, "b": 0.2, "m": 0.1, "v": 2.0}.items()}
    text = "(float[N,16,6,6] x) => (float[N,32,6,6] y) { c = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization(c, g, b, m, v) y = Relu(n) }"
    ir.save(graph(text, opset=20, w=weight(32, 16, 3, 3), **norm), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=random(4, 16, 6, 6))
    request = BuildRequest(tmp_path / "m.onnx", "int8", targets=("onnxruntime",), out=tmp_path / "built", shapes=("x=1:2:4",))
    _, directory = build(request)
    found = compare(tmp_path / "m.onnx", directory)
    assert found.data == str(tmp_path / "m.calib.npz")
    assert [(c["a"], c["b"]) for c in found.changed] == [("fp32", "int8")]
    assert found.outputs[0].sqnr_db > 25
    assert list(found.b.engine_bytes) == ["onnxruntime.onnx"]


@pytest.mark.parametrize(
    ("text", "message"), [("(float[N,8] z) => (float[N,8] y) { y = Relu(z) }", "the inputs differ: x and z"),
                          ("(float[N,16,6,6] x) => (float[N,16,6,6] q) { q = Relu(x) }", "the outputs differ: y and q")],
)  # fmt: skip
def test_models_with_other_ends_are_refused(tmp_path: Path, saved: tuple[Path, Path, Path], text: str, message: str) -> None:
    ir.save(graph(text), tmp_path / "other.onnx")
    with pytest.raises(UsageError, match=message):
        compare(saved[0], tmp_path / "other.onnx")


def test_a_directory_that_is_no_build_is_refused(tmp_path: Path, saved: tuple[Path, Path, Path]) -> None:
    (tmp_path / "some").mkdir()
    with pytest.raises(UsageError, match="is not a build directory"):
        compare(saved[0], tmp_path / "some")
