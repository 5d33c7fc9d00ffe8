"""Replay: a crash comes back from its reproducer, a build from its manifest, and what drifted is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from small_graphs import graph, random, weight

from deploycc.core.errors import UsageError
from deploycc.core.passes import PassCrashed
from deploycc.interop import save_model
from deploycc.output import is_reproducer
from deploycc.pipeline import build
from deploycc.replay import replay
from deploycc.request import BuildRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycc.replay import Verdict

CRASHING = '''
from dataclasses import dataclass, field
from deploycc.core.passes import PassResult, Rewrite

@dataclass(frozen=True)
class ZzCrashing:
    """Fall over."""
    limit: int = 3
    phase, after = "canonicalize", ("fold-batchnorm", "eliminate-identity")

    def __call__(self, model):
        model.graph[0].name = "touched"
        raise ValueError(f"{len(model.graph)} nodes")

@dataclass(frozen=True)
class ZzLate:
    """Fall over when there is a plan."""
    plan: object = field(repr=False)
    phase, after = "quantize", ()

    def __call__(self, model):
        raise KeyError(len(self.plan.assignments))
'''


def model(folder: Path) -> Path:
    """Write a network of five nodes, one of which is an Identity, and its data; return its path."""
    text = (
        "(float[N,4,6,6] x) => (float[N,5] y) { i = Identity(x) c = Conv<pads=[1,1,1,1]>(i, w) r = Relu(c) f = Flatten(r) y = Gemm(f, v) }"
    )
    save_model(graph(text, opset=20, w=weight(8, 4, 3, 3), v=weight(288, 5)), folder / "net.onnx")
    np.savez(folder / "net.calib.npz", x=random(16, 4, 6, 6))
    return folder / "net.onnx"


def request(folder: Path, **options: Any) -> BuildRequest:
    path = folder / "net.onnx" if (folder / "net.onnx").exists() else model(folder)
    given = {"precision": "int8", "targets": ("onnxruntime",), "out": folder / "out", "shapes": ("x=1:2:4",)} | options
    return BuildRequest(path, **given)


class TestCrash:
    @pytest.fixture
    def crashed(self, tmp_path: Path, provide: Callable[..., Path]) -> tuple[Path, Path]:
        """Return the reproducer that a crash left, and where the pass lies."""
        site = provide(CRASHING, zz_crashing="ZzCrashing")
        with pytest.raises(PassCrashed) as caught:
            build(request(tmp_path))
        path = tmp_path / "out.reproducer"
        assert caught.value.exit_code == 3
        assert caught.value.what == "the pass ZzCrashing(limit=3) failed with ValueError: 4 nodes"
        assert caught.value.fix.startswith(f"report it with the folder {path}, from which `deploycc replay {path}` repeats it")
        return path, site

    def rewrite(self, site: Path, old: str, new: str) -> None:
        """Change the pass, as its author would."""
        text = (site / "provided_0.py").read_text().replace(old, new)
        (site / "provided_0.py").write_text(text)
        sys.modules.pop("provided_0")
        shutil.rmtree(site / "__pycache__", ignore_errors=True)

    def test_what_it_leaves(self, crashed: tuple[Path, Path]) -> None:
        path, _ = crashed
        assert sorted(p.name for p in path.iterdir()) == ["model.onnx", "reproducer.json"]
        assert is_reproducer(path)
        body = json.loads((path / "reproducer.json").read_text())
        assert (body["pass"], body["options"], body["plan"]) == ("zz-crashing", {"limit": 3}, None)
        assert body["error"] == "ValueError: 4 nodes"
        assert body["traceback"][-1] == "provided_0.py:13 in __call__"
        assert {"deploycc", "onnx", "python"} <= set(body["versions"])
        nodes = [(n.op_type, n.name) for n in onnx.load(path / "model.onnx").graph.node]
        assert [op for op, _ in nodes] == ["Conv", "Relu", "Flatten", "Gemm"]
        assert "touched" not in dict(nodes).values()
        assert sorted(p.name for p in path.parent.iterdir()) == ["net.calib.npz", "net.onnx", "out.reproducer", "site"]

    def test_it_still_fails(self, crashed: tuple[Path, Path]) -> None:
        verdict = replay(crashed[0])
        assert (verdict.text, verdict.exit_code) == ("zz-crashing still fails with ValueError: 4 nodes", 3)

    def test_it_fails_otherwise(self, crashed: tuple[Path, Path]) -> None:
        self.rewrite(crashed[1], "raise ValueError", "raise TypeError")
        verdict = replay(crashed[0])
        assert verdict.text == "zz-crashing still fails, but otherwise: TypeError: 4 nodes (recorded: ValueError: 4 nodes)"
        assert verdict.exit_code == 3

    def test_it_is_repaired(self, crashed: tuple[Path, Path]) -> None:
        self.rewrite(crashed[1], "raise ValueError(", 'return PassResult((Rewrite("touched", "renamed"),)) # (')
        verdict = replay(crashed[0])
        assert verdict.text == "zz-crashing no longer fails (ValueError: 4 nodes): 1 rewrites, 0 declines"
        assert verdict.exit_code == 0

    def test_repaired_badly(self, crashed: tuple[Path, Path]) -> None:
        self.rewrite(
            crashed[1], "raise ValueError(", 'model.graph[1].name = "touched"; return PassResult((Rewrite("touched", "renamed"),)) # ('
        )
        verdict = replay(crashed[0])
        assert "still fails, but otherwise: rolled back: the node name 'touched' is used 2 times" in verdict.text
        assert verdict.exit_code == 3

    def test_other_versions_are_said(self, crashed: tuple[Path, Path]) -> None:
        text = (crashed[0] / "reproducer.json").read_text().replace('"numpy": "', '"numpy": "0.')
        (crashed[0] / "reproducer.json").write_text(text)
        assert replay(crashed[0]).text.splitlines()[1].startswith("version of numpy: recorded 0.")

    def test_the_pass_is_gone(self, crashed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(crashed[1])])
        with pytest.raises(UsageError, match=r"the pass 'zz-crashing' is not installed\..* Fix: install the package that provides it\."):
            replay(crashed[0])

    @pytest.mark.parametrize("damage", ["model.onnx", "options"])
    def test_a_damaged_reproducer(self, crashed: tuple[Path, Path], damage: str) -> None:
        path = crashed[0] / "reproducer.json"
        if damage == "options":
            path.write_text(path.read_text().replace('"limit"', '"limits"'))
        else:
            (crashed[0] / damage).unlink()
        with pytest.raises(UsageError, match="the reproducer cannot be read: "):
            replay(crashed[0])

    def test_an_older_reproducer_is_replaced_and_nothing_else(self, crashed: tuple[Path, Path]) -> None:
        path, _ = crashed
        with pytest.raises(PassCrashed):
            build(request(path.parent))
        shutil.rmtree(path)
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
        with pytest.raises(PassCrashed) as caught:
            build(request(path.parent))
        assert "(no reproducer was written: " in caught.value.fix
        assert [p.name for p in path.iterdir()] == ["thesis.tex"]

    def test_a_pass_with_a_plan(self, tmp_path: Path, provide: Callable[..., Path]) -> None:
        provide(CRASHING, zz_late="ZzLate")
        with pytest.raises(PassCrashed):
            build(request(tmp_path))
        path = tmp_path / "out.reproducer"
        body = json.loads((path / "reproducer.json").read_text())
        assert (body["pass"], body["options"], body["plan"]) == ("zz-late", {}, "plan.json")
        assert replay(path).text == f"zz-late still fails with {body['error']}"
        assert not (tmp_path / "out").exists()

    def test_from_the_command_line(self, tmp_path: Path, provide: Callable[..., Path]) -> None:
        site = provide(CRASHING, zz_crashing="ZzCrashing")
        model(tmp_path)
        environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "400", "NO_COLOR": "1"}

        def run(*arguments: str) -> tuple[int, str]:
            command = [sys.executable, "-m", "deploycc.cli", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment, check=False)
            assert "Traceback" not in done.stderr
            return done.returncode, done.stdout + done.stderr

        code, said = run("build", "net.onnx", "--target", "onnxruntime", "--out", "here", "--quiet")
        assert code == 3
        assert "error: the pass ZzCrashing(limit=3) failed with ValueError: 4 nodes." in said
        assert "`deploycc replay here.reproducer` repeats it" in " ".join(said.split())
        assert run("replay", "here.reproducer") == (3, "zz-crashing still fails with ValueError: 4 nodes\n")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a build directory beside its inputs."""
    folder = tmp_path_factory.mktemp("replay")
    return build(request(folder, budget="sqnr>=10dB", merge="all", verify_each=True))[1]


