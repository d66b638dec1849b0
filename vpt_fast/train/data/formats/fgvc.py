"""Fine-grained sets (CUB, NABirds, Flowers, Dogs, Cars) as json files: `{"path.jpg": class id}`.

Class ids are whole numbers, or words.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpt_fast.train.common.names import SPLITS
from vpt_fast.train.data.formats.labels import Pairs, are_words, name_of, read_json, short
from vpt_fast.train.data.images import SkippedImage
from vpt_fast.train.data.split import (
    ImageSource,
    Split,
    check_classes,
    check_left,
    some,
    split_of_files,
)

# Number of listed files that are looked for to find the folder that their paths start in.
_LOOK = 20


def is_fgvc(directory: Path) -> bool:
    """Return whether the folder has one of the json files."""
    return any((directory / f"{split}.json").is_file() for split in SPLITS)


def read_fgvc(directory: Path, known: Sequence[str] | None = None) -> ImageSource:
    """Read those of train.json, val.json and test.json that exist.

    A label is the rank of a class id among those of all files together; class names are the ids.
    Images are looked for in images/, Images/ and the folder itself.

    Args:
        directory: Folder of the json files.
        known: Class names (ids) of a trained model, which then define the labels.

    Raises:
        ValueError: If a file is damaged, of another kind or has no usable entry, or there are fewer
            than two classes.
    """
    read = {
        split: _read(directory / f"{split}.json")
        for split in SPLITS
        if (directory / f"{split}.json").is_file()
    }
    words = are_words(label for entries in read.values() for _, label in entries)
    ids = {
        split: {name for _, label in entries if (name := name_of(label, words)) is not None}
        for split, entries in read.items()
    }
    union = sorted(set[str]().union(*ids.values()), key=None if words else int)
    names = union if known is None else list(known)
    root = _image_root(directory, [path for entries in read.values() for path, _ in entries])
    splits = {
        split: _split(directory / f"{split}.json", root, entries, names, words)
        for split, entries in read.items()
    }
    check_classes(names, str(root), [item for split in splits.values() for item in split.refused])
    warnings = []
    for split, mine in ids.items():
        missing = [] if words else [name for name in union if name not in mine]
        if missing and int(missing[0]) < max(map(int, mine), default=int(missing[0])):
            warnings.append(
                f"{split}.json lacks {len(missing)} of the {len(union)} class ids "
                f"({some(missing)}): labels are ranks among the ids of "
                "all files together, and differ from ranks within this file"
            )
    order = "known" if known is not None else "strings" if words else "numbers"
    return ImageSource("fgvc", names, splits, warnings, class_order=order)


def _read(path: Path) -> Pairs:
    content = read_json(path)
    kind = f'{path} holds no {{"path": class id}}'
    if not isinstance(content, Pairs):
        raise ValueError(f"{kind} but {_kind(content)}")
    for key, value in content:
        if isinstance(value, list):  # an object, too
            raise ValueError(f"{kind}: its {short(key)} is {_kind(value)}")
    return content


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, Pairs) else f"a {type(value).__name__}"


def _image_root(directory: Path, images: list[str]) -> Path:
    """Return the folder that holds most of the first images; the data folder if none does."""
    roots = [directory / name for name in ("images", "Images", "")]
    found = [sum(map(os.path.isfile, map(root.joinpath, images[:_LOOK]))) for root in roots]
    return roots[found.index(max(found))] if max(found) else directory


def _split(path: Path, root: Path, entries: Pairs, names: Sequence[str], words: bool) -> Split:
    ranks = {name: label for label, name in enumerate(names)}
    paths, labels, refused = [], [], []
    for image, label in entries:
        name = name_of(label, words)
        if name in ranks:
            paths.append(root / image)
            labels.append(ranks[name])
            continue
        if name is None:
            reason = f"class id {short(label)} is no {'word' if words else 'whole number'}"
        else:
            reason = f"the model has no class id {short(name) if words else name}"
        where = f"{path} {image}"
        refused.append(SkippedImage(where, f"{where}: {reason}"))
    return check_left(split_of_files(paths, labels, refused), str(path))
