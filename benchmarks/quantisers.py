"""INT8 by deploycc, ONNX Runtime, ModelOpt and NNCF on the same models and images, before any engine: noise, Q/DQ pairs, seconds.

    python3 -m venv quant && . quant/bin/activate
    pip install -c constraints.txt -e ".[test]" nncf
    pip install --no-deps nvidia-modelopt==0.47.0 && pip install -c constraints.txt "pulp<4" cppimport lief ninja nvidia-ml-py omegaconf \
        onnxconverter-common onnxslim regex
    python benchmarks/quantisers.py                               # all models, about an hour on two cores
    python benchmarks/quantisers.py mobilenetv2_100 --samples 8   # one of them
    python benchmarks/quantisers.py --write                       # the tables go into docs/quantisers.md
    python benchmarks/quantisers.py --cost                        # what calibration costs, on a machine that does nothing else

The other quantizers are no dependencies of deploycc; one that is not installed is left out, and the table says so.

Networks of timm get heavy-tailed random weights (Student's t with 4 degrees of freedom, seeded) and normalization statistics of real
images; examples/fashion are trained. Images are those of Fashion-MNIST, enlarged for timm. Every quantizer has its default INT8 and the
same calibration images; SQNR is that of the outputs on held-out images against the FP32 model, computed by ONNX Runtime with Q/DQ in
floating point. ``pairs`` counts QuantizeLinear on activations, and ``DQ`` all DequantizeLinear.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from deploycc.export import declare_torchvision_operators

ROOT = Path(__file__).parent.parent
FASHION = ROOT / "examples" / "fashion"
PAGE = ROOT / "docs" / "quantisers.md"
NETWORKS = ("resnet50", "mobilenetv2_100", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny")
TRAINED = ("vit", "cnn")
TARGET = "tensorrt-rtx:sm_80"
BEGIN, END = "<!-- {0}: python benchmarks/quantisers.py {1} -->", "<!-- end of {0} -->"


def by_onnxruntime(source: Path, images: np.ndarray, out: Path, **options: Any) -> None:
    """Quantize by ``onnxruntime.quantization.quantize_static``."""
    from onnxruntime.quantization import quantize_static

    quantize_static(source, out, reader(source, images), **options)


def by_nncf(source: Path, images: np.ndarray, out: Path) -> None:
    """Quantize by ``nncf.quantize``."""
    import nncf
    import onnx

    name = input_of(source)
    data = nncf.Dataset(images, lambda image: {name: image[None]})
    onnx.save(nncf.quantize(onnx.load(source), data, subset_size=len(images)), out)


def by_modelopt(source: Path, images: np.ndarray, out: Path, **options: Any) -> None:
    """Quantize by ``modelopt.onnx.quantization.quantize``; it would overwrite its input, so it gets a copy."""
    from modelopt.onnx.quantization import quantize

    copy = out.with_name("input.onnx")
    copy.write_bytes(source.read_bytes())
    data = {input_of(source): images}
    quantize(onnx_path=str(copy), quantize_mode="int8", calibration_data=data, calibration_eps=["cpu"], output_path=str(out),
             log_level="ERROR", **options)  # fmt: skip


QUANTIZERS: dict[str, tuple[str, Callable[..., None]]] = {
    "ONNX Runtime": ("onnxruntime", by_onnxruntime),
    "ModelOpt": ("nvidia-modelopt", by_modelopt),
    "NNCF": ("nncf", by_nncf),
}


def reader(source: Path, images: np.ndarray) -> Any:
    """Return a ``CalibrationDataReader`` of ONNX Runtime that gives one image after the other."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([{input_of(source): image[None]} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    return Reader()


