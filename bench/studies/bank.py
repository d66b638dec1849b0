"""One batch over many tasks: a bank compared with one task alone, and with switching adapters.

    python -m bench.studies.bank [--model M] [--method vpt-deep|vapt] [--prompts P] [--tasks T]
        [--images B] [--rounds R]

Measured on this machine, in interleaved rounds, in inference:

    one task    a tuned model on B images of its only task
    bank        a `PromptBank` on B images, spread over T tasks
    switching   the tuned model, into which one task's tensors after another are copied, each time
                for that task's images alone

Every logit of the bank is first compared with the tuned model's. Then the launches and bytes of the
same work on a GPU, in bf16, are counted by `bench.counted.trace`; nothing is run there.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.compare.interleave import interleave
from bench.counted.trace import traced
from vpt_fast import VAPT, PromptBank, VPTDeep, prompt_tune, save_adapter, trainable_parameters
from vpt_fast.adapter.files import TENSORS_FILE

CLASSES = 100
TOLERANCE = 1e-4
"""Largest error of a bank's fp32 logits, relative to the largest logit of the task alone."""


@dataclass(frozen=True)
class BankCase:
    """One comparison.

    Attributes:
        model: Name of a vision transformer in timm.
        method: "vpt-deep" or "vapt".
        prompts: Prompts per block.
        tasks: Number of tasks.
        images: Images in the batch, a multiple of `tasks`.
        dtype: Dtype of the model.
    """

    model: str = "vit_small_patch16_224"
    method: str = "vpt-deep"
    prompts: int = 50
    tasks: int = 64
    images: int = 64
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.method not in ("vpt-deep", "vapt"):
            raise ValueError(f"method is {self.method!r}; choose vpt-deep or vapt")
        if self.tasks < 1 or self.images % self.tasks:
            raise ValueError(f"images={self.images} must be a multiple of tasks={self.tasks}")

    @property
    def settings(self) -> VPTDeep | VAPT:
        """Method that all tasks use."""
        return VAPT(self.prompts) if self.method == "vapt" else VPTDeep(self.prompts)


class BankComparison:
    """The implementations on one batch, with seeded weights, whose values do not affect speed.

    Args:
        case: Case to compare.
        folder: Directory to write the adapters to.
    """

    def __init__(self, case: BankCase, folder: Path) -> None:
        torch.manual_seed(0)
        plain: Any = timm.create_model(case.model, num_classes=CLASSES)
        tuned: Any = prompt_tune(copy.deepcopy(plain), case.settings)
        adapters = [folder / f"task {i}" for i in range(case.tasks)]
        for adapter in adapters:
            _redraw(tuned)
            save_adapter(tuned, adapter)
        self.case = case
        self.tuned = tuned.to(case.dtype).eval()
        self._own = dict(trainable_parameters(self.tuned))
        self._tensors = [
            {name: t.to(case.dtype) for name, t in load_file(adapter / TENSORS_FILE).items()}
            for adapter in adapters
        ]
        self.bank = PromptBank(plain.to(case.dtype))
        for adapter in adapters:
            self.bank.add(adapter.name, adapter)
        channels, height, width = self.bank.task("task 0").inputs["input_size"]
        self.images = torch.randn(case.images, channels, height, width, dtype=case.dtype)
        self.names = [f"task {i % case.tasks}" for i in range(case.images)]

    def by_bank(self) -> list[Tensor]:
        """Return the logits of every image, all tasks in one batch."""
        return self.bank(self.images, self.names)

    def one_task(self) -> Tensor:
        """Return the logits of all images under the tuned model's current task."""
        with torch.no_grad():
            logits: Tensor = self.tuned(self.images)
        return logits

    def switch(self, task: int) -> None:
        """Copy a task's tensors into the tuned model."""
        with torch.no_grad():
            for name, tensor in self._tensors[task].items():
                self._own[name].copy_(tensor)

    def after_switch(self, task: int) -> Tensor:
        """Return the logits of a task's images alone, after switching to the task."""
        self.switch(task)
        with torch.no_grad():
            logits: Tensor = self.tuned(self.images[task :: self.case.tasks])
        return logits

    def by_switching(self) -> list[Tensor]:
        """Return the logits of each task's images, one task after another."""
        return [self.after_switch(task) for task in range(self.case.tasks)]

    def error(self) -> float:
        """Return the largest error of the bank's logits.

        It is relative to the largest logit of the task alone."""
        apart = self.by_switching()
        tasks = self.case.tasks
        errors = [
            (ours - apart[i % tasks][i // tasks]).abs().max() / apart[i % tasks].abs().max()
            for i, ours in enumerate(self.by_bank())
        ]
        return float(max(errors))


def _redraw(model: nn.Module) -> None:
    """Draw new values for what is trained; experts that start at zero would have no effect."""
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.normal_(std=0.1)


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """Return the launches and bytes of some work on a GPU, counted without running it there."""
    with torch.no_grad(), traced() as ops:
        run()
    return sum(op.launches for op in ops), sum(op.nbytes for op in ops)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print times, ratios and counts; return 1 if the bank's logits are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.bank", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", default=BankCase.model)
    parser.add_argument("--method", default=BankCase.method, help="vpt-deep or vapt")
    parser.add_argument("--prompts", type=int, default=BankCase.prompts)
    parser.add_argument("--tasks", type=int, default=BankCase.tasks)
    parser.add_argument("--images", type=int, default=BankCase.images)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    try:
        case = BankCase(
            options.model, options.method, options.prompts, options.tasks, options.images
        )
    except ValueError as wrong:
        parser.error(str(wrong))
    print(f"{case.model}, {case.method}, {case.prompts} prompts, {case.images} images")
    with tempfile.TemporaryDirectory() as folder:
        comparison = BankComparison(case, Path(folder))
        error = comparison.error()
        print(f"{case.tasks} tasks, logits' largest error relative to the task alone: {error:.1e}")
        if not error <= TOLERANCE:
            print(f"more than {TOLERANCE:g}: nothing is timed")
            return 1
        functions = {
            "one task": comparison.one_task, "bank": comparison.by_bank,
            "switching": comparison.by_switching,
        }  # fmt: skip
        times = interleave(functions, options.rounds)
        for name, found in times.items():
            low, middle, high = 1e3 * np.percentile(found.seconds, (20, 50, 80))
            print(f"  {name:10} p20/p50/p80 {low:.0f} / {middle:.0f} / {high:.0f} ms, measured")
        for name in ("one task", "switching"):
            low, middle, high = times["bank"].ratio(times[name])
            print(f"  {name} over bank: {middle:.3f} ({low:.3f}-{high:.3f})")
        _print_counts(case, Path(folder))
    return 0


def _print_counts(case: BankCase, folder: Path) -> None:
    comparison = BankComparison(
        BankCase(case.model, case.method, case.prompts, case.tasks, case.images, torch.bfloat16),
        folder / "bf16",
    )
    launches, nbytes = counted(comparison.by_bank)
    print(f"on a GPU, bf16, counted: bank {launches} launches, {nbytes / 2**20:,.0f} MiB moved")
    launches, nbytes = (case.tasks * n for n in counted(lambda: comparison.after_switch(0)))
    print(f"  switching {launches} launches, {nbytes / 2**20:,.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
