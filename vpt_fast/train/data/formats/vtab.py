"""VTAB-1k folders: `<root>/<set>` with lists of images and labels.

The lists are train800.txt, val200.txt, train800val200.txt and test.txt; a line is
`images/train800val200/000000.jpg 307`, a path in the folder and a label from 0; other sets of that
layout may have words for labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpt_fast.train.data.formats.labels import (
    are_words,
    consecutive,
    name_of,
    range_of,
    read_list,
    short,
)
from vpt_fast.train.data.images import SkippedImage
from vpt_fast.train.data.split import (
    ImageSource,
    Split,
    check_classes,
    check_left,
    some,
    split_of_files,
)

# Classes of each set: natural, specialized and structured ones (Zhai et al. 2019, table 2).
CLASSES = {
    "caltech101": 102,
    "cifar": 100,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
ALIASES = {
    "cifar100": "cifar",
    "cifar_100": "cifar",
    "flowers102": "oxford_flowers102",
    "pets": "oxford_iiit_pet",
}
WHOLE = "train800val200.txt"
LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


def is_vtab(directory: Path) -> bool:
    """Return whether the folder has VTAB's lists."""
    return any((directory / name).is_file() for name in ("train800.txt", "val200.txt", WHOLE))


def vtab_name(name: str) -> str:
    """Return VTAB's own name of a set; other names are returned in lower case."""
    return ALIASES.get(name.lower(), name.lower())


def vtab_folder(directory: Path) -> Path:
    """Return the folder itself, or if it is missing one beside it with another name of the set."""
    if directory.exists():
        return directory
    wanted = vtab_name(directory.name)
    others = [name for name in (*CLASSES, *ALIASES) if vtab_name(name) == wanted]
    folders = [directory.parent / name for name in others]
    return next((folder for folder in folders if folder.is_dir()), directory)


def read_vtab(
    directory: Path, known: Sequence[str] | None = None, whole: bool = False
) -> ImageSource:
    """Read the lists of a set.

    The number of classes is VTAB's where the folder has the name of one of its sets (or another
    common name of it), else the largest label of all lists + 1, where a label that is not below the
    number of lines is a mistake. Class names are the labels. Where most labels are words, class
    names are these, sorted.

    Args:
        directory: Folder of the set.
        known: Class names of a trained model.
        whole: Whether to train on train800val200.txt, the 1,000 images, without validation. Else
            training is on train800.txt, with val200.txt; or on the 1,000 images if train800.txt is
            missing.

    Raises:
        ValueError: If a list has no usable line, there are fewer than two classes, or `known`
            has other ones.
    """
    lists = dict(LISTS)
    if whole or not (directory / lists["train"]).is_file():
        lists["train"] = WHOLE
        # It holds the validation images too.
        del lists["val"]
    files = {split: directory / name for split, name in lists.items()}
    read = {split: read_list(path) for split, path in files.items() if path.is_file()}
    labels = [label for lines in read.values() for *_, label in lines if label is not None]
    words = are_words(labels)
    if words:
        names = sorted({name for label in labels if (name := name_of(label, True)) is not None})
    else:
        count = CLASSES.get(vtab_name(directory.resolve().name))
        names = consecutive(labels) if count is None else [str(label) for label in range(count)]
    if known is not None:
        names = _known(directory, names, list(known), words)
    splits = {
        split: _split(files[split], lines, names, words, len(labels))
        for split, lines in read.items()
    }
    names = check_classes(
        names, str(directory), [item for split in splits.values() for item in split.refused]
    )
    warnings = []
    if "train" in splits and lists["train"] == WHOLE and not whole:
        warnings.append(f"no {LISTS['train']}: training on all of {WHOLE}, without validation")
    if "train" in splits and known is None:
        warnings += _empty_classes(files["train"], names, splits["train"])
    order = "known" if known is not None else "strings" if words else "numbers"
    return ImageSource("vtab", names, splits, warnings, class_order=order)


def _known(directory: Path, own: list[str], known: list[str], words: bool) -> list[str]:
    """Return the model's classes if they can be those of the lists.

    Raises:
        ValueError: If they cannot.
    """
    fits = words or (
        known == [str(label) for label in range(len(known))] and len(own) <= len(known)
    )
    if vtab_name(directory.resolve().name) in CLASSES and not words:
        fits = own == known
    if not fits:
        raise ValueError(
            f"{directory} has the classes 0 to {len(own) - 1}, the model has {len(known)} classes: "
            f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
        )
    return known


def _split(
    path: Path,
    lines: Sequence[tuple[int, str, str | None]],
    names: Sequence[str],
    words: bool,
    entries: int,
) -> Split:
    ranks = {name: label for label, name in enumerate(names)}
    paths, labels, refused = [], [], []
    for number, image, label in lines:
        name = None if label is None else name_of(label, words)
        if name in ranks:
            paths.append(path.parent / image)
            labels.append(ranks[name])
            continue
        if label is None:
            reason = f"{short(image)} is no path and label"
        elif name is None:
            reason = f"label {short(label)} is no {'word' if words else 'whole number in range'}"
        elif words:
            reason = f"the model has no class {short(name)}"
        else:
            reason = f"label {name} is out of range, {range_of(names, entries)}"
        where = f"{path} line {number}"
        refused.append(SkippedImage(where, f"{where}: {reason}"))
    return check_left(split_of_files(paths, labels, refused), str(path))


def _empty_classes(path: Path, names: Sequence[str], split: Split) -> list[str]:
    """Return a warning if classes are empty, which a wrong label in the lists can cause."""
    if vtab_name(path.parent.resolve().name) in CLASSES:
        return []
    present = set(split.labels)
    empty = [name for label, name in enumerate(names) if label not in present]
    if not empty:
        return []
    return [f"{path} has no image of {len(empty)} of the {len(names)} classes: {some(empty)}"]
