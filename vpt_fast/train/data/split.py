"""A labelled set of images, whatever it was read from, and what could not be used of it."""

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
    """Decodes image `index`, as `load_image` does."""

    def __call__(self, index: int, channels: int, exif: bool = True) -> Image.Image:
        """Raises ValueError, naming the image, if it is damaged."""
        ...


@dataclass(frozen=True)
class Split:
    """The images of train, val or test.

    Attributes:
        labels: Of each image, from 0 to the number of classes - 1.
        names: Of each image, for messages: its path, or its row.
        load: Decodes an image.
        refused: Entries that are not among the images: a label out of range, an unreadable line.
    """

    labels: list[int]
    names: list[str]
    load: Load
    refused: tuple[SkippedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSource:
    """A data set on disk.

    Attributes:
        format: What it is, one of `sources.FORMATS`.
        class_names: In the order of the labels.
        splits: Of "train", "val" and "test" those that there are.
        warnings: What its owner should know.
    """

    format: str
    class_names: list[str]
    splits: dict[str, Split]
    warnings: list[str] = field(default_factory=list)


class SplitImages(Dataset):
    """A split as items (image, label), or a SkippedImage for a file that cannot be decoded.

    Args:
        split: Of a source.
        transform: From a PIL image to a tensor (C, H, W).
        class_names: In the order of the labels.
        channels: 3 for RGB, 1 for grey.
        exif: Whether images are turned as their EXIF orientation says.
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
        """The image before its transform; raises ValueError, naming it, if it is damaged."""
        return self.split.load(index, self.channels, self.exif)


def split_of_files(
    paths: Sequence[str | Path], labels: list[int], refused: Sequence[SkippedImage] = ()
) -> Split:
    """A split of image files."""
    names = [str(path) for path in paths]
    return Split(labels, names, _FileLoader(names), tuple(refused))


class _FileLoader:
    """Not a closure: worker processes may have to be sent it."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __call__(self, index: int, channels: int, exif: bool = True) -> Image.Image:
        return load_image(self.paths[index], channels, exif)


def some(items: Sequence[str], limit: int = 3) -> str:
    """The first of some names or reasons."""
    return "; ".join(items[:limit]) + ("; ..." if len(items) > limit else "")


def check_left(split: Split, where: str) -> Split:
    """Returns the split.

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
    """Returns the class names.

    Args:
        names: Of the classes.
        where: Of what data set, for the message.
        refused: Entries that are left out, which may be why there are so few.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(names) < 2:
        left = f" (left out: {some([item.reason for item in refused])})" if refused else ""
        raise ValueError(f"{where} has {len(names)} class; a classifier needs at least two{left}")
    return list(names)
