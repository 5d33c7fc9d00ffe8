"""DCNv3 kernels: instructions per output channel from the machine code, and on a GPU times, bandwidth and the share of the bound.

    python benchmarks/dcnv3.py                # on any machine with nvcc and cuobjdump (pip install nvidia-cuda-cuobjdump)
    python benchmarks/dcnv3.py --arch sm_100

Without a GPU the first table is printed: instructions that one thread issues, counted in the SASS without padding and divided by its
channels, and what the issue model makes of them for the first stage of InternImage-T at batch 64 (56x56x64, 4 groups) on an H100: 132
multiprocessors, four instructions per clock, 1.755 GHz. It is a model, not a measurement: published kernels reach 78 % of it.

With a GPU the second table is printed as well: the four stages of InternImage-T at batch 1, 8 and 64 in FP16, the best kernel in both
layouts of its operands, against a kernel with one thread per channel in the published style and the GridSample form in PyTorch, eager and
compiled. ``bound`` is the time to move every operand once at the bandwidth given by --bandwidth (an H100's 3.35 TB/s). Each kernel's
result is compared with the CPU's on a thousand items. compute-sanitizer checks memory, races and initialization, where it is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SOURCES = HERE.parent / "plugins_trt" / "csrc"
OUTPUTS = 64 * 56 * 56 * 64
ISSUES_PER_SECOND = 132 * 4 * 1.755e9
PUBLISHED_SHARE = 0.78


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, by its C++ types."""

    name: str
    x: str
    source: str
    math: str
    width: int

    @property
    def instance(self) -> str:
        """Return the C++ type that is instantiated."""
        return f"Instance<{self.x}, {self.source}, {self.math}, {self.width}, 3>"


PLAIN, RECORD = "Operands<Half, Half>", "Record"
KERNELS = (
    *(Kernel("FP16 records, pairs", "Half", RECORD, "Paired", v) for v in (16, 8, 4, 2)),
    *(Kernel("FP16 records, FP32", "Half", RECORD, "Exact", v) for v in (16, 8, 4, 2)),
    *(Kernel("FP16 plain, pairs", "Half", PLAIN, "Paired", v) for v in (16, 8)),
    *(Kernel("BF16 plain, FP32", "Bfloat16", "Operands<Half, Bfloat16>", "Exact", v) for v in (16, 8)),
    *(Kernel("FP32 plain, FP32", "float", "Operands<float, float>", "Exact", v) for v in (8, 4)),
    *(Kernel("INT8 records, pairs", "std::int8_t", RECORD, "Paired", v) for v in (16, 8)),
    Kernel("FP16 plain, one channel", "Half", PLAIN, "Exact", 1),
)
TEXT = """#include "{header}"
using namespace deploycc;
template <class Run>
__global__ void __launch_bounds__(128) kernel(const __grid_constant__ Problem p) {{
    const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * 128 + threadIdx.x;
    if (item < p.items) Run::run(p, item);
}}
template __global__ void kernel<{instance}>(const __grid_constant__ Problem);
"""


def tool(name: str) -> str:
    """Return the path of a tool of CUDA, from the path or from its Python package."""
    found = shutil.which(name) or next((str(p) for p in _packaged(name)), None)
    if found is None:
        raise SystemExit(f"{name} was not found: install CUDA, or pip install nvidia-cuda-{name}")
    return found


def _packaged(name: str) -> list[Path]:
    import site

    return [p for folder in site.getsitepackages() for p in Path(folder, "nvidia").glob(f"*/bin/{name}")]


