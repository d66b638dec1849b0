"""Compiles, by all cores at once, the kernels that a run of the benchmark will launch.

    python -m bench.gpu.warm [--jobs N] [--capability 90] [--quick | --trial | --tiles]

They go to Triton's own cache (TRITON_CACHE_DIR), where every later process finds them. No GPU is
needed: models run on tensors without values, and launches are noted instead of made. A cache that
was made elsewhere with the same Python, Triton and source is found too: copy the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import timm
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from vpt_fast.kernels.launch import Launch, Target

from bench import attention_ways, bank_ways, expert_ways
from bench.attention_ways import AttentionCase
from bench.bank_ways import BankAttentionCase
from bench.candidates import SHAPES, candidates, current, launch_of
from bench.cases import DTYPES, INFERENCE, Case
from bench.expert_ways import ExpertCase
from bench.gpu.cases import Plan, correctness_subjects, first_subjects, timed_subjects
from bench.gpu.checks import launches_alone
from bench.gpu.keys import stable_keys
from bench.gpu.models import ModelCheck
from bench.gpu.steps import StepCheck
from bench.gpu.subjects import KernelCheck, Subject
from bench.offline import compiled
from bench.providers import OURS, provide
from bench.step_trace import without_values
from bench.times import STAGES
from bench.trace import Trace, traced
from bench.turns import inference, step

Found = dict[tuple[Any, ...], Launch]


@contextlib.contextmanager
def noted(capability: int) -> Iterator[Found]:
    """Note the launches inside, each kind once, as a GPU of this capability would make them."""
    found: Found = {}

    def note(trace: Trace, launch: Launch) -> None:
        key = (
            launch.kernel.__name__, tuple(launch.signature().items()),
            tuple(sorted((k, str(v)) for k, v in launch.compile_constexprs().items())),
            tuple(sorted(launch.divisible_by_16())), launch.num_warps, launch.num_stages,
        )  # fmt: skip
        found.setdefault(key, launch)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Trace, "record_launch", note))
        for name, module in list(sys.modules.items()):
            if name.startswith("vpt_fast.") and "target_of" in vars(module):
                target = mock.patch.object(module, "target_of", lambda _: Target(capability))
                stack.enter_context(target)
        stack.enter_context(traced())
        yield found


def _run(subject: Subject) -> None:
    """Run ours of a subject on tensors without values; those of whom nothing is ours do nothing."""
    if isinstance(subject, ModelCheck):
        return _run_model(replace(subject.case, batch=2))
    if isinstance(subject, StepCheck):
        return _run_model(subject.case)
    if isinstance(subject, Case):
        return _run_model(subject) if OURS in subject.providers else None
    dtype = torch.bfloat16
    if isinstance(subject, KernelCheck):
        launches_alone(subject.case, DTYPES[subject.dtype or "bfloat16"])
    elif isinstance(subject, AttentionCase):
        attention_ways.functions(replace(subject, providers=(OURS,)), dtype)[OURS]()
    elif isinstance(subject, ExpertCase):
        expert_ways.functions(replace(subject, providers=(OURS,)), dtype)[OURS]()
    elif isinstance(subject, BankAttentionCase):
        bank_ways.functions(replace(subject, providers=(OURS,)), dtype)[OURS]()
    return None


def _run_model(case: Case) -> None:
    dtype, size = DTYPES[case.dtype], case.image_size
    with torch.device("meta"):
        plain = timm.create_model(case.model, num_classes=case.classes, img_size=size).eval()
    mode = FakeTensorMode()
    plain = without_values(plain, dtype, mode)
    with mode:
        module = provide(OURS, plain, case.settings(), case.memory)
        images = torch.empty(case.batch, 3, size, size, dtype=dtype)
        if case.work == INFERENCE:
            inference(module.eval(), images)()
        else:
            step(module, images, torch.empty(case.batch, dtype=torch.int64))()


def launches(subjects: Sequence[Subject], capability: int) -> tuple[list[Launch], list[str]]:
    """Launches of subjects, each kind once; and what could not be run here, in words."""
    complaints = []
    with noted(capability) as found:
        for subject in subjects:
            try:
                if isinstance(subject, Case | ModelCheck | StepCheck):
                    _run(subject)
                else:
                    with FakeTensorMode():
                        _run(subject)
            # What is not found beforehand is compiled when it is launched.
            except Exception as error:
                complaints.append(f"{subject}: {type(error).__name__}: {error}"[:200])
    return list(found.values()), complaints


def tile_launches(capability: int) -> list[Launch]:
    """Launches of attention's candidate tiles at 64 channels in bf16."""
    from vpt_fast.kernels.launch_tiles import KERNELS

    found = []
    for kernel in KERNELS:
        key = (kernel, 64, "bf16", capability)
        for choice in dict.fromkeys((current(key), *candidates(key, STAGES))):
            found += [launch_of(key, shape, choice)[1] for shape in SHAPES]
    return found


