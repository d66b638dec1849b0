"""VTAB-1k folders: `<root>/<set>` with lists of images and labels.

The lists are train800.txt, val200.txt, train800val200.txt and test.txt; a line is
`images/train800val200/000000.jpg 307`, a path in the folder and a label from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vpt_fast.train.data import SkippedImage
from vpt_fast.train.split import ImageSource, Split, check_classes, check_left, split_of_files

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
    """Whether the folder has VTAB's lists."""
    return any((directory / name).is_file() for name in ("train800.txt", "val200.txt", WHOLE))


def vtab_name(name: str) -> str:
    """VTAB's own name of a set; other names are returned as they are."""
    return ALIASES.get(name.lower(), name.lower())


def vtab_folder(directory: Path) -> Path:
    """The folder that is meant: the one of that name, or of another name of the same set."""
    if directory.exists():
        return directory
    wanted = vtab_name(directory.name)
    others = [name for name in (*CLASSES, *ALIASES) if vtab_name(name) == wanted]
    folders = [directory.parent / name for name in others]
    return next((folder for folder in folders if folder.is_dir()), directory)


def read_vtab(
    directory: Path, known: Sequence[str] | None = None, whole: bool = False
) -> ImageSource:
    """Reads the lists of a set.

    The number of classes is VTAB's where the folder has the name of one of its sets (or another
    common name of it), else the largest label of all lists + 1. Class names are the labels.

    Args:
        directory: Of the set.
        known: Class names of a trained model.
        whole: Train on train800val200.txt, the 1,000 images, without validation. Otherwise on
            train800.txt, with val200.txt; on the 1,000 images also where train800.txt is missing.

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
    read = {split: _read_list(path) for split, path in files.items() if path.is_file()}
    count = CLASSES.get(vtab_name(directory.resolve().name))
    if count is None:
        count = 1 + max((label for lines, _ in read.values() for *_, label in lines), default=-1)
    names = check_classes([str(label) for label in range(count)], str(directory))
    if known is not None and list(known) != names:
        raise ValueError(
            f"{directory} has the classes 0 to {count - 1}, the model has {len(known)} classes: "
            f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
        )
    splits = {name: _split(files[name], *found, count) for name, found in read.items()}
    warnings = []
    if "train" in splits and lists["train"] == WHOLE and not whole:
        warnings.append(f"no {LISTS['train']}: training on all of {WHOLE}, without validation")
    return ImageSource("vtab", names, splits, warnings)


Lines = list[tuple[int, str, int]]


def _read_list(path: Path) -> tuple[Lines, dict[int, SkippedImage]]:
    """Line number, image and label of each line, and by their numbers the lines that are none."""
    lines: Lines = []
    refused = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        image, _, label = line.strip().rpartition(" ")
        if image and re.fullmatch(r"-?[0-9]+", label):
            lines.append((number, image.strip(), int(label)))
        else:
            where = f"{path} line {number}"
            reason = f"{where}: {line[:80]!r} is no path and label"
            refused[number] = SkippedImage(where, reason)
    return lines, refused


def _split(path: Path, lines: Lines, refused: dict[int, SkippedImage], classes: int) -> Split:
    paths, labels, bad = [], [], dict(refused)
    for number, image, label in lines:
        if 0 <= label < classes:
            paths.append(path.parent / image)
            labels.append(label)
        else:
            where = f"{path} line {number}"
            reason = f"{where}: label {label} is out of range, 0 to {classes - 1}"
            bad[number] = SkippedImage(where, reason)
    found = split_of_files(paths, labels, [bad[number] for number in sorted(bad)])
    return check_left(found, str(path))