def instructions(kernel: Kernel, arch: str) -> tuple[int, int]:
    """Return the instructions of one thread, and the bytes of local memory that ptxas spilled."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(TEXT.format(header=SOURCES / "dcnv3_problem.h", instance=kernel.instance))
        command = [tool("nvcc"), "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas=-v", "-cubin", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        listing = subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    # One line per instruction starts with its address; NOPs fill the end of the code.
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", listing, re.MULTILINE)
    return sum(name != "NOP" for name in found), spilled


def issue_time(per_channel: float) -> float:
    """Return the microseconds that issuing the instructions takes, 32 threads at a time."""
    return OUTPUTS * per_channel / 32 / ISSUES_PER_SECOND * 1e6


def print_instructions(console: Console, arch: str) -> None:
    """Print the table of instructions."""
    table = Table(
        "kernel", "V", "instructions", "per channel", "spilled", "model µs", f"at {PUBLISHED_SHARE:.0%} µs", title=f"SASS of {arch}"
    )
    for kernel in KERNELS:
        count, spilled = instructions(kernel, arch)
        per_channel = count / kernel.width
        model = issue_time(per_channel)
        table.add_row(
            kernel.name, str(kernel.width), str(count), f"{per_channel:.1f}", str(spilled), f"{model:.0f}", f"{model / PUBLISHED_SHARE:.0f}"
        )
    console.print(table)


def has_gpu() -> bool:
    """Return whether a GPU with a driver is there."""
    import torch

    return bool(torch.cuda.is_available())


def measure(arch: str) -> list[dict[str, Any]]:
    """Compile and run the GPU program; run it again under compute-sanitizer where that is installed."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "dcnv3_gpu")
        subprocess.run(
            [
                tool("nvcc"),
                "-std=c++17",
                "-O3",
                f"-arch={arch}",
                "-o",
                str(program),
                str(HERE / "dcnv3_gpu.cu"),
                str(SOURCES / "dcnv3_launch.cu"),
            ],
            check=True,
        )
        lines = subprocess.run([str(program)], capture_output=True, text=True, check=False).stdout.splitlines()
        checker = shutil.which("compute-sanitizer")
        for check in ("memcheck", "racecheck", "initcheck") if checker else ():
            done = subprocess.run([str(checker), "--tool", check, str(program), "short"], capture_output=True, text=True, check=False)
            print(f"compute-sanitizer {check}: {done.stdout.strip().splitlines()[-1]}")
    if not checker:
        print("compute-sanitizer was not found and did not run")
    return [json.loads(line) for line in lines]


def torch_times(size: int, channels: int, batch: int) -> tuple[float, float]:
    """Return the microseconds of the GridSample form in PyTorch, eager and compiled."""
    import torch

    from plugins_trt.dcnv3 import DCNv3
    from plugins_trt.dcnv3_torch import sampled

    what = DCNv3(group=channels // 16)
    x = torch.randn(batch, size, size, channels, device="cuda", dtype=torch.float16)
    offset = torch.randn(batch, size, size, what.group * 18, device="cuda", dtype=torch.float16)
    mask = torch.rand(batch, size, size, what.group * 9, device="cuda", dtype=torch.float16)
    times = []
    for form in (sampled, torch.compile(sampled)):
        for _ in range(3):
            form(x, offset, mask, what)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(20):
            form(x, offset, mask, what)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / 20)
    return times[0], times[1]


def print_times(console: Console, rows: list[dict[str, Any]], bandwidth: float) -> None:
    """Print the table of times, one line per shape."""
    shapes: dict[tuple[int, int, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "error" in row:
            raise SystemExit(row["error"])
        shapes[row["batch"], row["size"], row["channels"]][row["kernel"]].append(row)
    columns = (
        "batch",
        "shape",
        "records µs",
        "tactic",
        "GB/s",
        "bound µs",
        "of bound",
        "plain µs",
        "one/thread µs",
        "eager µs",
        "compiled µs",
    )
    table = Table(*columns, "worst difference", title="FP16 on this GPU")
    for (batch, size, channels), kernels in shapes.items():
        best, plain = (min(kernels[name], key=lambda r: float(r["us"])) for name in ("record", "plain"))
        bound = best["bytes"] / bandwidth * 1e-6
        eager, compiled = torch_times(size, channels, batch)
        worst = max(r["difference"] for name in ("record", "plain") for r in kernels[name])
        cells = [best["us"], best["tactic"], best["gbps"], bound, f"{bound / best['us']:.0%}", plain["us"]]
        cells += [kernels["one channel per thread"][0]["us"], eager, compiled, f"{worst:.1e}"]
        shown = [f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells]
        table.add_row(str(batch), f"{size}x{size}x{channels}", *shown)
    console.print(table)


def main() -> None:
    """Parse the command line and print what this machine can tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="architecture to compile for")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="memory bandwidth of the GPU in TB/s")
    options = parser.parse_args()
    console = Console(width=160)
    print_instructions(console, options.arch)
    if has_gpu():
        print_times(console, measure(options.arch), options.bandwidth)
    else:
        print("no GPU is here: nothing was timed")


if __name__ == "__main__":
    main()
