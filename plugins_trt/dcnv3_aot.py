"""DCNv3 as PTX behind TensorRT's ahead-of-time Python plugin API, for static shapes: the plan then needs no plugin library.

The kernel is that of ``csrc/dcnv3_kernel.h`` with every attribute and size written into it as a constant, so that it takes nothing but
pointers. Plans with dynamic shapes need the plugin library: TensorRT leaks a CUDA module at each change of shape otherwise (TensorRT
issue 4849).
"""

from __future__ import annotations

import inspect
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.core.dcnv3 import DOMAIN, PLAIN, DCNv3
from deploycc.core.errors import BackendError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

SOURCES = Path(__file__).parent / "csrc"
ENTRY, THREADS = "deploycc_dcnv3", 128
WIDTHS = (16, 8, 4, 2, 1)
_TYPES = {"float32": "float", "float16": "Half", "bfloat16": "Bfloat16"}
_KERNEL = """#include "{header}"
using namespace deploycc;
DC_INLINE void item_of(const void* x, const void* offset, const void* mask, void* y, std::int64_t item) {{
    Problem p{{}};
    p.x = x; p.offset = offset; p.mask = mask; p.y = y;
    {constants}
    if (item < p.items) Instance<{x}, {source}, {math}, {width}, {kernel}>::run(p, item);
}}
#if defined(__CUDACC__)
extern "C" __global__ void __launch_bounds__({threads}) {entry}(const void* x, const void* offset, const void* mask, void* y) {{
    item_of(x, offset, mask, y, static_cast<std::int64_t>(blockIdx.x) * {threads} + threadIdx.x);
}}
#else
extern "C" void {entry}(const void* x, const void* offset, const void* mask, void* y) {{
    for (std::int64_t item = 0; item < {items}; ++item) item_of(x, offset, mask, y, item);
}}
#endif
"""


