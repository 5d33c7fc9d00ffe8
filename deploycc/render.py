"""Show builds to people: progress on the terminal, ``report.md`` and ``report.html`` on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploycc.core.report import BuildReport


class LiveView:
    """A Watcher that shows stages as progress bars on standard error."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<28}"),
            BarColumn(24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
        )
        self.bars = Progress(*columns, console=console, transient=False)
        self.task: TaskID | None = None
        self.beside: dict[str, TaskID] = {}

    def __enter__(self) -> LiveView:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self.bars.stop()

    def stage(self, name: str) -> None:
        """Finish the current bar and begin another."""
        self._finish()
        self.task = self.bars.add_task(name, total=None, count="")

    def progress(self, done: int, total: int) -> None:
        """Move the current bar."""
        if self.task is not None:
            self.bars.update(self.task, completed=done, total=total, count=f"{done}/{total}")

    def begin(self, name: str) -> None:
        """Add a bar that runs beside others, in place of the current one."""
        self._finish()
        self.beside[name] = self.bars.add_task(name, total=None, count="")

    def end(self, name: str) -> None:
        """Complete a bar that ran beside others."""
        task = self.beside.pop(name)
        self.bars.update(task, total=1, completed=1)
        self.bars.stop_task(task)

    def warn(self, text: str) -> None:
        """Print a warning above the bars."""
        self.console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, emoji=False)

    def _finish(self) -> None:
        if self.task is not None:
            self.bars.update(self.task, total=1, completed=1)
            self.bars.stop_task(self.task)
            self.task = None


def summary(report: BuildReport, directory: Path) -> Table:
    """Return the closing table of a build."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    plan = report.plan
    formats = ", ".join(f"{count} {name}" for name, count in plan["regions"].items())
    table.add_row("precision", f"{report.request['precision']}: {formats or 'no region'}; {plan['average_bits']:.1f} bits per weight")
    for row in report.verification:
        agreement = "" if row["agreement"] is None else f", agreement {row['agreement']:.2%}"
        table.add_row(f"output {row['output']}", f"SQNR {row['sqnr_db']:.1f} dB, cosine {row['cosine']:.6f}{agreement}")
    if report.accuracy:
        a = report.accuracy
        table.add_row(a["metric"], f"FP32 {a['fp32']:.2f} %, built {a['built']:.2f} % on {a['samples']} samples")
    for engine in report.engines:
        table.add_row("engine", f"{engine['target']}: {engine['bytes'] / 1e6:.2f} MB in {engine['build_seconds']:.1f} s")
    table.add_row("directory", f"{directory} (read report.md)")
    return table


def write_reports(folder: Path, report: BuildReport) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``."""
    (folder / "report.json").write_text(report.to_json())
    context = {"r": json.loads(report.to_json()), "chart": _noise_chart(report.regions)}
    for name in ("report.md", "report.html"):
        (folder / name).write_text(_template(name).render(**context))


def _template(name: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    source = files("deploycc").joinpath("templates", f"{name}.j2").read_text()
    environment = Environment(autoescape=name.endswith(".html"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["db"] = _decibels
    return environment.from_string(source)


def _decibels(noise: float) -> str:
    from math import log10

    return f"{-10 * log10(noise):.1f} dB" if noise > 0 else "exact"


def _noise_chart(regions: list[dict[str, Any]]) -> str:
    """Return an inline SVG: SQNR of each region quantized alone, coloured by the chosen format."""
    scored = [r for r in regions if r["noise"] and any(v > 0 for v in r["noise"].values())]
    if not scored:
        return ""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "deploycc"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, max(2.0, 0.2 * len(scored) + 1)))
    for position, region in enumerate(scored):
        _draw(axes, position, region["noise"], region["format"])
    axes.set_yticks(range(len(scored)), [r["source"] or r["name"] for r in scored], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("SQNR at the outputs when this region alone is quantized (dB); filled: the chosen format")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    plt.close(figure)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _draw(axes: Any, position: int, noise: Mapping[str, float], chosen: str) -> None:
    from math import log10

    colours = {"int8": "#c44e52", "fp8": "#4c72b0", "int4": "#dd8452", "nvfp4": "#55a868", "mxfp8": "#8172b3"}
    for name, value in noise.items():
        if value > 0:
            face = colours.get(name, "#555") if name == chosen else "none"
            axes.plot([-10 * log10(value)], [position], "o", color=colours.get(name, "#555"), markerfacecolor=face, markersize=5)
