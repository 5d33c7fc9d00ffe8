"""A child process answers, raises, dies or hangs; each is told apart, and nothing outlives the call."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from deploycc.core.child import ChildCrashed, ChildError, ChildTimedOut, call, kill_running

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module of entry points on the path, which the child shares."""
    (tmp_path / "entry_points_of_tests.py").write_text(
        textwrap.dedent("""
        import os, signal, sys, time
        def echo(request): return {"got": request}
        def chatter(request):
            print("to stdout", flush=True); print("to stderr", file=sys.stderr, flush=True)
            raise ValueError("no such thing")
        def abort(request): print("last words", flush=True); os.abort()
        def leave(request): os._exit(7)
        def hang(request):
            open(request["pid"], "w").write(str(os.getpid())); time.sleep(60)
        def nothing(request): return None
        """)
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def run(name: str, timeout: float = 30, **request: object) -> dict[str, object]:
    return call(f"entry_points_of_tests:{name}", request, timeout=timeout)


def test_data_goes_there_and_back() -> None:
    assert run("echo", text="ä", numbers=[1, 2.5, None]) == {"got": {"text": "ä", "numbers": [1, 2.5, None]}}


def test_an_exception_keeps_its_kind_and_what_was_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildError, match="no such thing") as caught:
        run("chatter")
    assert not isinstance(caught.value, ChildCrashed | ChildTimedOut)
    assert caught.value.kind == "ValueError"
    assert "to stdout" in caught.value.output
    assert "to stderr" in caught.value.output
    assert capfd.readouterr() == ("", "")


def test_a_signal_is_a_crash_with_its_name() -> None:
    with pytest.raises(ChildCrashed, match="SIGABRT") as caught:
        run("abort")
    assert caught.value.kind == signal.SIGABRT.name
    assert "last words" in caught.value.output


def test_leaving_without_an_answer_is_a_crash() -> None:
    with pytest.raises(ChildCrashed, match="exit code 7"):
        run("leave")


def test_a_hang_is_ended_and_leaves_no_process(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ChildTimedOut, match="no result after 2 s"):
        run("hang", timeout=2, pid=str(tmp_path / "pid"))
    assert time.monotonic() - start < 15
    pid = int((tmp_path / "pid").read_text())
    assert pid != os.getpid()
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(("entry", "kind"), [("no_such_module:f", "ModuleNotFoundError"), ("entry_points_of_tests:f", "AttributeError")])
def test_an_unknown_entry_is_an_error(entry: str, kind: str) -> None:
    with pytest.raises(ChildError) as caught:
        call(entry, {}, timeout=30)
    assert caught.value.kind == kind


def test_children_that_other_threads_wait_for_can_be_killed(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(run, "hang", pid=str(tmp_path / name)) for name in "ab"]
        while not all((tmp_path / name).exists() for name in "ab"):
            time.sleep(0.02)
        kill_running()
        for each in waiting:
            with pytest.raises(ChildCrashed, match="SIGKILL"):
                each.result(10)
