"""`vpt-fast eval`: accuracy and loss of an adapter on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vpt_fast.cli.common import accuracy, one_line_errors, report_skipped
from vpt_fast.cli.options import Adapter, AmpDtype, Checkpoint, Device, ValFraction, Workers
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data import images as data
from vpt_fast.train.data.formats.class_folders import CLASS_ORDERS
from vpt_fast.train.data.image_loaders import folder_loader
from vpt_fast.train.data.pictures import reading
from vpt_fast.train.data.sources import FORMATS, check_format
from vpt_fast.train.data.split import ImageSource, SplitImages
from vpt_fast.train.loop.evaluate import evaluate, resolve_device
from vpt_fast.train.run.data_of_run import open_as_trained, record_of
from vpt_fast.train.run.record import RunRecord
from vpt_fast.train.run.tuned_model import TunedModel, load_tuned


def evaluate_adapter(
    adapter: Adapter,
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with test/<class>/<image> (or val/, or class folders), or another "
            "format that train takes.",
        ),
    ],
    checkpoint: Checkpoint = None,
    split: Annotated[
        str | None, typer.Option(help="test, val or train; by default test, else val.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 64,
    data_format: Annotated[
        str, typer.Option("--format", help=f"Of DIR: {', '.join(FORMATS)}.")
    ] = "auto",
    val_fraction: ValFraction = None,
    class_order: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(CLASS_ORDERS)}: how the classes of an adapter that does not name "
            "them were sorted; class10 comes before class2 as a string."
        ),
    ] = None,
    no_antialias: Annotated[
        bool, typer.Option("--no-antialias", help="Resize as training with this option did.")
    ] = False,
    amp_dtype: AmpDtype = "float32",
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Evaluate an adapter on a folder of images."""
    with one_line_errors():
        where = resolve_device(device)
        dtype = Recipe(amp_dtype=amp_dtype).autocast_dtype
        format = check_format(directory, data_format)
        held_out = _HeldOut(record_of(adapter), val_fraction)
        by_folder = format in ("folders", "classes") and not held_out.may_be_in(directory, format)
        name, folder = _eval_folder(directory, split) if by_folder else ("", directory)
        loaded = load_tuned(adapter, checkpoint, where)
        transform = data.eval_transform({**loaded.inputs, "antialias": not no_antialias})
        if by_folder:
            evaluated = _of_folder(name, folder, loaded, transform, class_order)
        else:
            wanted = _Wanted(directory, format, split, held_out)
            evaluated = _of_source(wanted, loaded, transform, class_order)
        for line in evaluated.warnings:
            typer.echo(f"warning: {line}", err=True)
        batches = folder_loader(evaluated.images, batch_size, where, workers)
        result = evaluate(loaded.net, batches, amp_dtype=dtype)
        typer.echo(accuracy(evaluated.name, result))
        report_skipped((*evaluated.refused, *result.skipped))


@dataclass(frozen=True)
class _HeldOut:
    """Record of the adapter's run, and the part of train that is said to be held out, or None."""

    record: RunRecord | None
    val_fraction: float | None

    def may_be_in(self, directory: Path, format: str) -> bool:
        """Return whether a folder of class folders may hold validation images within train."""
        recorded = None if self.record is None else self.record.data.get("val_fraction")
        if recorded is None and self.val_fraction is None:
            return False
        return format == "classes" or data.find_split(directory, "train") is not None


@dataclass(frozen=True)
class _Wanted:
    """Data set, its format and the split of it that is evaluated on, or None."""

    directory: Path
    format: str
    split: str | None
    held_out: _HeldOut

    def open(self, known: list[str] | None) -> ImageSource:
        """Open the data set with the class names of an adapter."""
        held = self.held_out
        return open_as_trained(self.directory, self.format, known, held.record, held.val_fraction)


@dataclass(frozen=True)
class _Evaluated:
    """Images to evaluate on: name of the split, data set, refused entries and warnings."""

    name: str
    images: Any
    refused: tuple[data.SkippedImage, ...]
    warnings: list[str]


def _of_folder(
    name: str, folder: Path, loaded: TunedModel, transform: data.Transform, order: str | None
) -> _Evaluated:
    """Return the images in class folders, with labels in the order of the adapter's outputs."""
    loaded.check_labels(folder, multi_label=False)
    options = reading(loaded.inputs)
    images = data.ImageFolders(folder, transform, loaded.class_names, **options)
    classes = loaded.class_order(folder, images.classes, order)
    if classes != images.classes:
        images = data.ImageFolders(folder, transform, classes, **options)
    return _Evaluated(name, images, (), images.warnings)


def _of_source(
    wanted: _Wanted, loaded: TunedModel, transform: data.Transform, order: str | None
) -> _Evaluated:
    """Return the images of a split, with labels in the order of the adapter's outputs."""
    source = wanted.open(loaded.class_names)
    loaded.check_labels(wanted.directory, source.multi_label)
    classes = loaded.class_order(wanted.directory, source.class_names, order)
    if classes != source.class_names:
        source = wanted.open(classes)
    name = _eval_split(source, wanted)
    found = source.splits[name]
    images = SplitImages(found, transform, source.class_names, **reading(loaded.inputs))
    whole = source.format == "classes" and wanted.split is None and name == "train"
    shown = wanted.directory.name if whole else name
    return _Evaluated(shown, images, found.refused, source.warnings)


def _eval_split(source: ImageSource, wanted: _Wanted) -> str:
    split = wanted.split
    if split is not None and split not in data.SPLITS:
        raise ValueError(f"--split is {split!r}; choose one of {', '.join(data.SPLITS)}")
    for name in ("test", "val") if split is None else (split,):
        if name in source.splits:
            return name
    if source.format == "classes" and split is None:
        return "train"
    there = ", ".join(f"--split {name}" for name in source.splits)
    held = wanted.held_out.record is not None and wanted.held_out.record.data.get("val_fraction")
    other = ", and not the images of the run, which held some out" if held else ""
    raise FileNotFoundError(
        f"{wanted.directory} has no {split or 'test or val'} split; it has {there}{other}"
    )


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
