"""All providers of a case, checked and then timed in interleaved rounds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.compare.cases import INFERENCE, Case
from bench.compare.correctness import Check, Truth
from bench.compare.interleave import Times, interleave


@dataclass(frozen=True)
class ProviderResult:
    """A provider's check and, where it holds, the times of its rounds."""

    check: Check
    times: Times | None


def step(module: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return a training step without the optimizer: logits, loss and trained gradients."""
    trained = [p for p in module.parameters() if p.requires_grad]

    def run() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = F.cross_entropy(module(images), labels)
        loss.backward()
        return loss.detach()

    return run


def inference(module: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return a function that computes logits and saves nothing for backward."""

    def run() -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run


def work(case: Case, module: nn.Module, device: torch.device | str = "cpu") -> Callable[[], Tensor]:
    """Return the function that is timed for a provider's module."""
    dtype = next(module.parameters()).dtype
    images, labels = case.inputs()
    images, labels = images.to(device, dtype), labels.to(device)
    return inference(module, images) if case.work == INFERENCE else step(module, images, labels)


def check_and_time(case: Case, rounds: int) -> dict[str, ProviderResult]:
    """Check every provider of a case against fp64, then time those that hold.

    Args:
        case: Case to compare.
        rounds: Interleaved rounds; every provider runs once in each, in a new order.
    """
    truth = Truth(case)
    checks, functions = {}, {}
    for name in case.providers:
        module = truth.module(name, 0.0)
        checks[name] = truth.check(name, module)
        if case.dropout:
            module = truth.module(name, case.dropout)
        functions[name] = work(case, module)
    del truth
    gc.collect()
    return time_interleaved(checks, functions, rounds)


def time_interleaved(
    checks: Mapping[str, Check], functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, ProviderResult]:
    """Time, in interleaved rounds, the functions whose check holds."""
    passing = {name: functions[name] for name, check in checks.items() if check.holds}
    times = interleave(passing, rounds)
    return {name: ProviderResult(check, times.get(name)) for name, check in checks.items()}
