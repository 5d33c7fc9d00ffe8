"""Run a function in a child process, because native code may abort, hang, or swallow Ctrl-C.

The parent names a function ``package.module:function`` that maps a JSON-able dict to a JSON-able dict. Whatever the child
prints is captured; a crash, a time-out and an exception become three distinct errors.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ChildError(Exception):
    """The child raised: ``kind`` is the name of the exception's type, ``output`` what the child printed."""

    def __init__(self, kind: str, message: str, output: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.output = kind, message, output


class ChildCrashed(ChildError):
    """The child died of a signal or exited without a result."""


class ChildTimedOut(ChildError):
    """The child was killed after its time was up."""


_running: set[subprocess.Popen[bytes]] = set()


def kill_running() -> None:
    """Kill every child of this process: an interrupt reaches the main thread only, and calls may wait in others."""
    for process in list(_running):
        process.kill()


def call(entry: str, request: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
    """Call ``entry(request)`` in a fresh interpreter and return its result.

    Args:
        entry: ``package.module:function``.
        request: keyword data, JSON-able.
        timeout: seconds until the child is killed.

    Raises:
        ChildError: the function raised.
        ChildCrashed: the process died (negative return codes are signals).
        ChildTimedOut: the time was up. On KeyboardInterrupt the child is killed at once and the interrupt propagates.
    """
    with tempfile.TemporaryDirectory(prefix="deploycc-child-") as folder:
        exchange, log = Path(folder, "exchange.json"), Path(folder, "log.txt")
        exchange.write_text(json.dumps({"entry": entry, "request": dict(request), "path": sys.path}))
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploycc.core.child", str(exchange)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            _running.add(process)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise ChildTimedOut("TimeoutExpired", f"no result after {timeout:.0f} s", _tail(log)) from None
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                _running.discard(process)
        return _result(code, exchange.with_suffix(".out"), _tail(log))


def _result(code: int, path: Path, output: str) -> dict[str, Any]:
    if not path.exists():
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ChildCrashed(name, f"the child process died ({name})", output)
    answer = json.loads(path.read_text())
    if "error" in answer:
        raise ChildError(answer["error"], answer["message"], output)
    return dict(answer["result"])


def _tail(log: Path, limit: int = 40_000) -> str:
    return log.read_bytes()[-limit:].decode(errors="replace")


def main(path: str) -> None:
    """Serve one call: the child's side of ``call``."""
    _die_with_parent()
    exchange = Path(path)
    order = json.loads(exchange.read_text())
    sys.path[:] = order["path"]
    module, _, name = order["entry"].partition(":")
    try:
        answer: dict[str, Any] = {"result": getattr(importlib.import_module(module), name)(order["request"])}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    finished = exchange.with_suffix(".tmp")
    finished.write_text(json.dumps(answer))
    finished.rename(exchange.with_suffix(".out"))


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no orphan keeps building."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
