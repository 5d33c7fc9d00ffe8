"""Ask a running server for the golden outputs of a bundle, as any client of the KServe v2 protocol would, and compare.

    python examples/serve_cpp/ask.py BUNDLE [URL]

Needs numpy only. Waits until the server is ready; ends with 1 when an output misses its limit.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

READY_SECONDS = 60.0
DTYPES = {
    "FP32": np.float32,
    "FP64": np.float64,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "BOOL": np.bool_,
}


def fetch(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON of an answer: to a POST of ``body``, or to a GET."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - the user names the server
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return dict(json.load(answer))


def wait_until_ready(url: str) -> None:
    """Return when the server is ready, or raise why it cannot be reached."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            fetch(f"{url}/v2/health/ready")
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Return signal over noise in dB, at most 200."""
    noise = float(np.sum((expected.astype(np.float64) - found) ** 2))
    signal = float(np.sum(expected.astype(np.float64) ** 2))
    return min(10 * np.log10(signal / noise), 200.0) if noise else 200.0


def main(folder: Path, url: str) -> int:
    """Ask, compare, print; return the exit code."""
    bundle = json.loads((folder / "bundle.json").read_text())
    arrays = {name: np.load(folder / path, allow_pickle=False) for name, path in bundle["golden"]["inputs"].items()}
    kinds = {i["name"]: i["datatype"] for i in bundle["inputs"]}
    inputs = [{"name": n, "datatype": kinds[n], "shape": a.shape, "data": a.ravel().tolist()} for n, a in arrays.items()]
    wait_until_ready(url)
    answer = fetch(f"{url}/v2/models/{bundle['name']}/infer", {"inputs": inputs})
    found = {o["name"]: np.array(o["data"], DTYPES[o["datatype"]]).reshape(o["shape"]) for o in answer["outputs"]}
    platform = fetch(f"{url}/v2/models/{bundle['name']}")["platform"]
    kind = {"opencv": "onnx-fp32", "onnxruntime": "onnx"}.get(platform, platform)
    golden = next(v for v in bundle["variants"] if v["kind"] == kind)["golden"]
    missed = 0
    for row in golden:
        db = sqnr_db(np.load(folder / row["path"], allow_pickle=False), found[row["output"]])
        missed += db < row["minimum_sqnr_db"]
        print(
            f"{platform}: output {row['output']} {list(found[row['output']].shape)}: {db:.1f} dB, at least {row['minimum_sqnr_db']:.1f} dB"
        )
    print("prediction differs" if missed else "served and verified")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000"))
