"""Small launches of every operator and of a step, to run under compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m bench.gpu.jobs.sanitized
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from bench.compare.cases import DTYPES, SWIN, Case
from bench.compare.rounds import work
from bench.gpu.jobs.cases import TINY
from bench.gpu.jobs.checks import kernel_cases, run_operator
from bench.gpu.jobs.keys import stable_keys
from bench.providers.models import OURS, provide


def _step(case: Case, device: str) -> None:
    model = case.build().to(DTYPES[case.dtype]).to(device)
    work(case, provide(OURS, model, case.settings()), device)()


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch all operators and steps; return 1 if any failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.jobs.sanitized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args(arguments).device
    step = Case(model=TINY, batch=3, prompts=7, image_size=32, dtype="bfloat16")
    steps = [step, replace(step, method="vapt")]
    if device == "cuda":
        stable_keys()
        steps.append(replace(step, model=SWIN, image_size=224, batch=1))
    failed = 0
    for case in kernel_cases([TINY]):
        failed += _fails(case, partial(run_operator, case, torch.bfloat16, device), device)
    for whole in steps:
        failed += _fails(whole, partial(_step, whole, device), device)
    return min(failed, 1)


def _fails(name: object, launch: Callable[[], object], device: str) -> bool:
    """Launch and synchronize, print a failure; return whether it failed."""
    try:
        launch()
        if device == "cuda":
            torch.cuda.synchronize()
    # Any failure: the launches after it still run.
    except Exception:
        print(f"failed {name}\n{traceback.format_exc()}", flush=True)
        return True
    print(f"launched {name}", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
