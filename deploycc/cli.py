"""The command line. It parses, calls and shows; every heavy import happens inside a command."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from deploycc import __version__
from deploycc.core.errors import BackendError, ContractError, DeployccError, UsageError

INTERRUPTED, TERMINATED = 130, 143

app = typer.Typer(
    name="deploycc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compile vision models to TensorRT engines. Precision is chosen layer by layer; the evidence comes with the engine.",
    epilog="Start with: deploycc build model.onnx --precision mixed. Exit codes: 0 built and verified, 2 the request cannot be met, "
    "3 a contract was broken, 4 the backend failed, 5 a budget was missed.",
)

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model: ONNX, opset 7 to 23, external data beside it.")]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=MIN:OPT:MAX",
        help="Shapes of a dynamic input, e.g. image=1x3x224x224:8x3x224x224:16x3x224x224, or image=1:8:16 for the batch alone.",
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Handle options that precede a command."""
    if version:
        print(f"deploycc {__version__}")
        raise typer.Exit


@app.command()
def build(
    model: ModelPath,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, fp16, bf16 (16 bits with the range of 32), int8, fp8, int4 (weights of matrix products alone, in blocks), nvfp4 "
            "and mxfp8 (4 and 8-bit floats in blocks of 16 and 32; matrix products), where the target has them; or mixed: the format of "
            "each region chosen by its measured effect. "
            "w4a4, mp4, w6a6, mp6: LRP-QViT's quantizers simulated on the CPU, for onnxruntime only."
        ),
    ] = "fp16",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Calibration data: .npz, .npy, a directory of them, or synthetic:N. MODEL.calib.npz beside the model is found by itself.",
        ),
    ] = None,
    eval: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="Labelled data (an array 'labels') for the accuracy before and after.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T",
            help="tensorrt[:sm_XX], tensorrt-rtx[:sm_XX[+sm_YY]] or onnxruntime; repeat for several engines. "
            "Default: tensorrt with a GPU, else tensorrt-rtx ahead of time.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="B",
            help="Bounds: sqnr>=25dB, accuracy-drop<=0.5, bits<=8, size<=0.5x, bops<=0.5x (bit operations), latency<=0.7x; several with "
            "commas. Without any, mixed takes the least noise with 10 bits per weight and 1.15 times the least estimated latency, and "
            "nothing slower than the base format if there is another way.",
        ),
    ] = "",
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.json", help="Apply the plan of another build instead of --precision: nothing is calibrated or scored."),
    ] = None,
    shape: ShapeOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Build directory; default MODEL.deploycc. A previous build there is replaced when this one is complete."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="TOML",
            help="deploycc.toml: [preprocessing] says how a directory of images is read, [calibration] how far ranges reach, [regions] "
            "which format regions have by pattern.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of synthetic data.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to calibrate on synthetic data.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Kill an engine build after this long; default by the number of nodes.")
    ] = None,
    workspace: Annotated[int | None, typer.Option(metavar="MIB", help="Workspace of the target in MiB; default: the builder's.")] = None,
    dcn: Annotated[str, typer.Option(metavar="HOW", help="DCNv3 in TensorRT: body, aot (PTX), or a plugin library's path.")] = "body",
    compatibility: Annotated[
        str,
        typer.Option(
            metavar="MODES",
            help="Engines of TensorRT that run elsewhere, too, at a price: version (later releases), ampere-plus (all GPUs from sm_80 on), "
            "same-arch (all models of this architecture); two with a comma.",
        ),
    ] = "",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="How far INT8 ranges reach: auto (default: mse or minmax, whichever errs less at the outputs), mse, minmax, entropy, "
            "percentile or percentile:P. Where DIR holds the ranges of the same model and data, another way needs no second pass.",
        ),
    ] = None,
    merge: Annotated[
        str, typer.Option(help="exact: merge layers where the result is one layer; all: also with constant border maps; off: never.")
    ] = "exact",
    rescale: Annotated[
        str,
        typer.Option(
            help="auto: move outlier channels behind LayerNorms into the next weights where INT8 gains by it (exact); off: never."
        ),
    ] = "auto",
    rounding: Annotated[
        str, typer.Option(help="auto: round weights together for the least error of their layer, given real data; nearest: one by one.")
    ] = "auto",
    reparam: Annotated[
        str | None,
        typer.Option(
            metavar="R", help="LayerNorms in a simulation: layer, channel, repq, or crl[:K] (default), clipped at K standard deviations."
        ),
    ] = None,
    sensitivity: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How --precision mixed scores regions. auto: sqnr, or hybrid where that would take long. Measured, one run per region and "
            "format: sqnr (noise at the outputs), kl (of the class probabilities). From gradients, one sweep whatever the size: lrp "
            "(relevance), fisher, hessian, hybrid (each error along its gradient).",
        ),
    ] = "auto",
    relevance_fallback: Annotated[
        str | None,
        typer.Option(metavar="gradient", help="How relevance passes an operator without a rule (lrp); default: refuse it."),
    ] = None,
    verify_each: Annotated[
        bool, typer.Option("--verify-each", help="Compare the outputs after every exact pass, and roll back a pass that changes them.")
    ] = False,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the graph after each pass that changed it.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show only warnings and errors.")] = False,
) -> None:
    """Build engines from an ONNX model and verify them.

    Writes a directory with model.onnx, plan.json, scores.json, report.md, report.html, report.json, manifest.json and engines/.

    Examples:
        deploycc build vit.onnx --precision mixed

        deploycc build vit.onnx --precision int8 --data calib.npz --eval test.npz --budget "accuracy-drop<=0.5" --target tensorrt-rtx:sm_89
    """
    from rich.console import Console

    from deploycc.pipeline import build as run_build
    from deploycc.render import LiveView, summary
    from deploycc.request import BuildRequest, Silent

    console = Console(stderr=True)
    request = BuildRequest(
        model=model, precision=precision, data=data, eval=eval, targets=tuple(target or ()), budget=budget, shapes=tuple(shape or ()),
        out=out, config=config, seed=seed, strict=strict, timeout=timeout, workspace=None if workspace is None else workspace * 2**20,
        merge=merge, rescale=rescale, rounding=rounding, reparam=reparam, sensitivity=sensitivity, relevance_fallback=relevance_fallback,
        verify_each=verify_each, dump=dump, plan=plan, calibration=calibration, dcn=dcn, compatibility=compatibility,
    )  # fmt: skip
    if quiet:
        report, _ = run_build(request, Silent())
        for text in report.warnings:
            console.print(f"[yellow]warning:[/] {_escaped(text)}", highlight=False, emoji=False)
        return
    with LiveView(console) as view:
        report, directory = run_build(request, view)
    Console(emoji=False).print(summary(report, directory), highlight=False)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="timm:NAME, package.module:function or file.py:function; a function returns an nn.Module.")],
    out: Annotated[Path, typer.Option(metavar="MODEL.onnx", help="Where to write the model.")],
    weights: Annotated[
        Path | None, typer.Option(metavar="W.safetensors", help="Weights to load; without them the module keeps its own (random for timm).")
    ] = None,
    shape: ShapeOption = None,
    opset: Annotated[int, typer.Option(help="Opset of the export.")] = 20,
) -> None:
    """Export a PyTorch model to ONNX through torch.export.

    The batch is dynamic unless --shape says otherwise.

    Example:  deploycc export timm:deit_tiny_patch16_224 --out deit.onnx --shape image=1x3x224x224:8x3x224x224:16x3x224x224
    """
    from deploycc import registry
    from deploycc.export import export as run_export

    path = run_export(source, out, weights=weights, shapes=tuple(shape or ()), opset=opset, plugins=registry.plugins())
    print(f"wrote {path}")


