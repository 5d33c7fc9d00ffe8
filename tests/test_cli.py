"""The command line: help, wrong options, exit codes and text of refusals, and never a traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest

from deploycc import __version__, cli

CNN = Path(__file__).parent.parent / "examples" / "fashion" / "cnn.onnx"
COMMANDS = ("build", "export", "passes", "explain", "lint", "compare", "bisect", "replay", "doctor")


class Said(NamedTuple):
    """How the command line ended and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in an empty directory, on a terminal as wide as no line needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run_here(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["deploycc", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0, printed.out, printed.err)

    return run_here


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Return a function that runs the command line and returns its refusal in one line."""

    def refused_here(*arguments: str | Path) -> str:
        said = run(*arguments)
        assert said.code == 2, said
        assert said.out == ""
        assert "Traceback" not in said.err
        return " ".join(said.err.split())

    return refused_here


def test_a_refusal_is_a_paragraph_and_an_exit_code_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploycc.cli", "build", "nothing.onnx", "--precision", "int3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    text = (
        "error: unknown precision 'int3'. Where: --precision. "
        "Fix: use one of fp32, fp16, bf16, int8, fp8, int4, nvfp4, mxfp8, mixed, w4a4, mp4, w6a6, mp6.\n"
    )
    assert (done.returncode, done.stdout, done.stderr.lstrip()) == (2, "", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_a_summary(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert done.err == ""
    assert re.search(rf"^ *Usage: .*{command} \[OPTIONS\]", done.out, re.MULTILINE)
    assert re.search(r"^ +[A-Z][a-z]+ .*?\.\s*$", done.out, re.MULTILINE | re.DOTALL)


def test_help_names_every_command_and_exit_code(run: Run) -> None:
    text = " ".join(run("--help").out.split())
    assert all(f" {command} " in text for command in COMMANDS)
    assert "0 built and verified, 2 the request cannot be met, 3 a contract was broken, 4 the backend failed, 5 a budget was missed" in text


def test_no_arguments_shows_the_help(run: Run) -> None:
    done = run()
    assert "[OPTIONS] COMMAND [ARGS]..." in done.out + done.err


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.code, done.out) == (0, f"deploycc {__version__}\n")


def test_wrong_command(refused: Callable[..., str]) -> None:
    assert "No such command 'bild'" in refused("bild")


def test_wrong_option(refused: Callable[..., str]) -> None:
    assert "No such option: --precison" in refused("build", CNN, "--precison", "int8")


def test_missing_argument(refused: Callable[..., str]) -> None:
    assert "Missing argument 'MODEL.onnx'" in refused("build")


def test_option_of_the_wrong_type(refused: Callable[..., str]) -> None:
    assert "Invalid value for '--seed'" in refused("build", CNN, "--seed", "many")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--precision", "int3"],
            (
                "error: unknown precision 'int3'. Where: --precision. "
                "Fix: use one of fp32, fp16, bf16, int8, fp8, int4, nvfp4, mxfp8, mixed, w4a4, mp4, w6a6, mp6."
            ),
        ),
        (
            ["--target", "openvino"],
            "error: unknown target 'openvino'. Where: --target. Fix: use one of tensorrt, tensorrt-rtx, onnxruntime",
        ),
        (["--target", "tensorrt-rtx:sm_70"], "error: tensorrt-rtx does not build for 'sm_70'. Where: --target tensorrt-rtx:sm_70. Fix:"),
        (["--precision", "fp8", "--target", "tensorrt-rtx:sm_80"], "error: sm_80 has no FP8 units; use --precision int8"),
        (["--budget", "bits>=8"], "error: cannot read the bound 'bits>=8'. Where: --budget. Fix: use sqnr>=25dB"),
        (
            ["--budget", "accuracy-drop<=1"],
            "error: a bound on accuracy needs labelled data. Where: --budget accuracy-drop. Fix: give --eval",
        ),
        (["--shape", "image=1x2:3"], "error: 'image=1x2:3' has two shapes. Where: --shape. Fix: give one shape, or the three MIN:OPT:MAX."),
        (["--shape", "picture=1:8:16"], "error: the model has no input 'picture'. Where: --shape picture=.... Fix: its inputs are image."),
        (
            ["--data", "missing.npz"],
            "error: the data file does not exist. Where: 'missing.npz'. Fix: check the path given to --data or --eval",
        ),
        (["--seed", "-1"], "error: -1 is no sound seed. Where: --seed. Fix: give a number of 0 or more, or leave it out."),
        (["--timeout", "0"], "error: 0.0 is no sound timeout. Where: --timeout. Fix: give a number above 0, or leave it out."),
        (["--timeout", "nan"], "error: nan is no sound timeout."),
        (["--workspace", "0"], "error: 0 is no sound workspace."),
        (["--shape", "x=a:b:c"], "error: cannot read the shape 'x=a:b:c'."),
        (["--out", "."], "is or holds the working directory. Where: --out. Fix: name a directory in it or beside it."),
        (["--data", "synthetic:few"], "error: cannot read 'synthetic:few'. Where: --data. Fix: write synthetic:N"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_build_refuses_in_one_paragraph(refused: Callable[..., str], options: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused("build", CNN, *options)
    assert list(tmp_path.iterdir()) == []


def test_build_refuses_a_missing_model(refused: Callable[..., str]) -> None:
    assert "error: the model file does not exist. Where: 'nothing.onnx'. Fix:" in refused("build", "nothing.onnx")


def test_build_refuses_a_directory_that_is_not_its_own(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years of work")
    said = refused("build", CNN, "--target", "tensorrt-rtx", "--out", "work")
    assert "is not empty and not a build directory. Where: --out. Fix: choose another directory; deploycc replaces only its own." in said
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years of work"


def test_build_refuses_to_replace_what_it_reads(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cnn.onnx").write_bytes(CNN.read_bytes())
    (tmp_path / "out" / "manifest.json").write_text('{"schema": "deploycc.manifest/1"}')
    said = refused("build", "out/cnn.onnx", "--target", "tensorrt-rtx", "--out", "out")
    assert "out/cnn.onnx lies in the build directory, which this build would replace. Where: MODEL. Fix: give another --out" in said


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyError("w"), 3, "error: unforeseen KeyError: 'w'. Where: line"),
        (OSError(28, "No space left on device", "/x/y"), 2, "error: the system refuses: No space left on device. Where: '/x/y'. Fix:"),
    ],
)
def test_what_nobody_foresaw_is_one_paragraph(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, message: str) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("deploycc.doctor.examine", fail)
    said = run("doctor")
    assert (said.code, said.out) == (code, "")
    assert message in said.err
    monkeypatch.setenv("DEPLOYCC_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["deploycc", "doctor"])
    with pytest.raises(type(error)):
        cli.main()


def test_strict_refuses_synthetic_data(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "cnn.onnx").write_bytes(CNN.read_bytes())
    said = refused("build", "cnn.onnx", "--precision", "int8", "--target", "tensorrt-rtx", "--strict")
    assert "error: there is no calibration data. Where: --strict. Fix: give --data, or put cnn.calib.npz beside the model." in said


def test_explain_refuses_what_is_no_build(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "is not a build directory. Where: DIR. Fix: name a directory that deploycc build wrote." in refused("explain", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["timm:vit", "--out", "model.pb"], "error: 'model.pb' does not end in .onnx. Where: --out. Fix: name the file MODEL.onnx."),
        (["resnet50", "--out", "m.onnx"], "error: cannot read the source 'resnet50'. Where: SOURCE. Fix: write timm:NAME"),
        (
            ["timm:vit", "--out", "m.onnx", "--opset", "5"],
            "error: PyTorch exports to opset 18 to 23, not 5. Where: --opset. Fix: leave it out",
        ),
        (["timm:vit", "--out", "no/m.onnx"], "does not exist. Where: --out. Fix: create it first."),
    ],
)
def test_export_refuses_before_importing_torch(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refused("export", *arguments)


def test_passes_lists_every_entry_point_with_its_summary(run: Run) -> None:
    lines = run("passes").out.splitlines()
    listed = {line.split()[1]: line.split(maxsplit=2) for line in lines}
    assert set(listed) == {point.name for point in entry_points(group="deploycc.passes")}
    assert all(
        phase in {"import", "canonicalize", "prepare", "reparameterize", "quantize", "lower"} and summary.endswith(".")
        for phase, _, summary in listed.values()
    )


def test_passes_long_prints_the_five_parts(run: Run) -> None:
    text = run("passes", "--long").out
    count = len(entry_points(group="deploycc.passes"))
    assert all(text.count(part) >= count for part in ("Why:", "Before", "Declines when:", "Options:", "See:"))


def test_doctor_shows_every_backend_and_the_formats_of_each_target(run: Run) -> None:
    text = run("doctor").out
    assert all(re.search(rf"^{point.name}: ", text, re.MULTILINE) for point in entry_points(group="deploycc.backends"))
    assert re.search(r"^ +tensorrt-rtx:sm_80 +fp32 fp16 bf16 int8 ··· int4 ····· ·····$", text, re.MULTILINE)
    assert re.search(r"^ +tensorrt-rtx:sm_89 +fp32 fp16 bf16 int8 fp8 int4 ····· ·····$", text, re.MULTILINE)


def test_passes_markdown_prints_the_page(run: Run) -> None:
    assert run("passes", "--markdown").out == (CNN.parent.parent.parent / "docs" / "passes.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--merge", "most"], "error: unknown way of merging 'most'. Where: --merge. Fix: use one of exact, off, all."),
        (["--dump", CNN.parent], "is not an empty directory. Where: --dump. Fix: name a directory that does not exist yet."),
    ],
)
def test_build_refuses_pass_options_in_one_paragraph(refused: Callable[..., str], options: list[str], message: str) -> None:
    assert message in refused("build", CNN, "--target", "tensorrt-rtx", *options)


def test_replay_refuses_what_it_cannot_repeat(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "is neither a build nor a reproducer. Where: DIR. Fix: name a directory that deploycc build wrote." in refused(
        "replay", tmp_path
    )


def test_a_build_is_explained_and_replayed(run: Run, tmp_path: Path) -> None:
    options = ["--target", "onnxruntime", "--precision", "fp32", "--shape", "image=1:2:4", "--verify-each", "--merge", "off", "--quiet"]
    assert run("build", CNN, *options, "--out", "out", "--dump", "graphs").code == 0
    assert (tmp_path / "graphs" / "00-imported.onnx").exists()
    assert "MergeConvolutions(merge='off'" in run("explain", "out", "--passes").out
    done = run("replay", "out")
    assert (done.code, done.out.partition(":")[0]) == (0, "identical")
