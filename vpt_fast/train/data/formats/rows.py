"""Rows of Hugging Face `datasets`, however they were read: columns, labels and images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vpt_fast.train.common.names import SPLITS
from vpt_fast.train.data.formats.class_lists import ClassList, check_listed, unused
from vpt_fast.train.data.formats.labels import (
    are_words,
    consecutive,
    name_of,
    range_of,
    short,
    whole,
)
from vpt_fast.train.data.images import SkippedImage
from vpt_fast.train.data.pictures import as_picture, load_image, naming
from vpt_fast.train.data.split import ImageSource, Split, check_classes, check_left

IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels")
RENAME = "rename the one that is meant to {!r} with rename_column and save it again"
"""What to do about several columns of a saved data set."""


@dataclass(frozen=True)
class Table:
    """Rows of a split.

    Attributes:
        rows: Rows of `datasets`.
        image: Column of the images.
        labels: Label of each row, as it was read.
        classes: Names of the classes that the column of labels brings, or None.
        names: Name of each row for messages, or None to number them.
    """

    rows: Any
    image: str
    labels: list[Any]
    classes: list[str] | None = None
    names: list[str] | None = None


def named_splits(parts: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return those parts of a data set that are train, val and test, by these names.

    Raises:
        ValueError: If there is none.
    """
    found = {
        split: next((parts[name] for name in names if name in parts), None)
        for split, names in SPLITS.items()
    }
    present = {split: rows for split, rows in found.items() if rows is not None}
    if not present:
        raise ValueError(f"{where} has the splits {', '.join(parts)}; one must be train")
    return present


def table_of(rows: Any, where: str, names: Sequence[str] = LABEL_NAMES) -> Table:
    """Return a table: its image column is the one of type Image, its label column of ClassLabel.

    Args:
        rows: Rows of `datasets`.
        where: Name of the split, for messages.
        names: Names of a label column, where none is a ClassLabel.

    Raises:
        ValueError: If a column is missing, or several could be meant.
    """
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    labels = labels or [name for name in kinds if name in names]
    column = only(labels, names, "label", where)
    classes = getattr(rows.features[column], "names", None)
    return Table(rows, image_column(rows, where), list(rows[column]), classes)


def image_column(rows: Any, where: str, fix: str = RENAME) -> str:
    """Return the column of type Image.

    Args:
        rows: Rows of `datasets`.
        where: Name of the split, for messages.
        fix: What to do about several, for messages.

    Raises:
        ValueError: If there is none, or several could be meant.
    """
    found = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
    return only(found, IMAGE_NAMES, "image", where, fix)


def only(found: list[str], usual: Sequence[str], what: str, where: str, fix: str = RENAME) -> str:
    """Return the only column that was found, or the only one with a usual name.

    Args:
        found: Columns.
        usual: Usual names.
        what: What the column holds, for messages.
        where: Name of the split, for messages.
        fix: What to do about several, for messages.

    Raises:
        ValueError: If several could be meant, or none.
    """
    if len(found) != 1:
        usually = [name for name in found if name in usual]
        if len(usually) == 1:
            return usually[0]
        raise ValueError(
            f"{where} has {len(found)} {what} columns ({', '.join(found) or 'none'}); "
            + fix.format(usual[0])
        )
    return found[0]


def source_of(
    format: str,
    where: str,
    tables: Mapping[str, Table],
    known: Sequence[str] | None,
    listed: ClassList | None = None,
) -> ImageSource:
    """Return the data set of some tables.

    Class names are those that the first table's column brings, else those of a list of classes,
    else words or whole numbers among the labels. A test split whose labels are all -1, which is how
    unlabelled ones are published, is left out with a warning.

    Args:
        format: Name of the format.
        where: Name of the data set, for messages.
        tables: Tables of the splits.
        known: Class names of a trained model, which then define the labels.
        listed: List of classes of the data set's folder, or None.

    Raises:
        ValueError: If nothing usable is left, or there are fewer than two classes.
    """
    every = [label for table in tables.values() for label in table.labels]
    if any(isinstance(label, (list, dict)) for label in every):
        raise ValueError(
            f"{where} has lists for labels; write a CSV with a path and the classes of each image"
        )
    own = next(iter(tables.values())).classes
    words = own is None and are_words(every)
    order = "features" if own is not None else "strings" if words else "numbers"
    if own is None and listed is not None:
        own, order = list(listed.names), str(listed.path)
    found = sorted({name for label in every if (name := name_of(label, True)) is not None})
    if words and known is None:
        check_listed(found, listed)
    own = (found if words else consecutive(every)) if own is None else own
    names = list(own) if known is None else list(known)
    rank = {name: label for label, name in enumerate(names)}
    splits, warnings = {}, []
    for split, table in tables.items():
        if split == "test" and all(label == -1 for label in table.labels):
            warnings.append(f"{where} test has no labels (all are -1): it is left out")
            continue
        splits[split] = _split(table, words, table.classes or own, rank, f"{where} {split}")
    refused = [item for split in splits.values() for item in split.refused]
    names = check_classes(names, where, refused)
    if known is None and "train" in splits:
        warnings += unused(names, set(splits["train"].labels), where)
    order = order if known is None else "known"
    return ImageSource(format, names, splits, warnings, class_order=order)


def _split(
    table: Table, words: bool, own: Sequence[str], rank: Mapping[str, int], where: str
) -> Split:
    row_names = table.names or [f"{where} row {row}" for row in range(len(table.labels))]
    chosen, mine, refused = [], [], []
    for row, label in enumerate(table.labels):
        name = name_of(label, True) if words else _numbered(label, own)
        if name is not None and name in rank:
            chosen.append(row)
            mine.append(rank[name])
            continue
        where_row = row_names[row]
        if name is not None:
            reason = f"the model has no class {name!r}"
        elif words:
            reason = f"label {short(label)} is no word"
        else:
            reason = f"label {short(label)} is out of range, {range_of(own, len(table.labels))}"
        refused.append(SkippedImage(where_row, f"{where_row}: {reason}"))
    names = [row_names[row] for row in chosen]
    split = Split(mine, names, _RowLoader(table.rows, table.image, chosen, names), tuple(refused))
    return check_left(split, where)


def _numbered(label: Any, own: Sequence[str]) -> str | None:
    """Return the name of the class with that number, or None."""
    number = whole(label)
    return None if number is None or not 0 <= number < len(own) else own[number]


class _RowLoader:
    """Decoder of one row; not a closure, so that it can be pickled for worker processes."""

    def __init__(self, rows: Any, column: str, indices: list[int], names: list[str]) -> None:
        feature = rows.features[column]
        self.mode: str | None = getattr(feature, "mode", None)
        # Raw files: `datasets` always rotates images by their EXIF orientation when it decodes.
        if getattr(feature, "decode", False):
            rows = rows.cast_column(column, type(feature)(decode=False))
        self.rows, self.column, self.indices, self.names = rows, column, indices, names

    def __call__(self, index: int, channels: int, exif: bool = True) -> Image.Image:
        name = self.names[index]
        with naming(name):
            found = self.rows[self.indices[index]][self.column]
        if isinstance(found, dict):
            content, path = found.get("bytes"), found.get("path")
            file = io.BytesIO(content) if content is not None else path
            found = file and load_image(file, channels, exif, name=name)
        elif found is not None:
            with naming(name):
                found = as_picture(found, channels, exif)
        if found is None:
            raise ValueError(f"{name} cannot be decoded (the row has no image)")
        image: Image.Image = found
        return image.convert(self.mode).convert(image.mode) if self.mode else image
