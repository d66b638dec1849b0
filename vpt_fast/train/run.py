"""A whole run on a folder of images: everything is checked, then a model is tuned and tested."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader

from vpt_fast import count_parameters, prompt_tune, save_adapter
from vpt_fast.methods import Method
from vpt_fast.ops.memory_modes import check_memory_mode
from vpt_fast.train import backbone as backbones
from vpt_fast.train import data
from vpt_fast.train.evaluate import Evaluation, TrainingError, evaluate
from vpt_fast.train.loop import BEST, LAST, FitResult, fit
from vpt_fast.train.parallel import rank
from vpt_fast.train.recipe import Recipe, init_head


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images.

    Attributes:
        scale: Smallest and largest part of the area that a random crop keeps.
        hflip: Probability of a horizontal flip.
        no_aug: Only resize and crop the centre.

    Raises:
        ValueError: If a value is out of range.
    """

    scale: tuple[float, float] = (0.7, 1.0)
    hflip: float = 0.5
    no_aug: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            low, high = self.scale
            raise ValueError(f"scale is {low:g} {high:g}; it must be 0 < low <= high <= 1")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is {self.hflip:g}; it must be in [0, 1]")


@dataclass(frozen=True)
class RunResult:
    """Where the kept adapter is, how training went, and the accuracy on test/ if there is one."""

    adapter: Path
    fit: FitResult
    test: Evaluation | None


def folder_loader(
    dataset: data.ImageFolders,
    batch_size: int,
    device: torch.device,
    workers: int | None = None,
    *,
    shuffle: bool = False,
    seed: int = 0,
) -> DataLoader:
    """Returns a loader for images on disk; `workers` None takes 0 on the CPU, up to 4 on a GPU."""
    if workers is None:
        workers = 0 if device.type == "cpu" else min(4, os.cpu_count() or 1)
    return data.make_loader(
        dataset,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
        pin_memory=device.type == "cuda",
    )


def tune_on_folder(
    directory: Path,
    output: Path,
    model: str,
    method: Method,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    img_size: int | None = None,
    augmentation: Augmentation | None = None,
    memory: str = "speed",
    workers: int | None = None,
    device: torch.device | None = None,
    resume: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> RunResult:
    """Tunes a pretrained timm model on `directory/train/<class>/<image>`.

    With `directory/val` the epoch that is best on it is kept, without it the last one;
    `directory/test` is evaluated once, with the kept epoch, unless Ctrl-C ended training.

    Args:
        directory: Holds train/ and, where there are any, val/ and test/.
        output: A new folder for the adapters best/ and last/, metrics.csv, tensorboard/ and
            checkpoint.pt.
        model: Of timm, with or without a tag, or "vpt_fast_demo".
        method: What to tune.
        recipe: How to train.
        checkpoint: File with the backbone's weights.
        pretrained: Whether to download timm's weights instead.
        img_size: Side of the images in pixels; None takes the model's own.
        augmentation: Of the training images; None takes the defaults.
        memory: What blocks keep for backward, as vpt_fast.prompt_tune takes it.
        workers: Processes that load images; None takes 0 on the CPU and up to 4 on a GPU.
        device: Where to train; None takes the CPU.
        resume: Whether to go on in `output`, from the last epoch that ended there.
        progress: Whether to show bars on a terminal.
        log: Called with lines of text.

    Raises:
        FileExistsError: If `output` is there and not empty, and `resume` is off.
        FileNotFoundError: If images or the checkpoint are missing.
        ValueError, TypeError: If anything else cannot be used; nothing is written then.
        TrainingError: If training cannot go on. Adapters of finished epochs are kept.
    """
    device = device or torch.device("cpu")
    augmentation = augmentation or Augmentation()
    check_memory_mode(memory)
    if rank():
        log = _nothing
    elif not resume:
        _check_output(output)
    name, weights, model_args = backbones.resolve_name(model, checkpoint, img_size)
    folder = data.require_split(directory, "train")
    class_names = data.ImageFolders(folder, lambda image: torch.empty(0)).classes
    if ":" not in name:
        # A model on the hub or in a folder is only known once it is there.
        backbones.tunable_on_meta(name, len(class_names), method, model_args)
    random_seed(recipe.seed)
    net = backbones.create_backbone(
        name,
        len(class_names),
        pretrained=pretrained,
        checkpoint=weights,
        model_args=model_args,
    )
    init_head(net)
    prompt_tune(net, method, memory).to(device)
    loaders = _loaders(directory, net, class_names, recipe, augmentation, workers, device)
    _describe(net, f"{method.name} on {model}, {device}", recipe, loaders, log)
    save = partial(
        save_adapter,
        class_names=class_names,
        model_args=model_args,
        checkpoint=weights.name if weights else None,
        overwrite=True,
    )
    output.mkdir(parents=True, exist_ok=True)
    try:
        result = fit(
            net,
            loaders["train"],
            recipe,
            val_batches=loaders.get("val"),
            output=output,
            save=save,
            progress=progress,
            description=method.name,
            log=log,
            resume=resume,
        )
    except TrainingError:
        if not (output / LAST).is_dir() and not rank():
            # Nothing worth keeping: the same command with another learning rate should run.
            shutil.rmtree(output, ignore_errors=True)
        raise
    test = None
    if "test" in loaders and not result.interrupted:
        amp_dtype = recipe.autocast_dtype
        test = evaluate(net, loaders["test"], amp_dtype=amp_dtype, progress=progress)
    return RunResult(output / (BEST if (output / BEST).is_dir() else LAST), result, test)


def _nothing(line: str) -> None:
    """Process 0 talks for all."""


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"the output folder {output} exists; choose another with --output, remove it, or go on "
            "in it with --resume"
        )


def _loaders(
    directory: Path,
    net: nn.Module,
    class_names: list[str],
    recipe: Recipe,
    augmentation: Augmentation,
    workers: int | None,
    device: torch.device,
) -> dict[str, DataLoader]:
    config = backbones.data_config_of(net)
    channels = config["input_size"][0]
    loaders = {}
    for split in data.SPLITS:
        folder = data.find_split(directory, split)
        if folder is None:
            continue
        is_train = split == "train"
        transform = data.eval_transform(config)
        if is_train:
            transform = data.train_transform(
                config,
                scale=augmentation.scale,
                hflip=augmentation.hflip,
                no_aug=augmentation.no_aug,
            )
        images = data.ImageFolders(folder, transform, class_names, channels)
        loaders[split] = folder_loader(
            images, recipe.batch_size, device, workers, shuffle=is_train, seed=recipe.seed
        )
    return loaders


def _describe(
    net: nn.Module,
    title: str,
    recipe: Recipe,
    loaders: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    trained, total = count_parameters(net)
    counts = [f"{len(loader.dataset):,} {split}" for split, loader in loaders.items()]
    log(f"{title}: {trained:,} of {total:,} parameters are trained")
    log(f"images: {', '.join(counts)}; {len(loaders['train'].dataset.classes)} classes")
    log(
        f"{recipe.opt}, learning rate {recipe.base_lr:g} x {recipe.batch_size} / 256 = "
        f"{recipe.peak_lr:g}, weight decay {recipe.weight_decay:g}, {recipe.epochs} epochs "
        f"({recipe.warmup} of warm-up), {recipe.amp_dtype}, seed {recipe.seed}"
    )
    if "val" not in loaders:
        log("no val/ folder: the last epoch is kept, and nothing is selected")
