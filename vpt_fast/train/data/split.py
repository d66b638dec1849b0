"""Labelled images of any format, and the entries that could not be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch.utils.data import Dataset

from vpt_fast.train.data.images import SkippedImage, Transform
from vpt_fast.train.data.pictures import load_image


class Load(Protocol):
    """Function that decodes image `index`, as `load_image` does."""

    def __call__(self, index: int, channels: int, exif: bool = True) -> Image.Image:
        """Return the image; raise ValueError, naming it, if it is damaged."""
        ...


@dataclass(frozen=True)
class Split:
    """Images of train, val or test.

    Attributes:
        labels: Label of each image, from 0 to the number of classes - 1; or where it may have
            several, a row with 0 or 1 for each class.
        names: Name of each image, for messages: its path, or its row.
        load: Function that decodes an image.
        refused: Entries that are left out: a label out of range, an unreadable line.
    """

    labels: list[Any]
    names: list[str]
    load: Load
    refused: tuple[SkippedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSource:
    """Data set on disk.

    Attributes:
        format: Format of the data set, one of `names.FORMATS`.
        class_names: Names of the classes, in the order of the labels.
        splits: Those of "train", "val" and "test" that exist.
        warnings: Messages for the user.
        multi_label: Whether an image may have several labels, or none.
        class_order: What the order of the classes comes from: "strings" or "natural", if they were
            sorted by name; "numbers", "known" for those of a model, "columns" or "features" of the
            table, or the path of a list of classes.
    """

    format: str
    class_names: list[str]
    splits: dict[str, Split]
    warnings: list[str] = field(default_factory=list)
    multi_label: bool = False
    class_order: str = "strings"


class SplitImages(Dataset):
    """Dataset of a split: items (image, label), or a SkippedImage for an undecodable file.

    Args:
        split: Split of a source.
        transform: Function from a PIL image to a tensor (C, H, W).
        class_names: Names of the classes, in the order of the labels.
        channels: Number of channels: 3 for RGB, 1 for grey.
        exif: Whether images are rotated as their EXIF orientation says.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform,
        class_names: Sequence[str],
        channels: int = 3,
        exif: bool = True,
    ) -> None:
        self.split, self.transform = split, transform
        self.channels, self.exif = channels, exif
        self.classes = list(class_names)
        self.targets = split.labels

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Any:
        try:
            image = self.load(index)
        except ValueError as error:
            return SkippedImage(self.split.names[index], str(error))
        return self.transform(image), self.split.labels[index]

    def load(self, index: int) -> Image.Image:
        """Return the image before its transform; raise ValueError, naming it, if it is damaged."""
        return self.split.load(index, self.channels, self.exif)


def split_of_files(
    paths: Sequence[str | Path], labels: list[Any], refused: Sequence[SkippedImage] = ()
) -> Split:
    """Return a split of image files."""
    names = [str(path) for path in paths]
    return Split(labels, names, _FileLoader(names), tuple(refused))


class _FileLoader:
    """Decoder of a file; not a closure, so that it can be pickled for worker processes."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __call__(self, index: int, channels: int, exif: bool = True) -> Image.Image:
        return load_image(self.paths[index], channels, exif)


def chosen(split: Split, rows: Sequence[int]) -> Split:
    """Return some images of a split, without its refused entries."""
    labels, names = [split.labels[row] for row in rows], [split.names[row] for row in rows]
    return Split(labels, names, _ChosenLoader(split.load, list(rows)))


class _ChosenLoader:
    """Decoder of some images of a split; not a closure, so that it can be pickled."""

    def __init__(self, load: Load, rows: list[int]) -> None:
        self.load, self.rows = load, rows

    def __call__(self, index: int, channels: int, exif: bool = True) -> Image.Image:
        return self.load(self.rows[index], channels, exif)


def require_one_label(source: ImageSource) -> ImageSource:
    """Return a data set whose images have one label each.

    Raises:
        ValueError: If they have several, which top-1 accuracy is not for.
    """
    if source.multi_label:
        raise ValueError(
            "the images have several labels each, and a sweep compares top-1, which is for one; "
            "use train, or give one class an image"
        )
    return source


def some(items: Sequence[str], limit: int = 3) -> str:
    """Return the first `limit` of some names or reasons as text."""
    return "; ".join(items[:limit]) + ("; ..." if len(items) > limit else "")


def check_left(split: Split, where: str) -> Split:
    """Return the split if it has images.

    Raises:
        ValueError: If it has no image that can be used.
    """
    if not len(split):
        reasons = some([item.reason for item in split.refused]) or "it is empty"
        raise ValueError(f"{where} has no entry that can be used: {reasons}")
    return split


def check_classes(
    names: Sequence[str], where: str, refused: Sequence[SkippedImage] = ()
) -> list[str]:
    """Return the class names if there are at least two.

    Args:
        names: Names of the classes.
        where: Name of the data set, for the message.
        refused: Entries that are left out, named in the message as a possible reason.

    Raises:
        ValueError: If there are fewer.
    """
    if len(names) < 2:
        left = f" (left out: {some([item.reason for item in refused])})" if refused else ""
        raise ValueError(f"{where} has {len(names)} class; a classifier needs at least two{left}")
    return list(names)