class TestBuild:
    @pytest.fixture
    def out(self, original: Path, tmp_path: Path) -> Path:
        """Return a copy of the build beside a copy of its inputs, found there because the manifest names them relatively."""
        shutil.copytree(original.parent, tmp_path / "all")
        out = tmp_path / "all" / "out"
        self.edit(out, "manifest.json", lambda body: body["paths"].update(model="net.onnx"))
        return out

    def edit(self, out: Path, name: str, change: Callable[[Any], object]) -> None:
        body = json.loads((out / name).read_text())
        change(body)
        (out / name).write_text(json.dumps(body))

    def assert_drifted(self, verdict: Verdict, start: str) -> None:
        assert verdict.exit_code == 3
        assert any(line.startswith(start) for line in verdict.text.splitlines()), verdict.text

    def test_the_manifest_holds_what_is_needed(self, original: Path) -> None:
        body = json.loads((original / "manifest.json").read_text())
        assert body["paths"] == {"model": str(original.parent / "net.onnx"), "data": None, "eval": None}
        asked = {"precision": "int8", "targets": ["onnxruntime"], "budget": "sqnr>=10dB", "profiles": ["x=1x4x6x6:2x4x6x6:4x4x6x6"]}
        others = {
            "seed": 0,
            "strict": False,
            "merge": "all",
            "rescale": "auto",
            "rounding": "auto",
            "reparam": None,
            "sensitivity": "auto",
            "relevance_fallback": None,
            "regions": [],
            "verify_each": True,
            "calibration": "auto",
            "dcn": "body",
            "compatibility": "",
            "timeout": None,
            "workspace": None,
        }
        assert body["options"] == asked | others

    def test_identical(self, out: Path) -> None:
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        verdict = replay(out)
        assert verdict.text.startswith("identical: ")
        assert verdict.exit_code == 0
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        assert sorted(p.name for p in out.parent.iterdir()) == ["net.calib.npz", "net.onnx", "out"]

    def test_drift_is_named(self, out: Path) -> None:
        self.edit(out, "manifest.json", lambda body: body["versions"].update(numpy="0.1"))
        (out / "scores.json").unlink()
        self.edit(out, "plan.json", lambda body: body["regions"][0].update(format="fp8"))
        self.edit(out, "report.json", lambda body: body["engines"][0].update(bytes=7, counts={"conv_int8": 40}))
        verdict = replay(out)
        self.assert_drifted(verdict, "drifted: plan.json (1 regions in another format: n_c fp8 -> ")
        self.assert_drifted(verdict, "drifted: scores.json")
        self.assert_drifted(verdict, "drifted: onnxruntime has ")
        self.assert_drifted(verdict, "drifted: onnxruntime conv_int8: recorded 40, now none")
        self.assert_drifted(verdict, "version of numpy: recorded 0.1, now ")

    def test_versions_alone_are_no_drift(self, out: Path) -> None:
        self.edit(out, "manifest.json", lambda body: body["versions"].update(numpy="0.1"))
        verdict = replay(out)
        assert verdict.exit_code == 0
        assert verdict.text.splitlines()[1].startswith("version of numpy: recorded 0.1, now ")

    def test_an_input_has_changed(self, out: Path) -> None:
        np.savez(out.parent / "net.calib.npz", x=random(16, 4, 6, 6, seed=99))
        with pytest.raises(
            UsageError, match=r"these inputs have changed since the build: calibration\. .* Fix: put the files of that time back"
        ):
            replay(out)

    def test_an_input_is_missing(self, out: Path) -> None:
        (out.parent / "net.onnx").unlink()
        with pytest.raises(
            UsageError, match=r"the input net\.onnx is missing\. .* Fix: put it back, or run this where the build was run\."
        ):
            replay(out)

    def test_a_manifest_of_before(self, out: Path) -> None:
        self.edit(out, "manifest.json", lambda body: body.pop("paths"))
        with pytest.raises(UsageError, match="the manifest does not say where the inputs lay"):
            replay(out)

    def test_a_damaged_build(self, out: Path) -> None:
        (out / "report.json").write_text("{")
        with pytest.raises(UsageError, match=r"report\.json cannot be read \("):
            replay(out)

    def test_neither(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"is neither a build nor a reproducer\. Where: DIR\."):
            replay(tmp_path)
