"""Directories that Hugging Face `datasets` saved with `save_to_disk`.

The package is optional, and imported only here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vpt_fast.train.common.names import SPLITS
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

_IMAGE_NAMES, _LABEL_NAMES = ("image", "img"), ("label", "labels")


def is_hf(directory: Path) -> bool:
    """Return whether `save_to_disk` wrote the folder."""
    one = (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    return one or (directory / "dataset_dict.json").is_file()


def read_hf(directory: Path, known: Sequence[str] | None = None) -> ImageSource:
    """Read a saved DatasetDict, or a saved Dataset as the only split, train.

    The image column is the one of type Image, the label column the one of type ClassLabel, whose
    names become the class names; else the one called label, with whole numbers or with words. A
    test split whose labels are all -1, which is how unlabelled ones are published, is left out with
    a warning.

    Args:
        directory: Folder that `save_to_disk` wrote.
        known: Class names of a trained model, which then define the labels.

    Raises:
        ValueError: If `datasets` is not installed, a column is missing or several could be meant,
            or nothing usable is left.
    """
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError(
            f"{directory} was saved by Hugging Face datasets, which is not installed: "
            "pip install datasets"
        ) from error
    loaded: Any = datasets.load_from_disk(str(directory))
    parts = dict(loaded.items()) if hasattr(loaded, "items") else {"train": loaded}
    found = {
        split: next((parts[name] for name in names if name in parts), None)
        for split, names in SPLITS.items()
    }
    present = {split: rows for split, rows in found.items() if rows is not None}
    if not present:
        raise ValueError(f"{directory} has the splits {', '.join(parts)}; one must be train")
    columns = {split: _columns(rows, f"{directory} {split}") for split, rows in present.items()}
    labels = {split: list(rows[columns[split][1]]) for split, rows in present.items()}
    first = next(iter(present))
    feature = present[first].features[columns[first][1]]
    own = getattr(feature, "names", None)
    every = [label for some in labels.values() for label in some]
    words = own is None and are_words(every)
    if words:
        own = sorted({name for label in every if (name := name_of(label, True)) is not None})
    own = consecutive(every) if own is None else own
    names = list(own) if known is None else list(known)
    rank = {name: label for label, name in enumerate(names)}
    splits, warnings = {}, []
    for split, rows in present.items():
        if split == "test" and all(label == -1 for label in labels[split]):
            warnings.append(f"{directory} test has no labels (all are -1): it is left out")
            continue
        where = f"{directory} {split}"
        mine = getattr(rows.features[columns[split][1]], "names", None) or own
        given = [name_of(label, True) for label in labels[split]] if words else None
        column = columns[split][0]
        splits[split] = _split(rows, column, labels[split], given, mine, rank, where)
    refused = [item for split in splits.values() for item in split.refused]
    return ImageSource("hf", check_classes(names, str(directory), refused), splits, warnings)


def _columns(rows: Any, where: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    image = _only([n for n, kind in kinds.items() if kind == "Image"], _IMAGE_NAMES, "image", where)
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    labels = labels or [name for name in kinds if name in _LABEL_NAMES]
    return image, _only(labels, _LABEL_NAMES, "label", where)


def _only(found: list[str], usual: Sequence[str], what: str, where: str) -> str:
    if len(found) != 1:
        usually = [name for name in found if name in usual]
        if len(usually) == 1:
            return usually[0]
        raise ValueError(
            f"{where} has {len(found)} {what} columns ({', '.join(found) or 'none'}); "
            f"rename the one that is meant to {usual[0]!r} with rename_column and save it again"
        )
    return found[0]


def _split(
    rows: Any,
    column: str,
    labels: list[Any],
    words: list[str | None] | None,
    own: Sequence[str],
    rank: dict[str, int],
    where: str,
) -> Split:
    chosen, mine, refused = [], [], []
    for row, label in enumerate(labels):
        name = words[row] if words is not None else _numbered(label, own)
        if name in rank:
            chosen.append(row)
            mine.append(rank[name])
            continue
        where_row = f"{where} row {row}"
        if name is not None:
            reason = f"the model has no class {name!r}"
        elif words is not None:
            reason = f"label {short(label)} is no word"
        else:
            reason = f"label {short(label)} is out of range, {range_of(own, len(labels))}"
        refused.append(SkippedImage(where_row, f"{where_row}: {reason}"))
    names = [f"{where} row {row}" for row in chosen]
    split = Split(mine, names, _RowLoader(rows, column, chosen, names), tuple(refused))
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
