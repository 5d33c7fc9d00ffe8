"""InternImage through the main job: sizes of the variants, export by the translation table, precision, engines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from kernel_cases import ROOT

from deploycc import registry
from deploycc.core.dcnv3 import attributes_of, nodes_of
from deploycc.export import export
from deploycc.interop import load_model
from deploycc.pipeline import build
from deploycc.request import BuildRequest

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLE = ROOT / "examples" / "internimage"
# Millions of parameters in the paper.
PAPER = {"t": 30, "s": 50, "b": 97, "l": 223, "xl": 335, "h": 1080}


@pytest.fixture(scope="module")
def internimage() -> Any:
    """Import the example's module."""
    sys.path.insert(0, str(EXAMPLE))
    import internimage

    yield internimage
    sys.path.remove(str(EXAMPLE))


@pytest.mark.parametrize("name", PAPER)
def test_variants_have_the_parameters_of_the_paper(internimage: ModuleType, name: str) -> None:
    with torch.device("meta"):
        model = internimage.InternImage(internimage.VARIANTS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PAPER[name], rel=0.02)


def exported(internimage: ModuleType, variant: Any, folder: Path, *, size: int = 64, **options: int) -> tuple[torch.nn.Module, Path]:
    """Return a seeded model and its export with a dynamic batch."""
    torch.manual_seed(0)
    model = internimage.InternImage(variant, **options).eval()
    internimage.seeded = lambda: model
    images = options.get("images", 3)
    shape = "image=" + ":".join(f"{batch}x{images}x{size}x{size}" for batch in (1, 2, 16))
    return model, export("internimage:seeded", folder / "model.onnx", shapes=(shape,), plugins=registry.plugins())


def relative(model: torch.nn.Module, path: Path, batch: int, size: int) -> float:
    """Return the largest difference of ONNX Runtime from PyTorch in units of the largest logit."""
    import onnxruntime

    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x).numpy()
    found = onnxruntime.InferenceSession(str(path)).run(None, {"image": x.numpy()})[0]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_export_is_one_node_per_layer_and_computes_the_same(internimage: ModuleType, tmp_path: Path) -> None:
    variant = internimage.Variant(32, (1, 1), layer_scale=1.0, offset_scale=2.0)
    model, path = exported(internimage, variant, tmp_path)
    proto = onnx.load(path)
    assert [f.name for f in proto.functions] == ["DCNv3"]
    assert sum(n.domain == "deploycc" for n in proto.graph.node) == 2
    assert {n.op_type for n in proto.graph.node}.isdisjoint({"GridSample"})
    assert max(relative(model, path, batch, 64) for batch in (1, 3)) <= 1e-4


@pytest.mark.slow
def test_the_large_form_exports_and_its_blend_is_fused(internimage: ModuleType, tmp_path: Path) -> None:
    """What only the billion-parameter model has, at a fraction of its size."""
    variant = internimage.Variant(32, (1, 4), post_norm=False, layer_scale=None, large=True, post_norm_every=1)
    model, path = exported(internimage, variant, tmp_path)
    assert relative(model, path, 2, 64) <= 1e-4
    report, folder = build(BuildRequest(model=path, precision="fp32", data="synthetic:2", targets=("onnxruntime",), out=tmp_path / "out"))
    lowered = load_model(folder / "model.onnx").model
    assert [n.op_type for n in nodes_of(lowered)] == ["DCNv3Center"] * 5
    assert report.verification[0]["sqnr_db"] > 100


def test_builds_never_quantize_offsets(internimage: ModuleType, tmp_path: Path) -> None:
    path = EXAMPLE / "fashion.onnx"
    data = f"{ROOT / 'examples' / 'fashion' / 'cnn.calib.npz'}"
    for precision in ("fp16", "int8"):
        request = BuildRequest(model=path, precision=precision, data=data, targets=("onnxruntime",), out=tmp_path / precision)
        report, folder = build(request)
        lowered = load_model(folder / "model.onnx").model
        for node in nodes_of(lowered):
            assert (attributes_of(node).softmax, attributes_of(node).record) == (1, 1)
            assert node.inputs[1] is not None
            # The base format on the CPU is FP32 but for --precision fp16.
            base = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.FLOAT
            assert node.inputs[1].dtype == base
            producer = node.inputs[1].producer()
            while producer is not None and producer.op_type != "MatMul":
                producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
            assert producer is not None
            assert producer.inputs[1] is not None
            assert producer.inputs[1].dtype == base, "the projection of offsets is not quantized (rule D2)"
        assert report.verification[0]["sqnr_db"] > (40 if precision == "fp16" else 15)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120"])
def test_engines_for_tensorrt_rtx(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    for precision in ("fp16", "int8"):
        request = BuildRequest(
            model=EXAMPLE / "fashion.onnx",
            precision=precision,
            targets=(f"tensorrt-rtx:{arch}",),
            data="synthetic:8",
            out=tmp_path / precision,
        )
        report, _ = build(request)
        assert report.engines[0]["bytes"] > 100_000


@pytest.mark.slow
def test_internimage_t_in_full(internimage: ModuleType, tmp_path: Path) -> None:
    """Export, comparison with PyTorch, and one engine for three architectures with a dynamic batch: minutes."""
    pytest.importorskip("tensorrt_rtx")
    model, path = exported(internimage, internimage.VARIANTS["t"], tmp_path, size=224)
    assert max(relative(model, path, batch, 224) for batch in (1, 2)) <= 1e-4
    target = "tensorrt-rtx:sm_80+sm_89+sm_120"
    report, _ = build(BuildRequest(model=path, precision="fp16", data="synthetic:2", targets=(target,), out=tmp_path / "out"))
    assert report.verification[0]["sqnr_db"] > 40
