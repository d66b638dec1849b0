"""Data sets on disk, each read by the reader of its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from vpt_fast.train.common.names import CLASS_ORDERS, SPLITS
from vpt_fast.train.data.detect import check_format
from vpt_fast.train.data.formats.class_folders import class_names, natural
from vpt_fast.train.data.formats.class_lists import ClassList, check_listed, class_list, unused
from vpt_fast.train.data.formats.csv_files import read_csv
from vpt_fast.train.data.formats.fgvc import read_fgvc
from vpt_fast.train.data.formats.hf import LOADERS, read_hf, read_with_loader
from vpt_fast.train.data.formats.vtab import read_vtab, vtab_folder
from vpt_fast.train.data.holdout import split_off
from vpt_fast.train.data.images import ImageFolders, find_split, require_split
from vpt_fast.train.data.overlaps import overlap_warnings
from vpt_fast.train.data.split import ImageSource, Split, check_classes, split_of_files

__all__ = ["check_format", "open_source", "ordered", "read_folders"]


def open_source(
    directory: str | Path,
    format: str = "auto",
    known: Sequence[str] | None = None,
    *,
    val_fraction: float | None = None,
    class_order: str | None = None,
) -> ImageSource:
    """Open a data set: read its lists and labels but no image.

    Args:
        directory: Folder of the data set, or a CSV file. For VTAB the folder of one set; if it is
            missing, another common name of the set is looked for beside it.
        format: One of `names.FORMATS`; "auto" detects it by the files.
        known: Class names of a trained model. None takes those of the training images.
        val_fraction: Part of the training images that become the validation split; see `split_off`.
        class_order: One of `names.CLASS_ORDERS`; None takes the data set's own order, or "strings".

    Raises:
        FileNotFoundError: If the directory is missing, or train is and `known` is None.
        ValueError: If the format is unknown or could be several, the content cannot be used, the
            options do not fit it, or the package `datasets` is needed and not installed.
    """
    format = check_format(directory, format)
    folder = vtab_folder(Path(directory))
    if format == "fgvc":
        source = read_fgvc(folder, known)
    elif format == "hf":
        source = read_hf(folder, known)
    elif format in ("folders", "classes"):
        source = read_folders(folder, known, format)
    elif format == "csv":
        source = read_csv(folder, known)
    elif format in LOADERS:
        source = read_with_loader(folder, format, known)
    else:
        source = read_vtab(folder, known, whole=format == "vtab-1000")
    if not source.splits or (known is None and "train" not in source.splits):
        there = ", ".join(source.splits) or "none"
        raise FileNotFoundError(f"{folder} ({source.format}) has no train split; it has {there}")
    if class_order is not None:
        source = ordered(source, class_order)
    if val_fraction is not None:
        source = split_off(source, val_fraction)
    overlaps = overlap_warnings(source.splits, source.class_names)
    return replace(source, warnings=[*source.warnings, *overlaps])


def read_folders(
    directory: Path, known: Sequence[str] | None = None, format: str = "folders"
) -> ImageSource:
    """Read train/<class>/<image>, and val/ and test/ if they exist; see `ImageFolders`.

    Args:
        directory: Folder of the data set.
        known: Class names of a trained model. None takes a list of classes in the folder, or the
            names of the class folders.
        format: "folders"; "classes" where the class folders are in the folder itself.
    """
    if format == "classes":
        folders = {"train": directory}
    else:
        found = {name: find_split(directory, name) for name in SPLITS}
        folders = {name: folder for name, folder in found.items() if folder is not None}
    listed = class_list(directory) if known is None else None
    order = "strings" if known is None else "known"
    if listed is not None:
        known, order = _listed(folders.get("train") or require_split(directory, "train"), listed)
    elif known is None:
        train = folders.get("train") or require_split(directory, "train")
        known = ImageFolders(train, _nothing).classes
    splits: dict[str, Split] = {}
    warnings: list[str] = []
    for name, folder in folders.items():
        images = ImageFolders(folder, _nothing, known)
        splits[name] = split_of_files([path for path, _ in images.samples], images.targets)
        warnings += images.warnings
    if listed is not None:
        warnings += unused(known, set(splits["train"].labels), str(directory))
    return ImageSource(format, list(known), splits, warnings, class_order=order)


def _listed(train: Path, listed: ClassList) -> tuple[list[str], str]:
    """Return the classes of a list, and where they stand, if it names those of the folder."""
    check_listed(class_names(train), listed)
    return check_classes(listed.names, str(listed.path)), str(listed.path)


def ordered(source: ImageSource, order: str) -> ImageSource:
    """Return the data set with its classes in an order of their names.

    Args:
        source: Data set whose classes its reader has sorted.
        order: One of `names.CLASS_ORDERS`.

    Raises:
        ValueError: If there is no such order, or the data set brings another of its own.
    """
    if order not in CLASS_ORDERS:
        raise ValueError(f"class_order is {order!r}; choose one of {', '.join(CLASS_ORDERS)}")
    before = source.class_names
    names = natural(before) if order == "natural" else sorted(before)
    if source.class_order != "strings":
        if names != before:
            raise ValueError(
                f"the classes are in an order of the data's own ({source.class_order}); leave "
                "--class-order out"
            )
        return source
    rank = {name: label for label, name in enumerate(names)}
    place_of = {name: place for place, name in enumerate(before)}
    places = [place_of[name] for name in names]
    splits = {
        name: replace(
            split,
            labels=[
                [label[place] for place in places]
                if isinstance(label, list)
                else rank[before[label]]
                for label in split.labels
            ],
        )
        for name, split in source.splits.items()
    }
    return replace(source, class_names=names, splits=splits, class_order=order)


def _nothing(image: Image.Image) -> torch.Tensor:
    """Stand in for a transform: only the lists of the folders are used."""
    return torch.empty(0)
