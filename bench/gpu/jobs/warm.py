"""Compiles, on all cores, the kernels that a run of the benchmark will launch.

    python -m bench.gpu.jobs.warm [--jobs N] [--capability 90] [--quick] [--tiles] [--trial]

They go to Triton's own cache (TRITON_CACHE_DIR), where every later process finds them. No GPU is
needed: models run on fake tensors, and launches are recorded instead of made. A cache that was
filled elsewhere with the same Python, Triton and source is found too: copy the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler import ASTSource

from bench.compare.cases import DTYPES, INFERENCE, Case
from bench.compare.rounds import inference, step
from bench.counted.step_trace import fake_copy
from bench.counted.trace import Trace, traced
from bench.gpu.jobs.cases import Plan, correctness_jobs, first_jobs, timed_jobs
from bench.gpu.jobs.checks import run_operator
from bench.gpu.jobs.job import Job, KernelCheck
from bench.gpu.jobs.keys import stable_keys
from bench.gpu.jobs.models import ModelCheck
from bench.gpu.jobs.steps import StepCheck
from bench.machine_code.offline import gpu_target, specialise
from bench.providers import (
    attention as attention_providers,
)
from bench.providers import (
    bank_attention as bank_attention_providers,
)
from bench.providers import (
    experts as expert_providers,
)
from bench.providers.attention import AttentionCase
from bench.providers.bank_attention import BankAttentionCase
from bench.providers.experts import ExpertCase
from bench.providers.models import OURS, provide
from bench.tiles.candidates import SHAPES, candidates, current, launch_of
from bench.tiles.times import STAGES
from vpt_fast.kernels.runtime.launch import Launch, Target


class Kernel(NamedTuple):
    """What Triton compiles, in a form that can be sent to another process.

    Attributes:
        module: Module of the function.
        name: Name of the function.
        signature: Signature for `triton.compiler.ASTSource`.
        constants: Compile-time values for `triton.compiler.ASTSource`.
        attributes: Attributes of arguments for `triton.compiler.ASTSource`.
        options: Options of `triton.compile`.
        launch: Name of the launch, for reports.
    """

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    launch: str


@contextlib.contextmanager
def recorded_launches(capability: int) -> Iterator[list[Launch]]:
    """Record the launches inside, as a GPU of this capability would make them."""
    found: list[Launch] = []

    with contextlib.ExitStack() as stack:
        note = mock.patch.object(Trace, "record_launch", lambda _, launch: found.append(launch))
        stack.enter_context(note)
        for name, module in list(sys.modules.items()):
            if name.startswith("vpt_fast.") and "target_of" in vars(module):
                target = mock.patch.object(module, "target_of", lambda _: Target(capability))
                stack.enter_context(target)
        stack.enter_context(traced())
        yield found


def _run(job: Job) -> None:
    """Run vpt_fast's part of a job on fake tensors; do nothing for jobs without one."""
    if isinstance(job, ModelCheck):
        return _run_model(replace(job.case, batch=2))
    if isinstance(job, StepCheck):
        return _run_model(job.case)
    if isinstance(job, Case):
        return _run_model(job) if OURS in job.providers else None
    dtype = torch.bfloat16
    if isinstance(job, KernelCheck):
        run_operator(job.case, DTYPES[job.dtype or "bfloat16"])
    elif isinstance(job, AttentionCase):
        attention_providers.functions(replace(job, providers=(OURS,)), dtype)[OURS]()
    elif isinstance(job, ExpertCase):
        expert_providers.functions(replace(job, providers=(OURS,)), dtype)[OURS]()
    elif isinstance(job, BankAttentionCase):
        bank_attention_providers.functions(replace(job, providers=(OURS,)), dtype)[OURS]()
    return None


def _run_model(case: Case) -> None:
    dtype, size = DTYPES[case.dtype], case.image_size
    with torch.device("meta"):
        plain = timm.create_model(case.model, num_classes=case.classes, img_size=size).eval()
    mode = FakeTensorMode()
    plain = fake_copy(plain, dtype, mode)
    with mode:
        module = provide(OURS, plain, case.settings(), case.memory)
        images = torch.empty(case.batch, 3, size, size, dtype=dtype)
        if case.work == INFERENCE:
            inference(module.eval(), images)()
        else:
            step(module, images, torch.empty(case.batch, dtype=torch.int64))()


def kernels_of(job: Job, capability: int) -> list[Kernel] | str:
    """Return the kernels that a job launches; or why it could not be run here.

    Kernels that are not found here are compiled when they are launched.
    """
    whole = isinstance(job, Case | ModelCheck | StepCheck | ExpertCase) or (
        isinstance(job, KernelCheck) and isinstance(job.case, ExpertCase)
    )
    try:
        with (
            recorded_launches(capability) as found,
            contextlib.nullcontext() if whole else FakeTensorMode(),
        ):
            _run(job)
        return kernels(found, capability)
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"[:200]


