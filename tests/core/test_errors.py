"""The text of an error says what, where and what to do; its class decides the exit code."""

from __future__ import annotations

import pytest

from deploycc.core.errors import BackendError, BudgetError, ContractError, DeployccError, UsageError


def test_the_text_has_three_parts() -> None:
    error = UsageError("the model is empty", at="'m.onnx'", fix="export it again")
    assert str(error) == "the model is empty. Where: 'm.onnx'. Fix: export it again."
    assert (error.what, error.at, error.fix) == ("the model is empty", "'m.onnx'", "export it again")


@pytest.mark.parametrize(
    ("what", "expected"), [("it broke", "it broke."), ("it broke.", "it broke."), ("did it?", "did it?"), ("it did!", "it did!")]
)
def test_the_first_part_ends_a_sentence(what: str, expected: str) -> None:
    assert str(DeployccError(what)) == expected


@pytest.mark.parametrize(("kind", "code"), [(DeployccError, 1), (UsageError, 2), (ContractError, 3), (BackendError, 4), (BudgetError, 5)])
def test_every_kind_has_its_exit_code(kind: type[DeployccError], code: int) -> None:
    assert kind("x").exit_code == code
    assert issubclass(kind, DeployccError)


def test_parts_that_are_absent_leave_no_trace() -> None:
    assert str(BackendError("the build failed", fix="retry")) == "the build failed. Fix: retry."
