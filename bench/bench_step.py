"""A training step on this machine: ours against eager PyTorch, interleaved in one run.

    python -m bench.bench_step [--output DIR]

Providers: `concat`, prompts concatenated into timm's fused-SDPA blocks; `vpt_fast`; `none`, the
model without prompts, with the gradient flowing through all of its blocks. Before anything is
timed, the two prompted providers have to give the same loss and gradients.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.eager import ConcatenatedPrompts, without_prompts
from bench.interleave import interleave
from vpt_fast import VPTDeep, prompt_tune

FIELDS = (
    "model", "batch", "prompts", "dropout", "against",
    "ratio_p20", "ratio_p50", "ratio_p80", "milliseconds", "against_milliseconds",
    "device", "threads", "torch", "timm",
)  # fmt: skip


def build(name: str, image_size: int, classes: int) -> Any:
    """A timm model with seeded random weights; speed does not depend on what they are."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes, img_size=image_size)


def ours(model: Any, reference: ConcatenatedPrompts) -> nn.Module:
    """`model` tuned, with the prompts of `reference`."""
    tuned = prompt_tune(model, VPTDeep(reference.prompts.shape[1], dropout=reference.dropout))
    with torch.no_grad():
        for block, prompts in zip(tuned.blocks, reference.prompts, strict=True):
            block.prompt.tokens.copy_(prompts)
    return tuned.train()


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """One training step without the optimizer's: loss, and the gradients of what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss.detach()

    return run


def check(reference: ConcatenatedPrompts, tuned: Any, images: Tensor, labels: Tensor) -> None:
    """Raise RuntimeError unless both give the same loss and prompt gradients, to fp32 rounding."""
    theirs, mine = (float(step(model, images, labels)()) for model in (reference, tuned))
    want: Any = reference.prompts.grad
    have = torch.stack([block.prompt.tokens.grad for block in tuned.blocks])
    error = float((have - want).abs().max() / want.abs().max())
    if not math.isclose(theirs, mine, rel_tol=1e-5) or not error < 1e-4:
        raise RuntimeError(f"losses {theirs} and {mine}, gradients {error:.1e} apart")


def measure(args: argparse.Namespace, prompts: int, dropout: float) -> list[dict[str, Any]]:
    """Rows of the table for one number of prompts and one dropout."""
    images = torch.randn(args.batch, 3, args.image_size, args.image_size)
    labels = torch.randint(args.classes, (args.batch,))

    def make() -> Any:
        return build(args.model, args.image_size, args.classes)

    concat = ConcatenatedPrompts(make(), prompts)
    tuned = ours(make(), concat)
    check(concat, tuned, images, labels)
    if dropout:
        concat = ConcatenatedPrompts(make(), prompts, dropout)
        tuned = ours(make(), concat)
    models = {"concat": concat, "vpt_fast": tuned, "none": without_prompts(make())}
    steps = {name: step(model, images, labels) for name, model in models.items()}
    times = interleave(steps, args.rounds)
    rows = []
    for against in ("concat", "none"):
        p20, p50, p80 = times["vpt_fast"].ratio(times[against])
        rows.append(
            {
                "model": args.model, "batch": args.batch, "prompts": prompts, "dropout": dropout,
                "against": against,
                "ratio_p20": round(p20, 3), "ratio_p50": round(p50, 3), "ratio_p80": round(p80, 3),
                "milliseconds": round(times["vpt_fast"].median * 1e3, 1),
                "against_milliseconds": round(times[against].median * 1e3, 1),
                "device": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__, "timm": timm.__version__,
            }
        )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write it as CSV if asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_step", description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 50, 100, 200])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="directory for bench_step.csv")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print("Measured training step, time of the other divided by ours (p20 p50 p80 over rounds)")
    for dropout in args.dropout:
        for prompts in args.prompts:
            for row in measure(args, prompts, dropout):
                rows.append(row)
                print(
                    f"{row['model']} batch {row['batch']} prompts {prompts:3d} dropout {dropout} "
                    f"against {row['against']:6s}: {row['ratio_p20']:.2f} {row['ratio_p50']:.2f} "
                    f"{row['ratio_p80']:.2f}   ({row['milliseconds']:.0f} ms, "
                    f"{row['against_milliseconds']:.0f} ms)",
                    flush=True,
                )
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / "bench_step.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
