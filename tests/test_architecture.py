"""The shape of the project: layers, names, start-up time, documents that tell the truth, nothing of one machine."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from deploycc import cli
from deploycc.core.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("deploycc", "passes", "plugins_trt") for path in (ROOT / package).rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEAVY = [
    *("torch", "timm", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnx_graphsurgeon", "tensorrt", "tensorrt_rtx", "polygraphy"),
    *("numpy", "ml_dtypes", "scipy", "matplotlib", "jinja2"),
]
GROUPS = ("deploycc.passes", "deploycc.backends", "deploycc.plugins")
# A GPU, and not a rule.
NOT_RULES = {"T4"}


def relative(path: Path) -> str:
    """Return a path as a test's name."""
    return str(path.relative_to(ROOT))


def tracked() -> list[Path]:
    """Return the files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# Layers and names


def test_imports_keep_to_the_layers() -> None:
    done = subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_layers_name_every_module() -> None:
    """A module outside the layers is a module that nothing checks."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    named = {name.strip(" ()").removeprefix("deploycc.") for layer in layers for name in re.split(r"[|:]", layer)}
    found = {path.stem for path in (ROOT / "deploycc").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} <= named


def test_no_file_is_named_after_nothing() -> None:
    vague = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "handler"}
    assert [relative(p) for p in tracked() if p.suffix == ".py" and vague & set(p.stem.lower().split("_"))] == []


@pytest.mark.parametrize("point", [p for group in GROUPS for p in entry_points(group=group)], ids=lambda p: f"{p.group}:{p.name}")
def test_entry_point_loads(point: object) -> None:
    assert isinstance(point.load(), type)  # type: ignore[attr-defined]


def test_entry_points_are_those_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    installed = {group: {p.name: p.value for p in entry_points(group=group)} for group in declared}
    assert declared == installed, "run: pip install -c constraints.txt -e ."


# Start-up


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
sys.argv = ["deploycc", "--help"]
from deploycc.cli import app
try:
    app()
except SystemExit:
    pass
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def test_help_answers_within_300_ms() -> None:
    """CPU time of the fastest of five runs: other work on the machine does not count."""
    assert min(_cpu_seconds([sys.executable, "-m", "deploycc.cli", "--help"]) for _ in range(5)) < 0.3


def _cpu_seconds(command: list[str]) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


# Documents that tell the truth


def options_of() -> dict[str, set[str]]:
    """Return the options of each command."""
    group = typer.main.get_command(cli.app)
    return {name: {o for p in command.params for o in p.opts if o.startswith("-")} | {"--help"} for name, command in group.commands.items()}  # type: ignore[attr-defined]


def commands_in(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each ``deploycc COMMAND`` of a document with the long options after it."""
    for line in path.read_text().splitlines():
        for span in [line] if not line.startswith(("|", "-")) else re.findall(r"`([^`]*)`", line):
            for command, rest in re.findall(r"\bdeploycc ([a-z]+)\b((?:[^`&]|`(?=\w))*)", span):
                if command in options_of() or rest.lstrip().startswith("--") or f"`deploycc {command}" in line:
                    yield command, re.findall(r"(?<![\w-])--[a-z-]+", rest)


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_documented_commands_and_options_exist(document: Path) -> None:
    known = options_of()
    for command, options in commands_in(document):
        assert command in known, f"deploycc {command}"
        assert set(options) <= known[command], f"deploycc {command}"


def test_readme_lists_every_command_and_every_option_of_build() -> None:
    text, known = (ROOT / "README.md").read_text(), options_of()
    assert [command for command in known if f"| `deploycc {command}" not in text] == []
    assert [option for option in known["build"] - {"--help", "-q"} if f"`{option}" not in text] == []


@pytest.mark.parametrize("name", ["main job", "tests"])
def test_readme_has_one_line_for_ci(name: str) -> None:
    blocks = re.findall(rf"^<!-- ci: {name} -->\n```sh\n(.*?)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    assert "\n" not in blocks[0]
    assert "-c constraints.txt" in blocks[0]
    missing = [word for word in re.findall(r"(?<=\s)[\w./-]+\.(?:txt|onnx|npz)", blocks[0]) if not (ROOT / word).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    named = re.findall(r"`((?:deploycc|docs|tests|examples)/[\w./-]+)`", text)
    invented = {"tests/passes/test_verb_object.py"}
    assert [name for name in named if name not in invented and not (ROOT / name).exists()] == []


def test_documented_errors_are_those_of_the_source() -> None:
    """Each message of docs/errors.md is a text of the source, with … for what varies."""
    known = {text for path in SOURCES for text in _texts(path)}
    documented = re.findall(r"^\| `([^`]*)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(documented) > 150
    assert [message for message in documented if message not in known] == []


def _texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w+\}", "…", node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_cited_rules_exist(path: Path) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    prose = " ".join(t.string for t in tokens if t.type in {tokenize.STRING, tokenize.COMMENT})
    letters = "".join(sorted({rule[0] for rule in RULES}))
    assert set(re.findall(rf"\b[{letters}]\d{{1,2}}\b", prose)) - set(RULES) - NOT_RULES == set()


# Nothing of one machine


def test_no_machine_paths() -> None:
    pattern = re.compile(r"(?<![\w.$}~-])/(?:work|opt|root)/")
    texts = ((path, path.read_bytes()) for path in tracked())
    found = [
        f"{relative(path)}: {line.strip()[:80]}"
        for path, data in texts
        if b"\0" not in data and path != Path(__file__)
        for line in data.decode(errors="replace").splitlines()
        if pattern.search(line)
    ]
    assert found == []


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {re.split(r"[\[<>=; ]", requirement)[0] for requirement in wanted} - {"deploycc"}
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert names - pinned == set()


# Files of others


def test_nothing_unpickles() -> None:
    """Reading a pickle runs any code: arrays are read without objects, weights from safetensors."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                found += [
                    f"{relative(path)} imports {m}" for m in modules if m.split(".")[0] in {"pickle", "dill", "joblib", "marshal", "shelve"}
                ]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"np.load", "numpy.load", "torch.load"}:
                safe = {f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords}
                if "allow_pickle=False" not in safe:
                    found.append(f"{relative(path)}:{node.lineno} loads without allow_pickle=False")
    assert found == []
