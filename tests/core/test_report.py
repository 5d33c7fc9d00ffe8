"""The report is JSON, whatever was put into it."""

from __future__ import annotations

import json
from pathlib import Path

from deploycc.core.report import SCHEMA, BuildReport


def test_it_begins_with_its_schema() -> None:
    report = BuildReport(model={"path": Path("m.onnx")}, warnings=["beware"])
    body = json.loads(report.to_json())
    assert next(iter(body)) == "schema"
    assert body["schema"] == SCHEMA
    assert body["model"] == {"path": "m.onnx"}
    assert body["warnings"] == ["beware"]
    assert report.to_json().endswith("}\n")


def test_two_reports_share_nothing() -> None:
    one, other = BuildReport(), BuildReport()
    one.warnings.append("mine")
    assert other.warnings == []
