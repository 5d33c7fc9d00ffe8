"""Export: real modules through torch.export, and a sentence for everything that cannot be exported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from deploycc.core.errors import UsageError
from deploycc.export import export
from deploycc.interop import load_model

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Config:
    width: int = 6

class Net(nn.Module):
    default_cfg = {"input_size": (3, 8, 8)}

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, Config().width, 3), nn.ReLU())
        self.head = nn.Linear(Config().width, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

class Choosing(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

class Pair(nn.Module):
    def forward(self, x, y):
        return x @ y

def net(): return Net()
def choosing(): return Choosing()
def pair(): return Pair()
def number(): return 3
def needs(width): return Net()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a Python file with functions that return modules."""
    path = tmp_path / "my_models.py"
    path.write_text(SOURCE)
    yield path
    sys.modules.pop("deploycc_source_my_models", None)


def refusal(source: object, tmp_path: Path, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        export(str(source), tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "m.onnx").exists()
    return str(caught.value)


def test_a_module_with_weights_from_a_file(source: Path, tmp_path: Path) -> None:
    sizes = {"body.0.weight": (6, 3, 3, 3), "body.0.bias": (6,), "head.weight": (4, 6), "head.bias": (4,)}
    state = {name: torch.randn(size) for name, size in sizes.items()}
    save_file(state, tmp_path / "w.safetensors")
    path = export(f"{source}:net", tmp_path / "m.onnx", weights=tmp_path / "w.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["m.onnx", "my_models.py", "w.safetensors"]
    model = load_model(path).model
    assert [(v.name, str(v.shape)) for v in model.graph.inputs] == [("image", "[batch,3,8,8]")]
    scopes = {n.metadata_props.get("pkg.torch.onnx.name_scopes", "") for n in model.graph}
    assert any("body.0" in text for text in scopes)
    x = torch.randn(3, 3, 8, 8)
    features = torch.nn.functional.conv2d(x, state["body.0.weight"], state["body.0.bias"]).relu().mean((2, 3))
    expected = features @ state["head.weight"].T + state["head.bias"]
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": x.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_two_inputs_of_given_shapes(source: Path, tmp_path: Path) -> None:
    path = export(f"{source}:pair", tmp_path / "m.onnx", shapes=["a=1x4x5:2x4x5:8x4x5", "b=5x3"], opset=21)
    model = load_model(path).model
    assert [(v.name, str(v.shape)) for v in model.graph.inputs] == [("a", "[batch,4,5]"), ("b", "[5,3]")]
    assert model.graph.opset_imports[""] == 21


class TestRefusals:
    def test_what_torch_cannot_export(self, source: Path, tmp_path: Path) -> None:
        said = refusal(f"{source}:choosing", tmp_path, shapes=["x=1x3:2x3:4x3"])
        assert said.startswith("torch.export refused the model: ")
        assert "data-dependent control flow cannot be exported" in said
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".export")] == []

    def test_what_is_no_module(self, source: Path, tmp_path: Path) -> None:
        assert "gave a int, not an nn.Module. Where: SOURCE." in refusal(f"{source}:number", tmp_path)

    def test_a_function_with_arguments(self, source: Path, tmp_path: Path) -> None:
        said = refusal(f"{source}:needs", tmp_path)
        assert "failed with TypeError: needs() missing 1 required positional argument: 'width'. Where: SOURCE." in said

    def test_an_unknown_function(self, source: Path, tmp_path: Path) -> None:
        said = refusal(f"{source}:nett", tmp_path)
        assert "has no function 'nett'." in said
        assert "Fix: its functions are net, choosing, pair, number, needs." in said

    def test_a_missing_file_and_a_missing_module(self, tmp_path: Path) -> None:
        assert "nowhere.py does not exist. Where: SOURCE." in refusal(f"{tmp_path}/nowhere.py:net", tmp_path)
        assert "'no.such.module' cannot be imported: No module named 'no'" in refusal("no.such.module:net", tmp_path)

    def test_code_that_raises(self, tmp_path: Path) -> None:
        (tmp_path / "broken.py").write_text("width = heigth")
        assert "broken.py' cannot be imported: name 'heigth' is not defined." in refusal(f"{tmp_path}/broken.py:net", tmp_path)

    def test_an_unknown_timm_model(self, tmp_path: Path) -> None:
        said = refusal("timm:resnet5000", tmp_path)
        assert said.startswith("timm has no model 'resnet5000'. Where: SOURCE. Fix: for example resnet50")

    def test_weights(self, source: Path, tmp_path: Path) -> None:
        net = f"{source}:net"
        (tmp_path / "w.pt").write_bytes(b"pickle")
        assert "w.pt is not a safetensors file. Where: --weights. Fix: convert it" in refusal(net, tmp_path, weights=tmp_path / "w.pt")
        assert "none.safetensors does not exist" in refusal(net, tmp_path, weights=tmp_path / "none.safetensors")
        (tmp_path / "bad.safetensors").write_bytes(b"not safetensors")
        assert "the weights cannot be loaded: " in refusal(net, tmp_path, weights=tmp_path / "bad.safetensors")
        save_file({"head.bias": torch.zeros(4), "tail": torch.zeros(1)}, tmp_path / "few.safetensors")
        said = refusal(net, tmp_path, weights=tmp_path / "few.safetensors")
        assert (
            "the weights do not fit: 3 missing (first ['body.0.weight', 'body.0.bias', 'head.weight']), 1 unknown (first ['tail'])." in said
        )
        save_file({"head.bias": torch.zeros(5)}, tmp_path / "wide.safetensors")
        assert "size mismatch for head.bias" in refusal(net, tmp_path, weights=tmp_path / "wide.safetensors")
