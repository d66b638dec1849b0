"""Studies on the demo's task: accuracy over seeds, and the choice of learning rates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vpt_fast import count_parameters
from vpt_fast.train.common.curves import format_table
from vpt_fast.train.common.paper_settings import LEARNING_RATES as PAPER_RATES
from vpt_fast.train.common.paper_settings import WEIGHT_DECAYS
from vpt_fast.train.demo.task import (
    SETTINGS,
    STUDY_SETTINGS,
    Digits,
    Setting,
    load_splits,
    recipe_of,
    test_loader,
    train_once,
)
from vpt_fast.train.loop.evaluate import TrainingError, evaluate, resolve_device

DEMO_EPOCHS = 20
"""Number of epochs of the demo."""

# The papers' grid.
LEARNING_RATES = PAPER_RATES["sgd"]


def run_seeds(names: Sequence[str], epochs: int, seeds: Sequence[int], device: str) -> None:
    """Train on 1,000 images with every seed, and print the last epoch's test accuracies.

    At the demo's number of epochs the demo's learning rates are used, at others those for 100.
    """
    where, digits = resolve_device(device), load_splits()
    settings = SETTINGS if epochs == DEMO_EPOCHS else STUDY_SETTINGS
    rows = []
    for name in names:
        setting, accuracies, seconds, trained = settings[name], [], 0.0, 0
        for seed in seeds:
            recipe, start = recipe_of(setting, epochs, seed), time.perf_counter()
            model, _ = train_once(setting, recipe, digits, where, select=False)
            seconds += (time.perf_counter() - start) / len(seeds)
            trained, _ = count_parameters(model)
            top1 = evaluate(model, test_loader(digits.test), progress=False).top1
            accuracies.append(top1)
            print(f"{setting.title}, seed {seed}: {top1:.2f}%", flush=True)
        deviation = np.std(accuracies, ddof=1) if len(seeds) > 1 else float("nan")
        each = ", ".join(f"{top1:.2f}" for top1 in accuracies)
        mean = f"{np.mean(accuracies):.2f}"
        cells = [f"{trained:,}", mean, f"{deviation:.2f}", each, f"{seconds:.0f}"]
        rows.append([setting.title, *cells])
    print(f"\n{epochs} epochs on 1,000 images, test accuracy in percent over seeds", *seeds)
    header = ["method", "parameters", "mean", "standard deviation", "each", "seconds a run"]
    print(format_table(header, rows))


def run_selection(
    names: Sequence[str],
    epochs: int,
    seed: int,
    device: str,
    lrs: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
) -> None:
    """Train with every pair, and print the best by the last epoch's validation metrics."""
    where, digits = resolve_device(device), load_splits()
    for name in names:
        tried = [
            replace(SETTINGS[name], lr=lr, weight_decay=weight_decay)
            for lr in lrs
            for weight_decay in weight_decays
        ]
        scores = [_score(setting, epochs, seed, digits, where) for setting in tried]
        best = tried[scores.index(max(scores))]
        print(f"{best.title}: lr {best.lr:g}, weight decay {best.weight_decay:g}\n", flush=True)


def _score(
    setting: Setting, epochs: int, seed: int, digits: Digits, device: torch.device
) -> tuple[float, float]:
    what = f"{setting.title}, lr {setting.lr:g}, weight decay {setting.weight_decay:g}"
    try:
        recipe = recipe_of(setting, epochs, seed)
        _, result = train_once(setting, recipe, digits, device, select=True)
    except TrainingError as error:
        print(f"{what}: {error}", flush=True)
        return -1.0, 0.0
    last = result.epochs[-1]
    accuracy, loss = last.val_top1 or 0.0, last.val_loss or 0.0
    print(f"{what}: {accuracy:.1f}% on validation, loss {loss:.3f}", flush=True)
    return accuracy, -loss
