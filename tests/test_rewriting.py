"""The passes of a build: options that reach them, what --verify-each and --dump do, and what the report says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from small_graphs import graph, weight

from deploycc.core.errors import UsageError
from deploycc.explain import explain_passes
from deploycc.interop import save_model
from deploycc.pipeline import build
from deploycc.request import BuildRequest, Silent, resolve
from deploycc.rewriting import chosen_passes, verification_feeds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deploycc.core.report import BuildReport

# Right wherever nothing is negative.
CARELESS = '''
from dataclasses import dataclass
from deploycc.core.passes import Decline, PassResult, Rewrite

@dataclass(frozen=True)
class ZzCareless:
    """Pretend that a Relu does nothing."""
    phase, after = "canonicalize", ("merge-convolutions",)

    def __call__(self, model):
        for node in model.graph:
            if node.op_type == "Relu":
                node.op_type = "Identity"
                return PassResult((Rewrite(node.name, "made it faster"),), (Decline(node.name, "NOTHING", "there was more"),))
        return PassResult()
'''


def model(folder: Path, size: str = "6,6") -> Path:
    text = f"(float[N,4,{size}] x) => (float[N,4,?,?] y) {{ i = Identity(x) c = Conv<pads=[1,1,1,1]>(i, w) y = Relu(c) }}"
    save_model(graph(text, opset=20, w=weight(4, 4, 3, 3)), folder / "net.onnx")
    return folder / "net.onnx"


def request(folder: Path, **options: Any) -> BuildRequest:
    given = {"precision": "fp32", "targets": ("onnxruntime",), "out": folder / "out", "shapes": ("x=1:2:4",)} | options
    return BuildRequest(model=given.pop("model", None) or model(folder), **given)


def built(folder: Path, **options: Any) -> BuildReport:
    return build(request(folder, **options))[0]


class TestOptions:
    @pytest.mark.parametrize("merge", ["exact", "off", "all"])
    def test_merge_reaches_the_passes_that_have_it(self, tmp_path: Path, merge: str) -> None:
        job = resolve(request(tmp_path, merge=merge, targets=("tensorrt-rtx:sm_89",)), Silent())
        merging = [each for each in chosen_passes(job, "canonicalize") if hasattr(each, "merge")]
        assert len(merging) >= 3
        assert {(each.merge, each.arch, each.batch) for each in merging} == {(merge, "sm_89", 2)}  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"merge": "most"}, r"unknown way of merging 'most'\. Where: --merge\. Fix: use one of exact, off, all\."),
            ({"dump": "."}, r"is not an empty directory\. Where: --dump\. Fix: name a directory that does not exist yet\."),
            ({"dump": "net.onnx"}, r"is not an empty directory\."),
            ({"dump": "out/graphs"}, r"is inside the build directory\. Where: --dump\. Fix: name a directory beside it\."),
        ],
    )
    def test_refusals(self, tmp_path: Path, options: dict[str, str], message: str) -> None:
        path = model(tmp_path)
        with pytest.raises(UsageError, match=message):
            built(tmp_path, model=path, **{k: tmp_path / v if k == "dump" else v for k, v in options.items()})
        assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_dump_shows_every_phase(tmp_path: Path) -> None:
    np.savez(tmp_path / "net.calib.npz", x=np.zeros((4, 4, 6, 6), np.float32))
    built(tmp_path, precision="fp16", dump=tmp_path / "graphs")
    names = sorted(p.name for p in (tmp_path / "graphs").iterdir())
    assert names == ["00-imported.onnx", "01-eliminate-identity.onnx", "02-insert-casts.onnx"]


class TestVerifyEach:
    def test_a_careless_pass_is_rolled_back(self, tmp_path: Path, provide: Callable[..., Path]) -> None:
        provide(CARELESS, zz_careless="ZzCareless")
        assert built(tmp_path, out=tmp_path / "without").verification[0]["sqnr_db"] < 20
        report = built(tmp_path, verify_each=True)
        row = next(p for p in report.passes if p["spec"] == "ZzCareless()")
        assert (row["rewrites"], row["nodes_before"], row["nodes_after"]) == ((), 2, 2)
        assert row["rolled_back"].startswith("NUMERIC: the output 'y' moves by ")
        assert report.warnings[-1] == f"the pass ZzCareless() was rolled back: {row['rolled_back']}"
        assert report.verification[0]["sqnr_db"] >= 120
        written = json.loads((tmp_path / "out" / "report.json").read_text())
        assert next(p["rolled_back"] for p in written["passes"] if p["spec"] == "ZzCareless()") == row["rolled_back"]
        assert "`ZzCareless()` was **rolled back**: NUMERIC" in (tmp_path / "out" / "report.md").read_text()
        text = explain_passes(tmp_path / "out")
        assert f"ZzCareless() was rolled back: {row['rolled_back']}" in text
        assert "ZzCareless() declined NOTHING at n_y: there was more" in text

    def test_the_inputs_are_samples_corners_and_odd_sizes(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "net.calib.npz", x=np.zeros((20, 4, 6, 6), np.float32))
        asked = request(tmp_path, model=model(tmp_path, "H,W"), shapes=("x=1x4x6x6:4x4x8x8:4x4x12x12",))
        shapes = [feeds["x"].shape for feeds in verification_feeds(resolve(asked, Silent()))]
        assert shapes == [(4, 4, 6, 6), (4, 4, 6, 6), (1, 4, 6, 6), (4, 4, 12, 12), (1, 4, 7, 9)]

    def test_what_the_report_says_without_it(self, tmp_path: Path) -> None:
        report = built(tmp_path)
        assert {p["rolled_back"] for p in report.passes} == {""}
        assert (report.request["merge"], report.request["verify_each"]) == ("exact", False)


def test_explain_passes_is_a_table(tmp_path: Path) -> None:
    report = built(tmp_path)
    lines = explain_passes(tmp_path / "out").splitlines()
    assert lines[0].split() == ["pass", "seconds", "nodes", "rewrites", "declines"]
    row = next(line for line in lines if line.startswith("EliminateIdentity()"))
    assert row.split()[2:] == ["3", "->", "2", "1", "0"]
    assert len([line for line in lines[1:] if " -> " in line]) == len(report.passes)


def test_explain_passes_refuses_what_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a build directory"):
        explain_passes(tmp_path)