_LAUNCHES: list[Launch] = []


def _build(index: int, capability: int) -> tuple[str, float, str]:
    """Compile one launch: its name, seconds, and what went wrong."""
    launch, start, error = _LAUNCHES[index], time.perf_counter(), ""
    try:
        kernel = compiled(launch, capability)
        _build_launcher(kernel)
    # Candidates that want too much of the device are among them.
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"[:160]
    return launch.name, time.perf_counter() - start, error


def _build_launcher(kernel: Any) -> None:
    """Build the C function that launches a kernel, where Triton (up to 3.6) has one for each."""
    with contextlib.suppress(Exception):  # without CUDA's library it cannot be linked here
        from triton.backends.nvidia import driver

        if hasattr(driver, "make_launcher") and driver.library_dirs():
            driver.CudaUtils()
            driver.CudaLauncher(kernel.src, kernel.metadata)


def compile_all(found: Sequence[Launch], capability: int, jobs: int) -> list[tuple[str, str]]:
    """Compile launches in processes; names and complaints of those that do not compile."""
    _LAUNCHES[:] = found
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        tasks = [(index, capability) for index in range(len(found))]
        done = pool.starmap(_build, tasks, chunksize=1)
    return [(name, error) for name, _, error in done if error]


def _capability() -> int:
    """The GPU's own, asked without taking hold of it; 90 where there is none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return int(done.stdout.split()[0].replace(".", ""))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 90


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, and say what did not."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.warm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--capability", type=int, help="of the GPU; its own by default, or 90")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--quick", action="store_true", help="the kernels of --cases quick")
    kinds.add_argument("--trial", action="store_true", help="those of one tiny step")
    kinds.add_argument("--tiles", action="store_true", help="candidate tiles of `bench.tune`")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    capability = options.capability or _capability()
    stable_keys()
    complaints: list[str] = []
    if options.tiles:
        found = tile_launches(capability)
    else:
        subjects = _trial() if options.trial else _subjects(Plan(full=not options.quick))
        found, complaints = launches(subjects, capability)
    gathered = time.perf_counter() - start
    print(f"{len(found)} kernels, {gathered:.0f} s to find them", flush=True)
    failed = compile_all(found, capability, options.jobs)
    for line in [*complaints, *(f"{name}: {error}" for name, error in failed)]:
        print(line)
    print(
        f"{len(found) - len(failed)} kernels compiled for sm_{capability}, Triton "
        f"{triton.__version__}, {time.perf_counter() - start:.0f} s in all"
    )
    return 0


def _subjects(plan: Plan) -> list[Subject]:
    return [*first_subjects(plan), *timed_subjects(plan), *correctness_subjects(plan)]


def _trial() -> list[Subject]:
    return [AttentionCase(3, 2, 17, 2, 32, (OURS,))]


if __name__ == "__main__":
    sys.exit(main())
