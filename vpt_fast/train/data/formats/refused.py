"""Data sets that are not read, by what is in their folder or file, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_TABLE = "write a CSV with the columns path and labels, and ; between the classes of an image"
_UNPACK = "unpack it, and name the folder that it holds"
_EXPORT = "save its images as files, and write a CSV with the columns path and label"

_DETECTION = {
    "annotations/*.json": "COCO's annotations of objects",
    "*/_annotations.coco.json": "COCO's annotations of objects",
    "_annotations.coco.json": "COCO's annotations of objects",
    "Annotations/*.xml": "Pascal VOC's annotations of objects",
    "VOCdevkit": "Pascal VOC's annotations of objects",
    "VOC20*/Annotations": "Pascal VOC's annotations of objects",
}
_RECORDS = {
    "*.tfrecord*": "TFRecord files",
    "*/*.tfrecord*": "TFRecord files",
    "data.mdb": "an LMDB database",
    "*/data.mdb": "an LMDB database",
}
_ENDS = {
    (".npz", ".npy"): ("NumPy's arrays", _EXPORT),
    (".mat",): ("a file of MATLAB's", _EXPORT),
    (".h5", ".hdf5"): ("an HDF5 file", _EXPORT),
    (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar"): (
        "an archive",
        _UNPACK,
    ),
    (".tfrecord", ".tfrecords"): ("a TFRecord file", _EXPORT),
    (".mdb",): ("an LMDB database", _EXPORT),
    (".parquet", ".jsonl"): ("one file of a table", "name the folder that it is in"),
    (".json",): ("a json file", f"name the folder of FGVC's json files, or {_TABLE}"),
}
"""Ends of files that are not read, as a data set or as the content of a folder."""


def refuse_annotations(folder: Path) -> None:
    """Refuse a folder that cannot be one of classes, though it may hold folders of images.

    Raises:
        ValueError: If it holds annotations of objects, TFRecord files or an LMDB database.
    """
    for kinds, fix in ((_DETECTION, _TABLE), (_RECORDS, _EXPORT)):
        for pattern, what in kinds.items():
            if any(folder.glob(pattern)):
                raise ValueError(f"{folder} holds {what}, which are not read; {fix}")


def refuse_file(file: Path) -> None:
    """Refuse a file that is no data set.

    Raises:
        ValueError: With what to do.
    """
    what, fix = _kind(file.name) or ("no CSV file", f"name a folder, or {_TABLE}")
    raise ValueError(f"{file} is {what}, which is not read; {fix}")


def refuse_content(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a folder without images for the first of its files that has a way to be read.

    Raises:
        ValueError: If there is such a file.
    """
    for file in sorted(files):
        found = _kind(file.name)
        if found is not None:
            raise ValueError(
                f"{folder} holds {file.name}, {found[0]}, which is not read; {found[1]}"
            )


def _kind(name: str) -> tuple[str, str] | None:
    low = name.lower()
    return next((found for ends, found in _ENDS.items() if low.endswith(ends)), None)