def input_of(source: Path) -> str:
    """Return the name of the only input of a model."""
    return str(ir.load(source).graph.inputs[0].name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what others print to themselves."""
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Subject:
    """A model with its calibration images and its held-out images, in files."""

    name: str
    model: Path
    calibration: Path
    held_out: np.ndarray


@dataclass(frozen=True)
class Result:
    """What one quantizer made of a model; ``note`` where it made nothing."""

    quantizer: str
    sqnr: float = float("nan")
    pairs: int = 0
    dequantizers: int = 0
    seconds: float = 0.0
    latency: float = float("nan")
    note: str = ""


def subject(name: str, folder: Path, *, samples: int, held_out: int) -> Subject:
    """Make a model and its data."""
    trained = name in TRAINED
    calibration, test = (np.load(FASHION / f)["image"] for f in (f"{name if trained else 'cnn'}.calib.npz", "eval.npz"))
    calibration, test = calibration[:samples], test[:held_out]
    model = FASHION / f"{name}.onnx"
    if not trained:
        calibration, test = enlarged(calibration), enlarged(test)
        model = folder / f"{name}.onnx"
        network(name, calibration, folder / "weights.safetensors")
        deploycc("export", f"timm:{name}", "--weights", folder / "weights.safetensors", "--out", model)
    np.savez(folder / "calibration.npz", **{input_of(model): calibration})
    return Subject(name, model, folder / "calibration.npz", test)


def enlarged(images: np.ndarray) -> np.ndarray:
    """Return images ``[n, 1, 28, 28]`` as ``[n, 3, 224, 224]``, bilinear, of mean 0 and deviation 1."""
    import torch

    large = torch.nn.functional.interpolate(torch.from_numpy(images), size=(224, 224), mode="bilinear").numpy()
    return np.repeat((large - images.mean()) / images.std(), 3, axis=1).astype(np.float32)


def network(name: str, images: np.ndarray, out: Path) -> None:
    """Write heavy-tailed weights for a network of timm: variance 2 / fan-in before a ReLU and 1 / fan-in elsewhere, gains around 1."""
    import torch
    from safetensors.torch import save_file

    declare_torchvision_operators()
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False)
    tails = torch.distributions.StudentT(4.0)
    gain = 2.0 if any(isinstance(m, torch.nn.ReLU | torch.nn.ReLU6) for m in module.modules()) else 1.0
    for parameter_name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.ndim > 1 and min(parameter.shape[:2]) > 0 and "embed" not in parameter_name and "table" not in parameter_name:
                fan_in = parameter[0].numel()
                parameter.copy_(tails.sample(parameter.shape) * (gain / fan_in / 2.0) ** 0.5)  # The variance of t with 4 degrees is 2.
            elif parameter_name.endswith(("weight", "gamma")):
                parameter.copy_(torch.exp(0.3 * torch.randn(parameter.shape)) * (0.5 if parameter_name.endswith("gamma") else 1.0))
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    for each in module.modules():
        if isinstance(each, torch.nn.BatchNorm2d):
            each.momentum = None
    with torch.no_grad():
        module.train()(torch.from_numpy(images[:32]))
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, out)


def deploycc(*words: object) -> None:
    """Run a command of deploycc quietly; its failure raises with what it said."""
    done = subprocess.run([sys.executable, "-m", "deploycc.cli", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])


def ours(each: Subject, folder: Path, precision: str, budget: str = "") -> tuple[Path, dict[str, Any]]:
    """Build by deploycc; return model.onnx and the report."""
    out = folder / precision
    options = ["--budget", budget] if budget else []
    deploycc(
        "build", each.model, "--precision", precision, "--data", each.calibration, "--target", TARGET, "--out", out, "--quiet", *options
    )
    return out / "model.onnx", json.loads((out / "report.json").read_text())


def judged(each: Subject, quantized: Path, name: str, *, seconds: float = 0.0, latency: float = float("nan")) -> Result:
    """Measure a quantized model on the held-out images."""
    import onnx

    graph = onnx.load(quantized, load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    pairs = sum(n.op_type == "QuantizeLinear" and n.input[0] not in constants for n in graph.node)
    dequantizers = sum(n.op_type == "DequantizeLinear" for n in graph.node)
    true, built = outputs(each.model, each.held_out), outputs(quantized, each.held_out)
    sqnr = 10 * np.log10((true**2).sum() / ((built - true) ** 2).sum())
    return Result(name, float(sqnr), pairs, dequantizers, seconds=seconds, latency=latency)


def outputs(model: Path, images: np.ndarray) -> np.ndarray:
    """Return the first output in float64, with Q/DQ computed in floating point where they stand."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    kind = np.float16 if given.type == "tensor(float16)" else np.float32
    batches = np.array_split(images, max(1, len(images) // 8))
    return np.concatenate([session.run(None, {given.name: batch.astype(kind)})[0] for batch in batches]).astype(np.float64)


def results(each: Subject, folder: Path, *, others: bool) -> Iterator[Result]:
    """Yield what every quantizer makes of a model, or deploycc alone."""
    path, report = ours(each, folder, "int8")
    ratio = report["plan"]["estimated_latency_ratio"]
    yield judged(each, path, "deploycc", seconds=quantizing(report), latency=1.0)
    for name, (package, _) in QUANTIZERS.items() if others else ():
        yield other(each, folder, name, package)
    for budget in ("", f"latency<={1.15 * ratio:.4f}x"):
        path, report = ours(each, folder, "mixed", budget)
        counts = ", ".join(f"{n} {name}" for name, n in report["plan"]["regions"].items())
        latency = report["plan"]["estimated_latency_ratio"] / ratio
        yield judged(each, path, f"deploycc mixed ({counts})", seconds=quantizing(report), latency=latency)


def quantizing(report: dict[str, Any]) -> float:
    """Return the seconds of all stages but the building of engines."""
    return float(sum(s for stage, s in report["seconds"].items() if not stage.startswith("build")))


def other(each: Subject, folder: Path, name: str, package: str) -> Result:
    """Quantize by another quantizer in a process of its own: the exported model, or where that fails what our exact passes leave."""
    try:
        label = f"{name} {version(package)}"
    except PackageNotFoundError:
        return Result(name, note="not installed")
    out, error = folder / "quantized.onnx", ""
    for source in (each.model, folded(each, folder)):
        words = [sys.executable, __file__, "--child", name, str(source), str(each.calibration), str(out)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return judged(each, out, label + ("" if source == each.model else ", folded"), seconds=float(done.stdout.split()[-1]))
        error = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return Result(label, note=f"fails: {error[:120]}")


def folded(each: Subject, folder: Path) -> Path:
    """Return the model as the exact passes leave it, for quantizers that fail on what the exporter writes."""
    out = folder / "folded"
    if not out.exists():
        deploycc("build", each.model, "--precision", "fp32", "--target", "onnxruntime", "--out", out, "--quiet")
    return out / "model.onnx"


def child(name: str, source: str, calibration: str, out: str) -> None:
    """Quantize and print the seconds: the other side of ``other``."""
    import torch  # noqa: F401 - what importing takes is nobody's quantization

    with np.load(calibration) as file:
        images = next(iter(file.values()))
    start = time.perf_counter()
    with quiet():
        QUANTIZERS[name][1](Path(source), images, Path(out))
    print(time.perf_counter() - start)


def rows(name: str, found: list[Result]) -> Iterator[str]:
    """Yield the lines of one model."""
    for r in found:
        if r.note:
            yield f"| {name} | {r.quantizer} | {r.note} | | | | |"
            continue
        latency = "" if np.isnan(r.latency) else f"{r.latency:.3f}"
        yield f"| {name} | {r.quantizer} | {r.sqnr:.1f} | {r.pairs} | {r.dequantizers} | {r.seconds:.1f} | {latency} |"


def compare(names: list[str], *, samples: int, held_out: int, others: bool) -> Iterator[str]:
    """Yield the table of quantizers, line by line."""
    yield "| model | quantizer | SQNR dB | pairs | DQ | seconds | estimated latency / int8 |"
    yield "|---|---|---|---|---|---|---|"
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            each = subject(name, Path(folder), samples=samples, held_out=held_out)
            for result in results(each, Path(folder), others=others):
                yield from rows(name, [result])


def write(title: str, lines: list[str]) -> None:
    """Replace one table of the page."""
    begin, end = BEGIN.format(title, "--cost --write" if title == "cost" else "--write"), END.format(title)
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """Print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*NETWORKS, *TRAINED])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--ours", action="store_true", help="measure deploycc alone")
    parser.add_argument("--cost", action="store_true", help="measure what calibration costs instead")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    if arguments.cost:
        from calibration_cost import costs

        lines = costs()
    else:
        lines = compare(arguments.models, samples=arguments.samples, held_out=arguments.held_out, others=not arguments.ours)
    kept = []
    for line in lines:
        print(line, flush=True)
        kept.append(line)
    if arguments.write:
        write("cost" if arguments.cost else "comparison", kept)


if __name__ == "__main__":
    main()
