"""Build the engines of all targets at the same time, each in a child process; one that fails does not lose the others."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING

from deploycc import registry
from deploycc.core import child
from deploycc.core.backend import BuildOptions, Engine
from deploycc.core.compatibility import parse_compatibility
from deploycc.core.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

    from deploycc.core.target import Target
    from deploycc.request import Job


def build_engines(job: Job, folder: Path) -> list[Engine]:
    """Build one engine per target from ``folder/model.onnx`` into ``folder/engines``, in the order of the targets.

    What fails is recorded in the report. Builders that time kernels on the GPU run one after another, since they would spoil
    each other's timings. When this process is interrupted, the children are killed.
    """
    (folder / "engines").mkdir()
    gpu = Lock()
    with ThreadPoolExecutor(min(len(job.targets), os.cpu_count() or 1), thread_name_prefix="build") as pool:
        builds = [pool.submit(_build, job, folder, target, gpu) for target in job.targets]
        try:
            found = [_outcome(each) for each in builds]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            child.kill_running()
            raise
    engines = []
    for target, outcome in zip(job.targets, found, strict=True):
        if isinstance(outcome, Engine):
            engines.append(outcome)
            continue
        # A reproducer lies in the temporary folder, which is about to take the name of the build directory.
        fix = outcome.fix.replace(str(folder), str(job.request.directory.resolve()))
        job.report.failures.append({"target": str(target), "what": outcome.what, "at": outcome.at, "fix": fix})
        job.warn(f"{target}: {outcome.what}")
    return engines


def _build(job: Job, folder: Path, target: Target, gpu: Lock) -> Engine:
    backend = registry.backend(target.backend)
    out = folder / "engines" / f"{target.slug}{'.onnx' if target.backend == 'onnxruntime' else '.engine'}"
    options = BuildOptions(job.request.timeout, job.request.workspace, job.request.dcn, parse_compatibility(job.request.compatibility))
    with gpu if backend.doctor().get("needs_gpu") else nullcontext(), job.stage_beside(f"build {target}"):
        engine: Engine = backend.build(folder / "model.onnx", target, out=out, profiles=job.profiles, options=options)
        return engine


def _outcome(build: Future[Engine]) -> Engine | BackendError:
    try:
        return build.result()
    except BackendError as error:
        return error
