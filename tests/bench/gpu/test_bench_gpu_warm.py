"""Kernels are compiled ahead into the cache where launches find them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from support.processes import exit_codes, started
from triton import knobs
from triton.backends.compiler import GPUTarget

from bench.compare.cases import Case
from bench.gpu.jobs.checks import HeadsCase
from bench.gpu.jobs.job import KernelCheck
from bench.gpu.jobs.keys import stable_keys
from bench.gpu.jobs.models import ModelCheck
from bench.gpu.jobs.row_checks import ActivationCase, GatedCase, NormCase, RotationCase
from bench.gpu.jobs.warm import kernels_of, recorded_launches, tile_launches
from bench.providers import attention as attention_providers
from bench.providers.attention import AttentionCase
from bench.providers.models import OURS

ROOT = Path(__file__).parents[3]
STEP = Case(model="test_vit", batch=4, prompts=3, image_size=32, dtype="bfloat16")


class Driver:
    """Driver of an H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launch_again(cache: Path) -> None:
    """Launch the kernels of a case, in reversed order; all are in the cache."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    triton.runtime.driver.set_active(Driver())
    hits = []
    knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    stable_keys()
    with recorded_launches(90) as found:
        case = AttentionCase(3, 2, 17, 2, 32, (OURS,))
        attention_providers.functions(case, torch.bfloat16)[OURS]()
    for launch in reversed(found):
        launch.kernel.warmup(
            **launch.arguments, **launch.constexprs, grid=launch.grid,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    assert hits == [True] * 4


def test_launches_find_the_compiled_kernels(tmp_path: Path) -> None:
    """In another process, in another order, with tensors that have values."""
    command = ["-m", "bench.gpu.jobs.warm", "--trial", "--jobs", "2", "--capability", "90"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, capture_output=True, text=True,
        env={
            **os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 kernels compiled for sm_90" in done.stdout
    assert exit_codes([started(launch_again, tmp_path)]) == [0]


@pytest.mark.parametrize(
    ("job", "names"),
    [
        (STEP, {"forward", "dq", "token_dkdv", "shared_prompt_dkdv", "residual_norm"}),
        (replace(STEP, work="inference"), {"forward", "residual_norm", "activation"}),
        (ModelCheck(replace(STEP, method="vapt", dtype="float32")), {"mix", "features"}),
        (AttentionCase(3, 2, 17, 2, 32), {"forward", "dq"}),
        (KernelCheck(HeadsCase(33), "float16"), {"grouped_heads"}),
        (KernelCheck(NormCase(72)), {"residual_norm", "residual_norm_backward"}),
        (KernelCheck(ActivationCase("silu")), {"activation", "activation_backward"}),
        (KernelCheck(GatedCase()), {"gated", "gated_backward"}),
        (KernelCheck(RotationCase()), {"rotation"}),
        (replace(STEP, providers=("concat",)), set()),
    ],
    # Sets are unordered, and all processes of pytest-xdist need the same names.
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_kernels_of_a_job(job: object, names: set[str]) -> None:
    found = kernels_of(job, 90)  # type: ignore[arg-type]
    assert not isinstance(found, str), found
    assert names <= {kernel.launch for kernel in found} and bool(found) == bool(names)


def test_a_job_that_cannot_be_traced_is_reported() -> None:
    found = kernels_of(replace(STEP, image_size=33), 90)
    assert isinstance(found, str) and found.startswith(f"{STEP}: ")


def test_the_target_is_the_gpus_own() -> None:
    """Launches are those for the target GPU, not for the CPU that traces them."""
    warps = {}
    for capability in (80, 90):
        with recorded_launches(capability) as found:
            case = AttentionCase(3, 2, 300, 2, 64, (OURS,))
            attention_providers.functions(case, torch.float16)[OURS]()
        warps[capability] = [(x.name, x.constexprs, x.num_warps) for x in found]
    assert warps[80] != warps[90]
    assert {launch.kernel.__name__ for launch in tile_launches(90)} >= {"attention_forward_kernel"}
