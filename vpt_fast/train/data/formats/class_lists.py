"""Lists of classes that a data set brings: `classes.txt`, a name a line, or `class_to_idx.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vpt_fast.train.data.formats.labels import Pairs, read_json, read_text, short, whole

FILES = ("classes.txt", "class_to_idx.json")


class ClassList(NamedTuple):
    """Names of the classes in the order of the labels, and the file that they stand in."""

    names: list[str]
    path: Path


def class_list(folder: Path) -> ClassList | None:
    """Return the classes that a file in the folder of a data set lists; None without one.

    Raises:
        ValueError: If a file is damaged, names a class twice, skips a number, or the two files
            differ.
    """
    readers = {"classes.txt": _lines, "class_to_idx.json": _numbers}
    found = [
        ClassList(readers[path.name](path), path)
        for path in (folder / name for name in FILES)
        if path.is_file()
    ]
    if len({tuple(one.names) for one in found}) > 1:
        raise ValueError(
            f"{found[0].path} and {found[1].path} have different classes or orders; remove one"
        )
    return found[0] if found else None


def check_listed(names: Sequence[str], listed: ClassList | None) -> None:
    """Raise ValueError if a data set has a class that its list does not name."""
    missing = [] if listed is None else [name for name in names if name not in listed.names]
    if listed is not None and missing:
        raise ValueError(
            f"{listed.path} does not name the class {short(missing[0])}, which has images; add "
            "it, or remove the file"
        )


def unused(names: Sequence[str], labels: set[int], where: str) -> list[str]:
    """Return a warning if classes have no training image.

    Args:
        names: Names of the classes, in the order of the labels.
        labels: Labels of the training images.
        where: Name of the data set, or of its list of classes.
    """
    empty = [name for label, name in enumerate(names) if label not in labels]
    if not empty:
        return []
    which = "; ".join(empty[:3]) + ("; ..." if len(empty) > 3 else "")
    return [f"{where}: {len(empty)} of {len(names)} classes have no training image: {which}"]


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in re.split("\r\n|\r|\n", read_text(path))]
    return _distinct([line for line in lines if line], path)


def _numbers(path: Path) -> list[str]:
    content = read_json(path)
    if not isinstance(content, Pairs):
        raise ValueError(f'{path} holds no {{"class": number}}')
    numbers = [whole(number) for _, number in content]
    if sorted(number for number in numbers if number is not None) != list(range(len(numbers))):
        raise ValueError(f"{path} must give its {len(numbers)} classes the numbers from 0 on")
    names = [name for _, (name, _) in sorted(zip(numbers, content, strict=True))]
    return _distinct(names, path)


def _distinct(names: list[str], path: Path) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} names the class {short(twice)} twice")
    return names
