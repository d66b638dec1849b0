"""Duplicate images in a data set, found by the content of their files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

from vpt_fast.train.data.split import Split, some

_HEAD = 2**16
"""Number of bytes that are compared first; most different images differ there."""


def overlap_warnings(splits: Mapping[str, Split], class_names: Sequence[str]) -> list[str]:
    """Return a line for each pair of splits that share images, and for images listed twice.

    Files are equal if they are one file on disk, or have the same content. Rows of a table, which
    are no files, are compared by name.
    """
    names = [name for split in splits.values() for name in split.names]
    keys = iter(_identities(names))
    found: dict[str, dict[Hashable, str]] = {}
    labels: dict[Hashable, set[tuple[int, ...]]] = defaultdict(set)
    some_name: dict[Hashable, str] = {}
    lines = []
    for part, split in splits.items():
        mine: dict[Hashable, str] = {}
        again = []
        for name, label in zip(split.names, split.labels, strict=True):
            key = next(keys)
            labels[key].add(_classes(label))
            some_name.setdefault(key, name)
            if key in mine:
                again.append(name)
            mine[key] = name
        found[part] = mine
        if again:
            lines.append(f"{len(again)} images are in {part} more than once: {some(again)}")
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted(found[other][key] for key in found.get(one, {}).keys() & found.get(other, {}))
        if both:
            lines.append(f"{len(both)} images are in both {one} and {other}: {some(both)}")
    torn = [
        f"{some_name[key]} ({', '.join(_text(label, class_names) for label in sorted(several))})"
        for key, several in labels.items()
        if len(several) > 1
    ]
    if torn:
        lines.append(f"{len(torn)} images have two labels: {some(torn)}")
    return lines


def _classes(label: int | Sequence[int]) -> tuple[int, ...]:
    """Return the classes of a label, or of a row of 0 and 1."""
    return (label,) if isinstance(label, int) else tuple(i for i, has in enumerate(label) if has)


def _text(classes: tuple[int, ...], class_names: Sequence[str]) -> str:
    return " + ".join(class_names[label] for label in classes) or "none"


def _identities(names: Sequence[str]) -> list[Hashable]:
    """Return an identity of each name's file; contents are read only where sizes are equal."""
    files: dict[str, Hashable] = {}
    sizes: dict[int, dict[Hashable, str]] = defaultdict(dict)
    for name in dict.fromkeys(names):
        try:
            status = os.stat(name)
        except (OSError, ValueError):  # a missing file, or a name that no file can have
            files[name] = name
            continue
        files[name] = (status.st_dev, status.st_ino)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            sizes[status.st_size][files[name]] = name
    same: dict[Hashable, Hashable] = {}
    for size, group in sizes.items():
        groups = _alike(group, _HEAD)
        if size > _HEAD:
            groups = [part for group in groups for part in _alike(group, size)]
        for group in groups:
            same |= dict.fromkeys(group, next(iter(group)))
    return [same.get(files[name], files[name]) for name in names]


def _alike(files: dict[Hashable, str], length: int) -> list[dict[Hashable, str]]:
    """Return groups of files that begin with the same `length` bytes."""
    found: dict[bytes, dict[Hashable, str]] = defaultdict(dict)
    for key, name in files.items() if len(files) > 1 else ():
        try:
            with open(name, "rb") as file:
                found[hashlib.sha256(file.read(length)).digest()][key] = name
        except OSError:  # decoding it will report the error
            continue
    return [group for group in found.values() if len(group) > 1]
