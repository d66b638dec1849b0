"""All providers of a case, checked and then timed in turns."""

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
class Turn:
    """A provider's check and, where it holds, the times of its rounds."""

    check: Check
    times: Times | None


def step(module: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A training step without the optimizer's: logits, loss, and what is trained gets gradients."""
    trained = [p for p in module.parameters() if p.requires_grad]

    def run() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = F.cross_entropy(module(images), labels)
        loss.backward()
        return loss.detach()

    return run


def inference(module: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Logits without anything kept for backward."""

    def run() -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run


def work(case: Case, module: nn.Module, device: torch.device | str = "cpu") -> Callable[[], Tensor]:
    """What is timed of a case's provider."""
    dtype = next(module.parameters()).dtype
    images, labels = case.inputs()
    images, labels = images.to(device, dtype), labels.to(device)
    return inference(module, images) if case.work == INFERENCE else step(module, images, labels)


def take_turns(case: Case, rounds: int) -> dict[str, Turn]:
    """Check every provider of a case against fp64, then time those that hold, in turns.

    Args:
        case: what is compared.
        rounds: of every provider; they run in a new order each round.
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
    return timed(checks, functions, rounds)


def timed(
    checks: Mapping[str, Check], functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Turn]:
    """Time in turns those functions whose check holds."""
    held = {name: functions[name] for name, check in checks.items() if check.holds}
    times = interleave(held, rounds)
    return {name: Turn(check, times.get(name)) for name, check in checks.items()}
