"""A training step on this machine: ours against eager PyTorch, interleaved in one run.

    python -m bench.bench_step [--output DIR]

Providers: `concat`, prompts (of VPT-Deep, or VAPT's experts as their equations are written)
concatenated into timm's fused-SDPA blocks; `vpt_fast`; `modules`, the same with blocks that run
module by module; `none`, the model without prompts, with the gradient flowing through all of its
blocks. Before anything is timed, the two prompted providers have to give the same loss and
gradients.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import platform
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.interleave import interleave
from vpt_fast import VAPT, VPTDeep, prompt_tune
from vpt_fast.eager import ConcatenatedExperts, ConcatenatedPrompts, without_prompts

METHODS = ("vpt-deep", "vapt")
DROPOUTS = {"vpt-deep": (0.0, 0.1), "vapt": (0.0,)}
FIELDS = (
    "model", "method", "batch", "prompts", "dropout", "against",
    "ratio_p20", "ratio_p50", "ratio_p80", "milliseconds", "against_milliseconds",
    "device", "threads", "torch", "timm",
)  # fmt: skip


Gradients = list[tuple[Tensor, Tensor]]
Pair = tuple[nn.Module, Any, Callable[[], Gradients]]
"""Eager PyTorch's model, ours, and pairs of gradients (ours, theirs) after a step of both."""


def build(name: str, image_size: int, classes: int) -> Any:
    """A timm model with seeded random weights; speed does not depend on what they are."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes, img_size=image_size)


def providers(method: str, make: Callable[[], Any], prompts: int, dropout: float) -> Pair:
    """Eager PyTorch's model and ours, with the same weights, in training mode.

    Args:
        method: one of `METHODS`.
        make: builds the timm model, the same one every time.
        prompts: number of prompts.
        dropout: prompt dropout of VPT-Deep; channel and projector dropout of VAPT.
    """
    if method == "vapt":
        return _experts(make, prompts, dropout)
    deep = VPTDeep(prompts, dropout=dropout)
    reference = ConcatenatedPrompts(make(), deep)
    tuned = prompt_tune(make(), deep)
    with torch.no_grad():
        for block, rows in zip(tuned.blocks, reference.prompts, strict=True):
            block.prompt.tokens.copy_(rows)

    def gradients() -> Gradients:
        ours = torch.stack([block.prompt.tokens.grad for block in tuned.blocks])
        return [(ours, _gradient(reference.prompts))]

    return reference, tuned.train(), gradients


def _experts(make: Callable[[], Any], prompts: int, dropout: float) -> Pair:
    method = VAPT(prompts, projector_dropout=dropout, channel_dropout=dropout)
    reference: Any = ConcatenatedExperts(make(), method)
    tuned = prompt_tune(make(), method)
    first, *rest = (block.prompt for block in tuned.blocks)
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = [
        (first.tokens, reference.tokens),
        (tuned.prompt_projector.down.weight, reference.down.weight),
        (tuned.prompt_projector.up.weight, reference.up.weight),
    ]
    for prompt, norm, conv, mix in zip(
        rest, reference.norms, reference.convs, reference.mixes, strict=True
    ):
        for module, eager in ((prompt.norm, norm), (prompt.conv, conv), (prompt.mix, mix)):
            pairs += zip(module.parameters(), eager.parameters(), strict=True)
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)

    def gradients() -> Gradients:
        return [(_gradient(mine), _gradient(theirs)) for mine, theirs in pairs]

    return reference, tuned.train(), gradients


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"no gradient of a parameter of shape {tuple(parameter.shape)}")
    return parameter.grad


def by_modules(model: Any) -> Any:
    """A copy of a tuned model with hooks inside its blocks, which make them run by modules."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: None)
    return model


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


def check(pair: Pair, images: Tensor, labels: Tensor) -> None:
    """Raise RuntimeError unless both give the same loss and prompt gradients, to fp32 rounding."""
    reference, tuned, gradients = pair
    theirs, mine = (float(step(model, images, labels)()) for model in (reference, tuned))
    error = max(float((have - want).norm() / want.norm()) for have, want in gradients())
    if not math.isclose(theirs, mine, rel_tol=1e-5) or not error < 1e-4:
        raise RuntimeError(f"losses {theirs} and {mine}, gradients {error:.1e} apart")


def measure(
    args: argparse.Namespace, method: str, prompts: int, dropout: float
) -> list[dict[str, Any]]:
    """Rows of the table for one method, number of prompts and dropout."""
    images = torch.randn(args.batch, 3, args.image_size, args.image_size)
    labels = torch.randint(args.classes, (args.batch,))

    def make() -> Any:
        return build(args.model, args.image_size, args.classes)

    check(providers(method, make, prompts, 0.0), images, labels)
    concat, tuned, _ = providers(method, make, prompts, dropout)
    models = {
        "vpt_fast": tuned,
        "concat": concat,
        "modules": by_modules(tuned),
        "none": without_prompts(make()),
    }
    steps = {name: step(model, images, labels) for name, model in models.items()}
    times = interleave(steps, args.rounds)
    rows = []
    for against in (name for name in models if name != "vpt_fast"):
        p20, p50, p80 = times["vpt_fast"].ratio(times[against])
        rows.append(
            {
                "model": args.model, "method": method, "batch": args.batch, "prompts": prompts,
                "dropout": dropout, "against": against,
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
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 50, 100, 200])
    parser.add_argument(
        "--dropout", type=float, nargs="+", help="by default 0, for VPT-Deep 0.1 too"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="directory for bench_step.csv")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print("Measured training step, time of the other divided by ours (p20 p50 p80 over rounds)")
    cases = [
        (method, dropout, prompts)
        for method in args.methods
        for dropout, prompts in product(args.dropout or DROPOUTS[method], args.prompts)
    ]
    for method, dropout, prompts in cases:
        for row in measure(args, method, prompts, dropout):
            rows.append(row)
            print(
                f"{row['model']} {method:8s} batch {row['batch']} prompts {prompts:3d} "
                f"dropout {dropout} against {row['against']:7s}: {row['ratio_p20']:.2f} "
                f"{row['ratio_p50']:.2f} {row['ratio_p80']:.2f}   ({row['milliseconds']:.0f} ms, "
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
