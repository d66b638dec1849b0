"""A model's logits for a batch of many tasks: one call of a `PromptBank`, or one call per image."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.compare.cases import INFERENCE, Case
from bench.compare.correctness import Check, Results, budget, largest_error
from bench.compare.device_timer import Run
from bench.providers.bank_attention import ONE_BY_ONE
from bench.providers.models import OURS, PUBLISHED, provide, set_values, values
from vpt_fast import PromptBank, prompt_tune, save_adapter

_ADAPTERS = 2
"""Adapters with different values, assigned to the tasks in rotation; each task has its own rows."""

_CHECKED = 8
"""Images, the first of the batch, whose logits are compared with fp64."""


@dataclass(frozen=True)
class BankModelCase:
    """One comparison, in inference: `batch` images, each of another task."""

    model: str = "vit_base_patch16_224"
    batch: int = 64
    prompts: int = 50
    image_size: int = 224
    method: str = "vpt-deep"
    providers: tuple[str, ...] = (ONE_BY_ONE, OURS)

    def __str__(self) -> str:
        return f"bank-{self.model}-{self.method}-p{self.prompts}-b{self.batch}"


def prepare(
    case: BankModelCase, name: str, dtype: torch.dtype, device: torch.device | str
) -> tuple[Check, Run]:
    """Return a provider's check and the function to time."""
    kind = str(dtype).removeprefix("torch.")
    step = Case(
        INFERENCE, case.model, case.method, case.batch, case.prompts, dtype=kind,
        image_size=case.image_size,
    )  # fmt: skip
    tasks = [f"task {i}" for i in range(case.batch)]
    images = step.inputs()[0].to(device, dtype)
    adapters, bank = _bank(step, tasks, dtype, device)

    def run() -> Results:
        if name == ONE_BY_ONE:
            found = [bank(images[i : i + 1], [task])[0] for i, task in enumerate(tasks)]
        else:
            found = bank(images, tasks)
        return {"logits": torch.stack(found)}

    wanted = _logits(step, PUBLISHED, torch.float64, adapters, images)
    eager = _logits(step, "concat", dtype, adapters, images)
    limit = budget(largest_error({"logits": eager}, {"logits": wanted})[0], kind)
    have = run()["logits"][:_CHECKED].double().cpu()
    error, worst = largest_error({"logits": have}, {"logits": wanted})
    return Check(name, error, worst, limit), run


def _bank(
    step: Case, tasks: Sequence[str], dtype: torch.dtype, device: torch.device | str
) -> tuple[list[dict[str, Tensor]], PromptBank]:
    """Return the values of each adapter, and a bank whose tasks have them."""
    tuned = prompt_tune(step.build().to(dtype), step.settings())
    bank = PromptBank(step.build().to(dtype).to(device))
    generator = torch.Generator().manual_seed(3)
    adapters = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(_ADAPTERS):
            drawn = {
                name: 0.1 * torch.randn(value.shape, generator=generator).to(dtype)
                for name, value in values(tuned).items()
            }
            set_values(tuned, drawn)
            save_adapter(tuned, Path(folder) / str(number))
            adapters.append(drawn)
        for number, task in enumerate(tasks):
            bank.add(task, Path(folder) / str(number % _ADAPTERS))
    return adapters, bank


def _logits(
    step: Case, name: str, dtype: torch.dtype, adapters: Sequence[dict[str, Tensor]], images: Tensor
) -> Tensor:
    """Return the logits (fp64) of the first images, computed by another provider.

    Image i has adapter i modulo the number of adapters.
    """
    module: Any = provide(name, step.build().to(images.dtype), step.settings())
    module = module.to(images.device, dtype).eval()
    images = images[:_CHECKED].to(dtype)
    found = []
    with torch.no_grad():
        for adapter in adapters:
            set_values(module, adapter)
            found.append(module(images).double().cpu())
    return torch.stack([found[i % len(found)][i] for i in range(len(images))])
