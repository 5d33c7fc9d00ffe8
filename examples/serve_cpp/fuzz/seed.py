"""Write the seeds of the fuzzers: one sound input of each kind, and what the unit tests refuse.

python examples/serve_cpp/fuzz/seed.py CORPUS [BUNDLE]
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    """Return ``array`` as the bytes of a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version, allow_pickle=False)
    return stream.getvalue()


def request(raw: bytes = b"", **fields: object) -> bytes:
    """Return a request for the fuzzer's model: the length of its JSON in two bytes, the JSON, raw tensors."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 2]} | ({"parameters": {"binary_data_size": 8}} if raw else {"data": [[1.5, -2e3]]})
    text = json.dumps({"id": "1", "inputs": [x, {"name": "i", "datatype": "INT8", "shape": [1], "data": [7]}], **fields}).encode()
    return (len(text) if raw else 0xFFFF).to_bytes(2, "little") + text + raw


def main(corpus: Path, bundle: Path | None) -> None:
    """Write all seeds below ``corpus``."""
    arrays = [np.ones((2, 3), np.float32), np.int64(5), np.zeros(0, np.uint8), np.ones((1, 1, 2), np.float16), np.array([True, False])]
    seeds = {
        "npy": [npy(np.asarray(a)) for a in arrays] + [npy(np.ones(2), (2, 0)), npy(np.asfortranarray(np.ones((2, 2))))],
        "protocol": [
            request(),
            request(np.ones(2, np.float32).tobytes()),
            request(parameters={"binary_data_output": True}),
            request(outputs=[{"name": "y", "parameters": {"binary_data": True}}]),
            b"\xff\xff" + b"[" * 40,
        ],
        "bundle": [(bundle / "bundle.json").read_bytes()] if bundle else [],
    }
    for name, inputs in seeds.items():
        (corpus / name).mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(inputs):
            (corpus / name / f"seed-{index}").write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
