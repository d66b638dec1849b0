"""Work of `vpt-fast eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from vpt_fast.cli.common import accuracy, report_skipped
from vpt_fast.train.common.names import SPLITS
from vpt_fast.train.common.recipe import Recipe, resolve_amp_dtype
from vpt_fast.train.data import images as data
from vpt_fast.train.data.image_loaders import folder_loader
from vpt_fast.train.data.pictures import reading
from vpt_fast.train.data.sources import check_format
from vpt_fast.train.data.split import ImageSource, SplitImages
from vpt_fast.train.loop.evaluate import evaluate, resolve_device
from vpt_fast.train.run.data_of_run import open_as_trained, record_of
from vpt_fast.train.run.record import RunRecord
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
        directory: Folder of the data set, or its file.
        data_format: One of `names.FORMATS`.
        split: One of `names.SPLITS`; None takes test, else val.
        val_fraction: Part of train that is held out, or None; see `open_as_trained`.
        class_order: One of `names.CLASS_ORDERS`, or None.
        antialias: Whether resizing filters with antialiasing.
    """

    directory: Path
    data_format: str
    split: str | None
    val_fraction: float | None
    class_order: str | None
    antialias: bool


def load(
    adapter: Path, checkpoint: Path | None, device: torch.device, asked: Asked
) -> tuple[TunedModel, Evaluated]:
    """Return the tuned model, and the images with labels in the order of its outputs."""
    directory, order = asked.directory, asked.class_order
    wanted = _Wanted(asked, check_format(directory, asked.data_format), record_of(adapter))
    by_folder = wanted.format in ("folders", "classes") and not wanted.may_be_in_train()
    name, folder = _eval_folder(directory, asked.split) if by_folder else ("", directory)
    loaded = load_tuned(adapter, checkpoint, device)
    transform = data.eval_transform({**loaded.inputs, "antialias": asked.antialias})
    if by_folder:
        return loaded, _of_folder(name, folder, loaded, transform, order)
    return loaded, _of_source(wanted, loaded, transform)


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
class _Wanted:
    """What was asked for, the format of the data set and the record of the adapter's run."""

    asked: Asked
    format: str
    record: RunRecord | None

    @property
    def recorded_fraction(self) -> float | None:
        """Part of train that the run held out, or None."""
        return None if self.record is None else self.record.data.get("val_fraction")

    def may_be_in_train(self) -> bool:
        """Return whether a folder of class folders may hold validation images within train."""
        if self.recorded_fraction is None and self.asked.val_fraction is None:
            return False
        return (
            self.format == "classes" or data.find_split(self.asked.directory, "train") is not None
        )

    def open(self, known: list[str] | None) -> ImageSource:
        """Open the data set with the class names of an adapter."""
        asked = self.asked
        return open_as_trained(asked.directory, self.format, known, self.record, asked.val_fraction)


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
    loaded.check_labels(folder, multi_label=False)
    options = reading(loaded.inputs)
    images = data.ImageFolders(folder, transform, loaded.class_names, **options)
    classes = loaded.class_order(folder, images.classes, order)
    if classes != images.classes:
        images = data.ImageFolders(folder, transform, classes, **options)
    return Evaluated(name, images, (), images.warnings)


def _of_source(wanted: _Wanted, loaded: TunedModel, transform: data.Transform) -> Evaluated:
    """Return the images of a split, with labels in the order of the adapter's outputs."""
    directory = wanted.asked.directory
    source = wanted.open(loaded.class_names)
    loaded.check_labels(directory, source.multi_label)
    classes = loaded.class_order(directory, source.class_names, wanted.asked.class_order)
    if classes != source.class_names:
        source = wanted.open(classes)
    name = _eval_split(source, wanted)
    found = source.splits[name]
    images = SplitImages(found, transform, source.class_names, **reading(loaded.inputs))
    whole = source.format == "classes" and wanted.asked.split is None and name == "train"
    shown = directory.name if whole else name
    return Evaluated(shown, images, found.refused, source.warnings)


def _check_split(split: str | None) -> None:
    if split is not None and split not in SPLITS:
        raise ValueError(f"--split is {split!r}; choose one of {', '.join(SPLITS)}")


def _eval_split(source: ImageSource, wanted: _Wanted) -> str:
    split = wanted.asked.split
    _check_split(split)
    for name in ("test", "val") if split is None else (split,):
        if name in source.splits:
            return name
    if source.format == "classes" and split is None:
        return "train"
    there = ", ".join(f"--split {name}" for name in source.splits)
    held = wanted.recorded_fraction is not None
    other = ", and not the images of the run, which held some out" if held else ""
    raise FileNotFoundError(
        f"{wanted.asked.directory} has no {split or 'test or val'} split; it has {there}{other}"
    )


def _eval_folder(directory: Path, split: str | None) -> tuple[str, Path]:
    _check_split(split)
    if split is not None:
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
