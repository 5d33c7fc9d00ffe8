"""The lint as a whole: files of others, our own builds, the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from lint_graphs import conv

from deploycc import cli
from deploycc.core.errors import UsageError
from deploycc.core.rules import RULES
from deploycc.lint.findings import SEVERITIES
from deploycc.lint.linting import checks, inspect, lint

if TYPE_CHECKING:
    from pathlib import Path


def test_every_check_cites_a_rule_and_says_why_and_what_to_do() -> None:
    for name, check in checks().items():
        assert name in RULES
        assert check.severity in SEVERITIES
        assert min(len(check.why), len(check.fix)) > 10
        assert check.find.__doc__


def test_findings_come_in_order_of_severity() -> None:
    found = inspect(conv(z=np.int8(1), s=np.array([0.05], np.float32)), name="m.onnx").findings
    ranks = [list(SEVERITIES).index(f.severity) for f in found]
    assert ranks == sorted(ranks)


def test_nodes_may_come_in_any_order(tmp_path: Path) -> None:
    """Quark appends its quantizers behind the nodes that read them."""
    proto = ir.to_proto(conv())
    ir.save(ir.from_proto(proto), tmp_path / "sorted.onnx")
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    (tmp_path / "reversed.onnx").write_bytes(proto.SerializeToString())
    found, expected = lint(tmp_path / "reversed.onnx"), lint(tmp_path / "sorted.onnx")
    assert expected.findings
    assert {(f.rule, f.node) for f in found.findings} == {(f.rule, f.node) for f in expected.findings}


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Run the command line; return its exit code and what it printed."""
    monkeypatch.setattr("sys.argv", ["deploycc", "lint", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().out


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    ir.save(conv(), good)
    ir.save(conv(z=np.int8(1)), bad)
    code, text = run(capsys, monkeypatch, str(good))
    assert (code, text.splitlines()[-1]) == (0, "good.onnx: 4 nodes, 2 DequantizeLinear: 0 errors, 0 warnings, 2 notes")
    code, text = run(capsys, monkeypatch, str(bad))
    assert code == 1
    assert text.startswith("error R1: 1 place\n  n_x_dq (QuantizeLinear): the zero point is 1, not 0\n  why it matters: ")
    code, text = run(capsys, monkeypatch, str(bad), "--json")
    body = json.loads(text)
    assert (code, body["schema"], body["count"]["error"]) == (1, "deploycc.lint/1", 1)
    assert body["findings"][0] | {"why": "", "fix": ""} == {
        "rule": "R1", "severity": "error", "node": "n_x_dq", "operator": "QuantizeLinear", "torch": "",
        "what": "the zero point is 1, not 0", "why": "", "fix": "", "fixable": True,
    }  # fmt: skip
    (tmp_path / "no.onnx").write_text("nothing")
    assert run(capsys, monkeypatch, str(tmp_path / "no.onnx"))[0] == 2


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    ir.save(conv(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="unknown target 'abacus'"):
        lint(tmp_path / "m.onnx", target="abacus")
