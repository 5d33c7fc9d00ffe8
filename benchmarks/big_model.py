"""Peak memory of the canonical passes on a model that is larger than what they may take.

    python benchmarks/big_model.py                  # 3 GB
    python benchmarks/big_model.py --gigabytes 0.5

The model is a chain of matrix products with a bias, each followed by a scale per channel, its weights in external data. Folding a scale
into the product before it touches every weight. A fresh process loads the file, runs the canonical passes and saves the result; the
figure is the largest resident set of that process against the size of the model, with the imports counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

LIMIT = 1.3
_WIDTH = 4096


def create(folder: Path, gigabytes: float) -> Path:
    """Write a chain of products and scales of about ``gigabytes`` into ``folder``, one weight in memory at a time."""
    layers, path, draw = max(1, round(gigabytes * 1e9 / (4 * _WIDTH**2))), folder / "big.onnx", np.random.default_rng(0)
    graph = onnx.GraphProto(name="big")
    graph.input.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", _WIDTH]))
    graph.output.append(onnx.helper.make_tensor_value_info(f"y{layers}", onnx.TensorProto.FLOAT, ["N", _WIDTH]))
    previous = "x"
    with (folder / "big.data").open("wb") as data:
        for layer in range(1, layers + 1):
            weight = draw.standard_normal((_WIDTH, _WIDTH), dtype=np.float32)
            weight *= _WIDTH**-0.5
            _external(graph, f"w{layer}", weight.shape, data.tell())
            data.write(weight.tobytes())
            small = {"b": draw.standard_normal(_WIDTH), "g": draw.uniform(0.5, 1.5, _WIDTH), "s": draw.standard_normal(_WIDTH)}
            small |= {"m": draw.standard_normal(_WIDTH), "v": draw.uniform(0.5, 1.5, _WIDTH)}
            graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), f"{n}{layer}") for n, a in small.items())
            statistics = [f"{n}{layer}" for n in "gsmv"]
            graph.node.append(onnx.helper.make_node("Gemm", [previous, f"w{layer}", f"b{layer}"], [f"a{layer}"], f"gemm{layer}"))
            graph.node.append(onnx.helper.make_node("BatchNormalization", [f"a{layer}", *statistics], [f"n{layer}"], f"norm{layer}"))
            graph.node.append(onnx.helper.make_node("Relu", [f"n{layer}"], [f"y{layer}"], f"relu{layer}"))
            previous = f"y{layer}"
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def _external(graph: onnx.GraphProto, name: str, shape: tuple[int, ...], offset: int) -> None:
    tensor = graph.initializer.add(name=name, data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL, dims=shape)
    for key, value in (("location", "big.data"), ("offset", offset), ("length", 4 * int(np.prod(shape)))):
        tensor.external_data.add(key=key, value=str(value))


def run_passes(source: Path, target: Path) -> dict[str, float]:
    """Load, run the canonical passes and save, all in this process; return what that took."""
    from deploycc import registry
    from deploycc.core.contract import CANONICAL
    from deploycc.core.passes import run
    from deploycc.interop import load_model, save_model

    start = time.perf_counter()
    chosen = [cls() for _, cls in registry.passes("canonicalize")]
    model, records = run(load_model(source).model, chosen, contract=CANONICAL)
    save_model(model, target)
    return {
        "bytes": sum(file.stat().st_size for file in source.parent.glob("big.*")),
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "nodes": model.graph.num_nodes(),
        "rewrites": sum(len(record.rewrites) for record in records),
        "seconds": time.perf_counter() - start,
    }


def measure(folder: Path, gigabytes: float) -> dict[str, float]:
    """Create the model, run the passes in a fresh process, and return its figures."""
    source, target = create(folder, gigabytes), folder / "result.onnx"
    command = [sys.executable, __file__, "--source", str(source), "--target", str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the figures of one model, or of one run where a source is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.source is not None:
        print(json.dumps(run_passes(given.source, given.target)))
        return
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), given.gigabytes)
    print(
        f"{found['bytes'] / 1e9:.2f} GB, {found['nodes']:.0f} nodes left after {found['rewrites']:.0f} rewrites, {found['seconds']:.0f} s"
    )
    print(f"peak {found['peak'] / 1e9:.2f} GB, {found['peak'] / found['bytes']:.2f} times the model (limit {LIMIT})")
    if found["peak"] > LIMIT * found["bytes"]:
        raise SystemExit("too much")


if __name__ == "__main__":
    main()
