"""Fine-grained sets (CUB, NABirds, Flowers, Dogs, Cars) as json files: `{"path.jpg": class id}`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpt_fast.train.data import SPLITS, SkippedImage
from vpt_fast.train.split import (
    ImageSource,
    Split,
    check_classes,
    check_left,
    some,
    split_of_files,
)

# How many listed files are looked for to find the folder that their paths start in.
_LOOK = 20


def is_fgvc(directory: Path) -> bool:
    """Whether the folder has one of the json files."""
    return any((directory / f"{split}.json").is_file() for split in SPLITS)


def read_fgvc(directory: Path, known: Sequence[str] | None = None) -> ImageSource:
    """Reads train.json, val.json and test.json, those that are there.

    A label is the rank of a class id among those of all files together; class names are the ids.
    Images are looked for in images/, Images/ and the folder itself.

    Args:
        directory: Of the json files.
        known: Class names (ids) of a trained model; they decide the labels then.

    Raises:
        ValueError: If a file is damaged or has no usable entry, or there are fewer than two
            classes.
    """
    read = {
        split: _read_json(directory / f"{split}.json")
        for split in SPLITS
        if (directory / f"{split}.json").is_file()
    }
    ids = {split: {label for _, label in entries} for split, (entries, _) in read.items()}
    union = sorted(set[int]().union(*ids.values()))
    names = [str(label) for label in union] if known is None else list(known)
    root = _image_root(directory, [path for entries, _ in read.values() for path, _ in entries])
    splits = {
        split: _split(directory / f"{split}.json", root, *found, check_classes(names, str(root)))
        for split, found in read.items()
    }
    warnings = []
    for split, mine in ids.items():
        missing = [label for label in union if label not in mine]
        if missing and missing[0] < max(mine, default=missing[0]):
            warnings.append(
                f"{split}.json lacks {len(missing)} of the {len(union)} class ids "
                f"({some([str(label) for label in missing])}): labels are ranks among the ids of "
                "all files together, and differ from ranks within this file"
            )
    return ImageSource("fgvc", names, splits, warnings)


def _read_json(path: Path) -> tuple[list[tuple[str, int]], list[SkippedImage]]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no json file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds no {{"path": class id}} but a {type(content).__name__}')
    entries, refused = [], []
    for image, label in content.items():
        if isinstance(label, str) and label.strip().isdecimal():
            label = int(label)
        if isinstance(label, int) and not isinstance(label, bool):
            entries.append((image, label))
        else:
            where = f"{path} {image}"
            refused.append(SkippedImage(where, f"{where}: class id {label!r} is no whole number"))
    return entries, refused


def _image_root(directory: Path, images: list[str]) -> Path:
    """Where most of the first images are; the folder itself where none is."""
    roots = [directory / name for name in ("images", "Images", "")]
    found = [sum((root / image).is_file() for image in images[:_LOOK]) for root in roots]
    return roots[found.index(max(found))] if max(found) else directory


def _split(
    path: Path,
    root: Path,
    entries: list[tuple[str, int]],
    refused: list[SkippedImage],
    names: list[str],
) -> Split:
    ranks = {name: label for label, name in enumerate(names)}
    paths, labels, bad = [], [], list(refused)
    for image, class_id in entries:
        if str(class_id) in ranks:
            paths.append(root / image)
            labels.append(ranks[str(class_id)])
        else:
            where = f"{path} {image}"
            bad.append(SkippedImage(where, f"{where}: the model has no class id {class_id}"))
    return check_left(split_of_files(paths, labels, bad), str(path))
