"""Class folders: image files by class, and files that are not read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from vpt_fast.train.data.pictures import EXTENSIONS

# What operating systems and archives leave behind.
_LITTER = ("__macosx", "thumbs.db", "desktop.ini")


class Found(NamedTuple):
    """Paths of images in order, and the number of other files by extension."""

    images: list[str]
    unread: Counter[str]


def is_hidden(name: str) -> bool:
    """Return whether a name is that of a hidden file or of one that a system leaves behind."""
    return name.startswith(".") or name.casefold() in _LITTER


def is_image(name: str) -> bool:
    """Return whether a file is an image that can be read, by its name."""
    return _end(name) in EXTENSIONS


def class_names(folder: Path) -> list[str]:
    """Return the folders in `folder`, sorted as strings.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; it should hold <class>/*")
    return sorted(e.name for e in folder.iterdir() if e.is_dir() and not is_hidden(e.name))


def find_images(folder: Path) -> Found:
    """Return all images below a folder; a folder that several links lead to is read once.

    Raises:
        OSError: If a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    found: list[tuple[str, list[str]]] = []
    unread: Counter[str] = Counter()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        names = [name for name in files if not is_hidden(name)]
        found.append((root, sorted(filter(is_image, names))))
        unread.update(_end(name) for name in names if not is_image(name))
    images = [os.path.join(root, name) for root, names in sorted(found) for name in names]
    return Found(images, unread)


def counted(unread: Mapping[str, int]) -> str:
    """Return the numbers of files that are not read as text, such as "3 .heic, 1 .txt"."""
    return ", ".join(
        f"{count} {end or 'without extension'}" for end, count in sorted(unread.items())
    )


def natural(names: Iterable[str]) -> list[str]:
    """Return the names sorted with numbers within them by their value."""
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.split("([0-9]+)", name)
    # A number sorts by its length and its digits: int() refuses more than 4,300 digits.
    values = [p.lstrip("0") if i % 2 else p for i, p in enumerate(parts)]
    return [(len(v) if i % 2 else 0, v) for i, v in enumerate(values)], name


def _end(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _raise(error: OSError) -> None:
    raise error