@dataclass(frozen=True, slots=True)
class StaticKernel:
    """The kernel for one set of attributes, shapes and types; ``width`` channels per thread, in FP16 pairs or in FP32."""

    what: DCNv3
    x: tuple[int, ...]
    offset: tuple[int, ...]
    mask: tuple[int, ...]
    types: tuple[str, str, str]
    width: int
    paired: bool = False

    def __post_init__(self) -> None:
        self.what.check_shapes(self.x, self.offset, self.mask)
        if any(t not in _TYPES for t in self.types) or self.types[1] == "bfloat16":
            raise UsageError(f"there is no kernel for operands of {', '.join(self.types)}", at="deploycc::DCNv3", fix="see docs/dcnv3.md")
        if self.x[3] // self.what.group % self.width:
            raise UsageError(
                f"{self.width} channels per thread do not divide {self.x[3] // self.what.group}", at="deploycc::DCNv3", fix="choose fewer"
            )

    @property
    def items(self) -> int:
        """Return the number of threads with work."""
        batch, rows, columns = self.offset[:3]
        return batch * rows * columns * self.x[3] // self.width

    @property
    def blocks(self) -> int:
        """Return the number of thread blocks."""
        return -(-self.items // THREADS)

    def source(self) -> str:
        """Return the kernel as CUDA C++; compiled as C++ it is a function over the whole problem."""
        x, offset, mask = (_TYPES[t] for t in self.types)
        full = (self.what.kernel_h, self.what.kernel_w, self.what.points) == (3, 3, 9)
        packed = full and self.what.record and (self.types[1], self.offset[3]) == ("float16", 32 * self.what.group)
        return _KERNEL.format(
            header=SOURCES / "dcnv3_problem.h",
            constants=" ".join(f"p.{name} = {value};" for name, value in self._constants().items()),
            x=x,
            source="Record" if packed else f"Operands<{offset}, {mask}>",
            math="Paired" if self.paired else "Exact",
            width=self.width,
            kernel=3 if full else 0,
            threads=THREADS,
            entry=ENTRY,
            items=self.items,
        )

    def _constants(self) -> Mapping[str, str | int]:
        what, (_, height, width, channels) = self.what, self.x
        _, rows, columns, _ = self.offset
        reach = {axis: getattr(what, f"dilation_{axis}") * (getattr(what, f"kernel_{axis}") - 1) // 2 for axis in "hw"}
        blocks = channels // what.group // self.width
        divisors = {"blocks": blocks, "groups": what.group, "columns": columns, "rows": rows}
        return {
            **{name: f"Divisor::of({number})" for name, number in divisors.items()},
            "items": self.items,
            "items_per_image": rows * columns * what.group * blocks,
            "image_elements": height * width * channels,
            "height": height,
            "width": width,
            "channels": channels,
            "channels_per_group": channels // what.group,
            "offset_row": self.offset[3] // what.group,
            "mask_row": self.mask[3] // what.group,
            "mask_start": 2 * what.points * what.record,
            "points": what.points,
            "softmax": what.softmax,
            "skipped": what.points // 2 if what.remove_center else what.points,
            **{name: getattr(what, name) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w")},
            **{f"reach_{axis}": size for axis, size in reach.items()},
            **{f"first_{axis}": size - getattr(what, f"pad_{axis}") for axis, size in reach.items()},
            "offset_scale": f"{float(what.offset_scale)!r}f",
            "x_scale": "1.0f",
            "y_factor": "1.0f",
        }

    def ptx(self, arch: str) -> str:
        """Return the PTX for ``arch``, such as ``sm_90``.

        Raises:
            BackendError: when nvcc is missing or refuses the kernel.
        """
        if shutil.which("nvcc") is None:
            raise BackendError("nvcc was not found", at="DCNv3 ahead of time", fix="install the CUDA toolkit, or use the plugin library")
        with tempfile.TemporaryDirectory() as folder:
            kernel = Path(folder, "kernel.cu")
            kernel.write_text(self.source())
            command = ["nvcc", "-std=c++17", "-O3", "-ptx", f"-arch={arch.replace('sm_', 'compute_')}", "-o", "-", str(kernel)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"nvcc refused the kernel: {done.stderr.strip()[-400:]}", at="DCNv3 ahead of time", fix="report it")
        return done.stdout


def register(trtp: ModuleType, *, arch: str) -> None:
    """Register ``deploycc::DCNv3`` with ``tensorrt.plugin``; the nodes of a network then become PTX in the plan.

    Args:
        trtp: the module ``tensorrt.plugin`` (TensorRT 10.7 or later).
        arch: the architecture for which the plan is built.
    """
    name = f"{DOMAIN}::{PLAIN}"
    names = ("x", "offset", "mask")
    attributes = [f for f in fields(DCNv3) if f.name not in ("x_scale", "y_scale")]
    kinds = {f.name: float if f.name == "offset_scale" else int for f in attributes}

    def described(*given: Any, **named: Any) -> Any:
        x, offset = (*given, *named.values())[:2]
        result = x.like()
        result.shape_expr[1], result.shape_expr[2] = offset.shape_expr[1], offset.shape_expr[2]
        return result

    def implemented(*given: Any, **named: Any) -> Any:
        values = dict(zip((*names, *kinds, "outputs", "tactic"), given, strict=False)) | named
        what = DCNv3(**{key: values[key] for key in kinds})
        kernel = static_kernel(what, [_static(values[n]) for n in names], [str(values[n].dtype).rsplit(".", 1)[-1].lower() for n in names])
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.block_x, launch.shared_mem = kernel.blocks, THREADS, 0
        return ENTRY, kernel.ptx(arch), launch, trtp.SymIntExprs(0)

    described.__signature__ = _signature([(n, trtp.TensorDesc) for n in names] + list(kinds.items()), trtp.TensorDesc)  # type: ignore[attr-defined]
    parameters = [*((n, trtp.TensorDesc) for n in names), *kinds.items(), ("outputs", tuple[trtp.TensorDesc]), ("tactic", int)]  # type: ignore[name-defined]
    implemented.__signature__ = _signature(parameters, inspect.Signature.empty)  # type: ignore[attr-defined]
    trtp.register(name)(described)
    trtp.aot_impl(name)(implemented)


def static_kernel(what: DCNv3, shapes: Sequence[tuple[int, ...]], types: Sequence[str]) -> StaticKernel:
    """Return the kernel that suits the shapes: as many channels per thread as leave a large GPU enough threads."""
    names = {"half": "float16", "float": "float32", "bf16": "bfloat16"}
    kinds = tuple(names.get(t, t) for t in types)
    channels, outputs = shapes[0][3] // what.group, shapes[1][0] * shapes[1][1] * shapes[1][2] * shapes[0][3]
    fitting = [v for v in WIDTHS if channels % v == 0]
    width = next((v for v in fitting if v <= 2 or outputs // v >= 132 * 1024), fitting[-1])
    x, offset, mask = shapes
    return StaticKernel(what, x, offset, mask, (kinds[0], kinds[1], kinds[2]), width, paired=kinds[0] == "float16" and width > 1)


def _static(tensor: Any) -> tuple[int, ...]:
    """Return the shape of an operand.

    Raises:
        UsageError: when it is dynamic.
    """
    sizes = [tensor.shape_expr[i] for i in range(4)]
    if not all(size.is_constant for size in sizes):
        raise UsageError("the shapes of DCNv3 are dynamic", at="--dcn aot", fix="fix every size with --shape, or use the plugin library")
    return tuple(int(size.constant_value()) for size in sizes)


def _signature(parameters: Sequence[tuple[str, Any]], result: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind, annotation=type_) for name, type_ in parameters], return_annotation=result)
