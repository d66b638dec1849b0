"""Lines that a run prints about itself before training begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vpt_fast import count_parameters
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.formats.class_folders import natural
from vpt_fast.train.data.memory_set import MemoryLoader
from vpt_fast.train.data.split import ImageSource, some

Log = Callable[[str], None]


def describe_run(
    net: nn.Module, title: str, recipe: Recipe, loaders: Mapping[str, Any], log: Log
) -> None:
    """Log the numbers of parameters and images, and the recipe.

    Args:
        net: Tuned model.
        title: Method, model and device, as the first line begins.
        recipe: Recipe of the run.
        loaders: Loaders by the name of their split; "train" is among them.
        log: Function that takes a line of text.
    """
    trained, total = count_parameters(net)
    counts = [f"{len(loader.dataset):,} {split}" for split, loader in loaders.items()]
    log(f"{title}: {trained:,} of {total:,} parameters are trained")
    log(f"images: {', '.join(counts)}; {len(loaders['train'].dataset.classes)} classes")
    log(
        f"{recipe.opt}, learning rate {recipe.base_lr:g} x {recipe.batch_size} / 256 = "
        f"{recipe.peak_lr:g}, weight decay {recipe.weight_decay:g}, {recipe.epochs} epochs "
        f"({recipe.warmup} of warm-up), {recipe.amp_dtype}, seed {recipe.seed}"
    )
    _describe_additions(recipe, len(loaders["train"]), log)


_LOSS = (
    "smoothing", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode", "bce_loss",
    "patience",
)  # fmt: skip


def _describe_additions(recipe: Recipe, steps: int, log: Log) -> None:
    """Log what a recipe adds to the papers'; `steps` are those of an epoch."""
    chosen = recipe.settings()
    words = [f"{name} {chosen[name]}" for name in _LOSS if name in chosen]
    if words:
        log(", ".join(words))
    if not recipe.model_ema:
        return
    warmup = " with warm-up" if recipe.model_ema_warmup else ""
    log(
        f"model_ema, decay {recipe.model_ema_decay:g}{warmup}: validation, test and adapters have "
        "the average of what is trained"
    )
    left = recipe.model_ema_decay ** (steps * recipe.epochs)
    if left > _STALE and not recipe.model_ema_warmup:
        log(
            f"warning: after {steps * recipe.epochs} steps {left:.0%} of the average is still what "
            "the first step left; take a smaller --model-ema-decay, or --model-ema-warmup"
        )


_STALE = 0.05
"""Share of the first values in the average at the end from which a warning is given."""


def describe_source(source: ImageSource, loaders: Mapping[str, Any], log: Log) -> None:
    """Log which splits are missing, which images are cached or left out, and warnings.

    Args:
        source: Data set of the run.
        loaders: Loaders by the name of their split.
        log: Function that takes a line of text.
    """
    if "val" not in source.splits:
        what = "val/ folder" if source.format == "folders" else "val split"
        log(
            f"no {what}: the last epoch is kept, and nothing is selected (--val-fraction 0.2 holds "
            "a fifth of the training images out)"
        )
    _describe_classes(source, log)
    for name, loader in loaders.items():
        if isinstance(loader, MemoryLoader):
            where = f"{loader.nbytes / 2**20:,.0f} MiB on {loader.device}"
            log(f"{name}: images decoded once and kept, {where}")
        refused = source.splits[name].refused
        if refused:
            log(f"{name}: {len(refused)} entries left out: {some([r.reason for r in refused])}")
    for line in source.warnings:
        log(f"warning: {line}")


def _describe_classes(source: ImageSource, log: Log) -> None:
    """Log the order of the classes where it could be another."""
    order, names = source.class_order, source.class_names
    if order == "natural":
        log("classes are sorted with numbers in their names by value")
    elif order == "strings" and names != natural(names):
        pair = next(p for p in zip(names, natural(names), strict=True) if len(set(p)) > 1)
        log(f"classes are sorted as strings, {pair[0]} before {pair[1]} (--class-order natural)")
    elif order not in ("strings", "numbers", "known"):
        where = f"the data's {order}" if order in ("columns", "features") else order
        log(f"classes are in the order of {where}")
