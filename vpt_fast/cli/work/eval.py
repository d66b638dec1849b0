"""Work of `vpt-fast eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from vpt_fast.cli.common import accuracy, report_skipped
from vpt_fast.train.common.recipe import Recipe, resolve_amp_dtype
from vpt_fast.train.data import images as data
from vpt_fast.train.data.image_loaders import folder_loader
from vpt_fast.train.data.pictures import reading
from vpt_fast.train.data.sources import check_format, open_source
from vpt_fast.train.data.split import ImageSource, SplitImages
from vpt_fast.train.loop.evaluate import evaluate, resolve_device
from vpt_fast.train.run.tuned_model import TunedModel, load_tuned

__all__ = [
    "Asked",
    "Recipe",
    "evaluate_images",
    "load",
    "resolve_amp_dtype",
    "resolve_device",
]


@dataclass(frozen=True)
class Asked:
    """Images to evaluate on, as the options name them.

    Attributes:
        directory: Folder of the data set.
        data_format: One of `names.FORMATS`.
        split: One of `names.SPLITS`; None takes test, else val.
        class_order: One of `names.CLASS_ORDERS`, or None.
        antialias: Whether resizing filters with antialiasing.
    """

    directory: Path
    data_format: str
    split: str | None
    class_order: str | None
    antialias: bool


def load(
    adapter: Path, checkpoint: Path | None, device: torch.device, asked: Asked
) -> tuple[TunedModel, Evaluated]:
    """Return the tuned model, and the images with labels in the order of its outputs."""
    directory, split, order = asked.directory, asked.split, asked.class_order
    format = check_format(directory, asked.data_format)
    name, folder = split or "", directory
    if format == "folders":
        name, folder = _eval_folder(directory, split)
    loaded = load_tuned(adapter, checkpoint, device)
    transform = data.eval_transform({**loaded.inputs, "antialias": asked.antialias})
    if format == "folders":
        return loaded, _of_folder(name, folder, loaded, transform, order)
    return loaded, _of_source(directory, format, split, loaded, transform, order)


def evaluate_images(
    loaded: TunedModel,
    evaluated: Evaluated,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    workers: int | None,
) -> None:
    """Evaluate a tuned model, and print its accuracy and loss."""
    for line in evaluated.warnings:
        typer.echo(f"warning: {line}", err=True)
    batches = folder_loader(evaluated.images, batch_size, device, workers)
    result = evaluate(loaded.net, batches, amp_dtype=dtype)
    typer.echo(accuracy(evaluated.name, result))
    report_skipped((*evaluated.refused, *result.skipped))


@dataclass(frozen=True)
class Evaluated:
    """Images to evaluate on: name of the split, data set, refused entries and warnings."""

    name: str
    images: Any
    refused: tuple[data.SkippedImage, ...]
    warnings: list[str]


def _of_folder(
    name: str, folder: Path, loaded: TunedModel, transform: data.Transform, order: str | None
) -> Evaluated:
    """Return the images in class folders, with labels in the order of the adapter's outputs."""
    options = reading(loaded.inputs)
    images = data.ImageFolders(folder, transform, loaded.class_names, **options)
    classes = loaded.class_order(folder, images.classes, order)
    if classes != images.classes:
        images = data.ImageFolders(folder, transform, classes, **options)
    return Evaluated(name, images, (), images.warnings)


def _of_source(
    directory: Path,
    format: str,
    split: str | None,
    loaded: TunedModel,
    transform: data.Transform,
    order: str | None,
) -> Evaluated:
    """Return the images of a split, with labels in the order of the adapter's outputs."""
    source = open_source(directory, format, loaded.class_names)
    classes = loaded.class_order(directory, source.class_names, order)
    if classes != source.class_names:
        source = open_source(directory, format, classes)
    name = _eval_split(source, directory, split)
    found = source.splits[name]
    images = SplitImages(found, transform, source.class_names, **reading(loaded.inputs))
    return Evaluated(name, images, found.refused, source.warnings)


def _eval_split(source: ImageSource, directory: Path, split: str | None) -> str:
    if split is not None and split not in data.SPLITS:
        raise ValueError(f"--split is {split!r}; choose one of {', '.join(data.SPLITS)}")
    for name in ("test", "val") if split is None else (split,):
        if name in source.splits:
            return name
    there = ", ".join(source.splits)
    raise FileNotFoundError(f"{directory} has no {split or 'test or val'} split; it has {there}")


def _eval_folder(directory: Path, split: str | None) -> tuple[str, Path]:
    if split is not None:
        if split not in data.SPLITS:
            raise ValueError(f"--split is {split!r}; choose one of {', '.join(data.SPLITS)}")
        return split, data.require_split(directory, split)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no data folder {directory}")
    for name in ("test", "val"):
        folder = data.find_split(directory, name)
        if folder is not None:
            return name, folder
    if data.find_split(directory, "train") is not None:
        raise FileNotFoundError(f"{directory} has no test/ or val/; --split train takes train/")
    return directory.name, directory
