"""A pass in a distribution of its own: found by entry point, held to the pass laws, and right."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pass_graphs import apply, assert_same, codes, graph

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "third_party_pass"
PIP = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example into a folder of its own, from a copy, since building writes beside the sources."""
    folder = tmp_path_factory.mktemp("third-party")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, *PIP, "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def run(site: Path, *arguments: str) -> str:
    """Run a module of Python with the example installed; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_found(site: Path) -> None:
    (line,) = [line for line in run(site, "deploycc.cli", "passes").splitlines() if " eliminate-relu " in line]
    assert line.split(maxsplit=2) == ["canonicalize", "eliminate-relu", "Remove a ``Relu`` whose input is never negative."]


def test_the_laws_hold(site: Path) -> None:
    said = run(site, "pytest", "-q", "-p", "no:cacheprovider", "tests/passes/test_laws.py", "-k", "eliminate-relu")
    assert "5 passed" in said.splitlines()[-1]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """Import the pass from where it lies."""
    spec = importlib.util.spec_from_file_location("deploycc_eliminate_relu", EXAMPLE / "deploycc_eliminate_relu.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


X, Y = "(float[N,4,8,8] x)", "(float[N,4,?,?] y)"


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("a = Relu(x) b = MaxPool<kernel_shape=[2,2]>(a) y = Relu(b)", "a = Relu(x) y = MaxPool<kernel_shape=[2,2]>(a)"),
        ("a = Sigmoid(x) b = Relu(a) y = Neg(b)", "a = Sigmoid(x) y = Neg(a)"),
        ("a = Relu(x) b = Exp(x) c = Add(a, b) d = Relu(c) y = Neg(d)", "a = Relu(x) b = Exp(x) c = Add(a, b) y = Neg(c)"),
    ],
)
def test_before_and_after(module: ModuleType, before: str, expected: str) -> None:
    assert_same(apply(graph(f"{X} => {Y} {{ {before} }}"), module.EliminateRelu()), graph(f"{X} => {Y} {{ {expected} }}"))


@pytest.mark.parametrize("body", ["y = Relu(x)", "a = Relu(x) b = Neg(a) y = Relu(b)", "a = Relu(x) b = Add(a, x) y = Relu(b)"])
def test_what_may_be_negative_stays(module: ModuleType, body: str) -> None:
    before = graph(f"{X} => {Y} {{ {body} }}")
    assert_same(apply(before, module.EliminateRelu()), before)
    assert codes(before, module.EliminateRelu()) == []


def test_declines(module: ModuleType) -> None:
    both = graph(f"{X} => (float[N,4,?,?] a, float[N,4,?,?] y) {{ a = Relu(x) y = Relu(a) }}")
    assert codes(both, module.EliminateRelu()) == ["GRAPH_OUTPUT"]
    deep = graph(f"{X} => {Y} {{ a = Relu(x) b = Identity(a) c = Identity(b) y = Relu(c) }}")
    assert codes(deep, module.EliminateRelu(depth=1)) == ["DEPTH"]
    assert codes(deep, module.EliminateRelu(depth=2)) == []