@app.command()
def passes(
    long: Annotated[bool, typer.Option("--long", help="Print each pass's documentation.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/passes.md.")] = False,
) -> None:
    """List every registered pass in the order in which it runs."""
    from deploycc import catalogue

    print(catalogue.markdown() if markdown else catalogue.listing(long=long), end="" if markdown else "\n")


@app.command()
def explain(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A build directory.")],
    node: Annotated[str | None, typer.Argument(metavar="NODE", help="A node, region or PyTorch module; default: all regions.")] = None,
    passes: Annotated[bool, typer.Option("--passes", help="Show what each pass cost, rewrote and declined instead.")] = False,
    pareto: Annotated[bool, typer.Option("--pareto", help="Show the best plans between the fastest and the least noisy instead.")] = False,
) -> None:
    """Say which format each region has, and why."""
    from deploycc.explain import explain as run_explain
    from deploycc.explain import explain_front, explain_passes

    print(explain_front(directory) if pareto else explain_passes(directory) if passes else run_explain(directory, node))


@app.command()
def profile(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A build directory, or anybody's engine file.")],
    target: Annotated[str, typer.Option(metavar="T", help="The engine of this target; default: the first.")] = "",
    runs: Annotated[int, typer.Option(min=1, help="Timed inferences.")] = 100,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print the cost model's estimate per region; needs no GPU.")] = False,
    chart: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the slowest rows into an .svg or .png file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where the time goes: per-layer times on a GPU, joined with regions, formats and PyTorch names.

    Without a GPU nothing can be measured (exit code 4); what is printed then is an estimate, and says so.
    """
    from deploycc import profile as profiling
    from deploycc.backends.tensorrt import present_arch

    is_blind = present_arch() is None and not estimate
    if is_blind:
        print("no GPU with a driver was found, so nothing can be measured; this is the cost model's estimate", file=sys.stderr)
    found = profiling.estimated(path, target=target) if estimate or is_blind else profiling.measured(path, target=target, runs=runs)
    print(found.to_json() if json else profiling.table(found), end="" if json else "\n")
    if chart is not None:
        profiling.chart(found, chart)
    raise typer.Exit(BackendError.exit_code if is_blind else 0)


@app.command()
def bundle(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A build directory.")],
    out: Annotated[Path | None, typer.Option(metavar="B", help="The bundle's directory; default DIR with the suffix .bundle.")] = None,
    triton: Annotated[Path | None, typer.Option(metavar="REPO", help="Write the model into this Triton model repository, too.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Golden inputs, as for build; default: the calibration data, else synthetic.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(metavar="TXT", help="The names of the classes, one per line.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="TOML", help="deploycc.toml, whose section [preprocessing] is passed on.")] = None,
    plugin: Annotated[list[Path] | None, typer.Option(metavar="LIB", help="A plugin library that the engines need; repeat it.")] = None,
    instances: Annotated[int, typer.Option(help="Triton: copies of the model per device.")] = 1,
    cuda_graphs: Annotated[bool, typer.Option(help="Triton: let TensorRT replay CUDA graphs.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of synthetic golden inputs.")] = 0,
) -> None:
    """Bundle a build for serving: engines, ONNX fallbacks, golden inputs and outputs, and the hash of every file.

    Example:  deploycc bundle vit.deploycc --labels classes.txt --triton models/
    """
    from deploycc.serve.bundle import BundleRequest
    from deploycc.serve.bundle import bundle as run_bundle
    from deploycc.serve.triton import TritonOptions, write_repository

    request = BundleRequest(directory, out=out, data=data, labels=labels, config=config, plugins=tuple(plugin or ()), seed=seed)
    result = run_bundle(request)
    models = write_repository(result, triton, TritonOptions(instances, cuda_graphs)) if triton is not None else []
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {result.directory}: {', '.join(v['path'] for v in result.manifest['variants'])}")
    for model in models:
        print(f"wrote {model}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A model or a build directory: the reference.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another form of the same model.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="As for build; with labels, the accuracy of both. Default: MODEL.calib.npz, or synthetic."),
    ] = None,
    target: Annotated[str, typer.Option(metavar="T", help="Whose times are estimated; default tensorrt-rtx.")] = "",
    config: Annotated[Path | None, typer.Option(metavar="TOML", help="As for build: [preprocessing] for directories of images.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of synthetic data.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for programs.")] = False,
) -> None:
    """Compare two models or builds: outputs, layers where names match, formats of regions, size and estimated time.

    Examples:
        deploycc compare vit.onnx vit.deploycc --data eval.npz

        deploycc compare int8.deploycc mixed.deploycc
    """
    from rich.console import Console

    from deploycc.compare import compare as run_compare
    from deploycc.render import LiveView

    with LiveView(Console(stderr=True)) as view:
        compared = run_compare(a, b, data=data, target=target, config=config, seed=seed, watch=view)
    print(compared.to_json() if json else compared, end="" if json else "\n")


@app.command()
def bisect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A build directory whose model can still be found.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="As for build; with labels the search goes by accuracy, else by SQNR. Default: the build's data."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="TOML", help="As for build: [preprocessing] for directories of images.")] = None,
    runs: Annotated[
        int | None, typer.Option(metavar="N", min=4, help="The most measurements; default about 3 log2 of the number of regions.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for programs.")] = False,
) -> None:
    """Find the regions of a build that lose the accuracy, by binary search, and how much each recovers.

    Examples:
        deploycc bisect vit.deploycc --data eval.npz
    """
    from rich.console import Console

    from deploycc.bisect import bisect as run_bisect
    from deploycc.render import LiveView

    with LiveView(Console(stderr=True)) as view:
        found = run_bisect(directory, data=data, config=config, runs=runs, watch=view)
    print(found.to_json() if json else found, end="" if json else "\n")


@app.command()
def lint(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL.onnx", help="Any ONNX file, quantized by anybody.")] = None,
    target: Annotated[
        str, typer.Option(metavar="T", help="e.g. tensorrt-rtx:sm_89: formats that this target lacks are findings too.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print every finding as JSON, for programs.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Write the model with the repairs that change no number, and lint that.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="MODEL.onnx", help="Where --fix writes; default MODEL.fixed.onnx. It may be the input.")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules instead.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --rules: print the page docs/lint.md.")] = False,
) -> None:
    """Say what in the Q/DQ of a model TensorRT refuses, or computes slower or in another format than the file asks for.

    Exit codes: 0 no error (there may be warnings and notes), 1 at least one error, 2 the file cannot be read.

    Examples:
        deploycc lint model_int8.onnx --target tensorrt-rtx:sm_89

        deploycc lint model_int8.onnx --fix --out repaired.onnx
    """
    if rules:
        from deploycc.lint import catalogue as rulebook

        print(rulebook.markdown() if markdown else rulebook.listing(), end="" if markdown else "\n")
        return
    from deploycc.lint.linting import fix as run_fix
    from deploycc.lint.linting import lint as run_lint

    if model is None:
        raise UsageError("no model is given", at="MODEL.onnx", fix="name an ONNX file, or list the rules with --rules")
    if out is not None and not fix:
        raise UsageError("--out says where --fix writes", at="--out", fix="add --fix, or leave --out away")
    written = out or model.with_suffix(".fixed.onnx")
    inspection = run_fix(model, written, target=target) if fix else run_lint(model, target=target)
    print(inspection.to_json() if json else inspection, end="" if json else "\n")
    if fix and not json:
        print(f"wrote {written}")
    raise typer.Exit(inspection.exit_code)


@app.command()
def replay(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A build directory, or the reproducer of a crash.")]) -> None:
    """Run a build again from its manifest, or a crashed pass from its reproducer, and say what drifted.

    Exit codes: 0 it came out as recorded (a crash: no longer happens), 3 it did not, 2 an input is missing or has changed.
    """
    from deploycc.replay import replay as run_replay

    verdict = run_replay(directory)
    print(verdict.text)
    raise typer.Exit(verdict.exit_code)


@app.command()
def targets(
    probe: Annotated[
        bool, typer.Option("--probe", help="Ask the builders installed here, operator by operator (minutes); later builds go by it.")
    ] = False,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was probed as JSON.")] = None,
) -> None:
    """List what each target computes natively, and which operators its builder was found to refuse."""
    from deploycc import probe as probing
    from deploycc.backends.probed import recorded

    if probe:
        builders = probing.installed()
        if not builders:
            raise UsageError("there is no builder to ask", at="--probe", fix="`deploycc doctor` says what is missing of each")
        found = probing.probe_all(builders, lambda name: print(name, file=sys.stderr))
        print(f"kept in {probing.remember(found)}", file=sys.stderr)
    else:
        found = recorded()
    print(probing.describe(found))
    if write is not None:
        probing.write(found, write)


@app.command()
def doctor() -> None:
    """Check this machine: backends, versions, GPU, and the formats that each target computes."""
    from deploycc.doctor import examine

    print(examine())


def main() -> None:
    """Run the command line; turn each error into one paragraph and its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # So that children and temporary folders go as with Ctrl-C.
    try:
        app()
    except Exception as error:
        if os.environ.get("DEPLOYCC_TRACEBACK"):
            raise
        _refuse(error if isinstance(error, DeployccError) else _unforeseen(error))
    except SystemExit as ended:
        if ended.code in {INTERRUPTED, TERMINATED}:  # The first is what Typer makes of Ctrl-C.
            print("interrupted: nothing was written", file=sys.stderr)
        raise


def _refuse(error: DeployccError) -> NoReturn:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, emoji=False)
    sys.exit(error.exit_code)


def _unforeseen(error: Exception) -> DeployccError:
    """Return what to tell of an exception that nothing in deploycc raises on purpose."""
    import traceback

    if isinstance(error, OSError) and error.strerror:
        return UsageError(
            f"the system refuses: {error.strerror}", at=f"'{error.filename or 'unknown'}'", fix="check permissions and free space"
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"unforeseen {type(error).__name__}: {error}".split())
    fix = "this is a defect of deploycc: run again with DEPLOYCC_TRACEBACK=1 and report what that prints"
    return ContractError(what, at=f"line {last.lineno} of {last.filename}", fix=fix)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