def kernels(found: Sequence[Launch], capability: int) -> list[Kernel]:
    """Return the kernels of launches, each once."""
    target = gpu_target(capability)
    by_key: dict[str, Kernel] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fake tensors are asked for their addresses
        for launch in found:
            source, options = specialise(launch, target)
            function = launch.kernel
            kernel = Kernel(
                function.__module__, function.__name__, source.signature, source.constants,
                source.attrs, options, launch.name,
            )  # fmt: skip
            by_key.setdefault(repr(kernel[:-1]), kernel)
    return list(by_key.values())


def tile_launches(capability: int) -> list[Launch]:
    """Return launches of attention's candidate tiles at 64 channels in bf16."""
    from vpt_fast.kernels.attention.tiles import KERNELS

    found = []
    for kernel in KERNELS:
        key = (kernel, 64, "bf16", capability)
        for choice in dict.fromkeys((current(key), *candidates(key, STAGES))):
            found += [launch_of(key, shape, choice)[1] for shape in SHAPES]
    return found


_FEW = 1


def _build(kernel: Kernel, capability: int) -> str:
    """Compile a kernel; return an error message, "" if there is none."""
    try:
        function = getattr(importlib.import_module(kernel.module), kernel.name)
        source = ASTSource(function, kernel.signature, kernel.constants, kernel.attributes)
        target = gpu_target(capability)
        _build_launcher(triton.compile(source, target=target, options=kernel.options))
    # Some candidates exceed the device's resources.
    except Exception as failure:
        return f"{kernel.launch}: {type(failure).__name__}: {failure}"[:160]
    return ""


def _build_launcher(kernel: Any) -> None:
    """Build the C function that launches a kernel, where Triton (up to 3.6) has one per kernel."""
    with contextlib.suppress(Exception):  # it cannot be linked without CUDA's library
        from triton.backends.nvidia import driver

        if hasattr(driver, "make_launcher") and driver.library_dirs():
            driver.CudaUtils()
            driver.CudaLauncher(kernel.src, kernel.metadata)


def warm(
    jobs: Sequence[Job], given: Sequence[Kernel], capability: int, processes: int
) -> Iterator[str]:
    """Find and compile the kernels of jobs, and the given kernels, in parallel processes.

    Yields:
        Lines to print, as they become known.
    """
    start = time.perf_counter()
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, torch.set_num_threads, (1,)) as pool:
        by_key = {repr(kernel[:-1]): kernel for kernel in given}
        tasks = [(job, capability) for job in jobs]
        for found in pool.starmap(kernels_of, tasks, chunksize=1):
            if isinstance(found, str):
                yield found
            else:
                by_key |= {repr(kernel[:-1]): kernel for kernel in found}
        yield f"{len(by_key)} kernels, {time.perf_counter() - start:.0f} s to find them"
        builds = [(kernel, capability) for kernel in by_key.values()]
        failed = [text for text in pool.starmap(_build, builds, chunksize=1) if text]
    yield from failed
    yield (
        f"{len(by_key) - len(failed)} kernels compiled for sm_{capability}, Triton "
        f"{triton.__version__}, {time.perf_counter() - start:.0f} s in all"
    )


def _capability() -> int:
    """Return the GPU's capability, without opening the device; 90 where there is none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return int(done.stdout.split()[0].replace(".", ""))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 90


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile kernels, and print which did not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.jobs.warm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--capability", type=int, help="default that of the GPU, or 90")
    parser.add_argument("--quick", action="store_true", help="the kernels of --cases quick")
    parser.add_argument("--trial", action="store_true", help="only a few, to try the code")
    parser.add_argument(
        "--tiles", action="store_true", help="candidate tiles of `bench.tiles.tune`"
    )
    options = parser.parse_args(arguments)
    capability = options.capability or _capability()
    stable_keys()
    given: list[Kernel] = []
    jobs = _trial() if options.trial else _jobs(Plan(full=not options.quick))
    if options.tiles:
        jobs = []
        tiles = tile_launches(capability)
        given = kernels(tiles[:_FEW] if options.trial else tiles, capability)
    for line in warm(jobs, given, capability, options.jobs):
        print(line, flush=True)
    return 0


def _jobs(plan: Plan) -> list[Job]:
    return [*first_jobs(plan), *timed_jobs(plan), *correctness_jobs(plan)]


def _trial() -> list[Job]:
    return [AttentionCase(3, 2, 17, 2, 32, (OURS,))]


if __name__ == "__main__":
    sys.exit(main())
