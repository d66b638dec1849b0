"""Data sets that Hugging Face `datasets` reads: saved ones, webdataset, imagefolder, parquet.

The package is optional, and imported only here.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from vpt_fast.train.common.names import SPLITS
from vpt_fast.train.data.formats.class_folders import is_hidden, is_image
from vpt_fast.train.data.formats.class_lists import class_list
from vpt_fast.train.data.formats.rows import (
    Table,
    image_column,
    named_splits,
    only,
    source_of,
    table_of,
)
from vpt_fast.train.data.split import ImageSource

LOADERS = ("webdataset", "imagefolder", "parquet")
"""Names of the loaders of `datasets`, which are the formats' names too."""
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_LABELS = ("label", "class", "target", "labels", "cls")
"""Names of a label in a table, and in the .json of a webdataset's sample."""
_PARTS = {name for names in SPLITS.values() for name in names} | {"data"}
"""Folders that files of a data set may be in."""
_MEMBERS = 20
"""Members of an archive that are looked at to tell a webdataset's shard."""


def is_hf(directory: Path) -> bool:
    """Return whether `save_to_disk` wrote the folder."""
    one = (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    return one or (directory / "dataset_dict.json").is_file()


def is_imagefolder(directory: Path) -> bool:
    """Return whether the folder, or that of a split, has a file of metadata."""
    return any(path.name in _METADATA for path in _files(directory, *_METADATA))


def is_parquet(directory: Path) -> bool:
    """Return whether the folder, or that of a split, has parquet files."""
    return any(path.name not in _METADATA for path in _files(directory, ".parquet"))


def is_webdataset(directory: Path) -> bool:
    """Return whether the folder, or that of a split, has tar archives of samples."""
    return any(is_shard(path) for path in _files(directory, ".tar"))


def is_shard(path: Path) -> bool:
    """Return whether a tar archive begins with a sample: an image, and a label beside it."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = [member.name for member in islice(archive, _MEMBERS) if member.isfile()]
    except (tarfile.TarError, OSError):
        return False
    samples: dict[str, set[str]] = {}
    for name in names:
        folder, slash, file = name.rpartition("/")
        key, _, end = file.partition(".")
        samples.setdefault(folder + slash + key, set()).add(end.lower())
    return any(
        not ends.isdisjoint(("cls", "json")) and any(is_image(f"x.{end}") for end in ends)
        for ends in samples.values()
    )


def _files(directory: Path, *ends: str) -> Iterator[Path]:
    """Yield the files of a folder, and of the folders of its splits, whose names end so."""
    folders = [directory, *(directory / name for name in sorted(_PARTS))]
    for folder in filter(Path.is_dir, folders):
        named = [f for f in folder.iterdir() if f.name.endswith(ends) and not is_hidden(f.name)]
        yield from (path for path in sorted(named) if path.is_file())


def read_hf(directory: Path, known: Sequence[str] | None = None) -> ImageSource:
    """Read a saved DatasetDict, or a saved Dataset as the only split, train; see `source_of`.

    Args:
        directory: Folder that `save_to_disk` wrote.
        known: Class names of a trained model, which then define the labels.

    Raises:
        ValueError: If `datasets` is not installed, a column is missing or several could be meant,
            or nothing usable is left.
    """
    loaded: Any = _datasets(directory).load_from_disk(str(directory))
    parts = dict(loaded.items()) if hasattr(loaded, "items") else {"train": loaded}
    tables = {
        split: table_of(rows, f"{directory} {split}")
        for split, rows in named_splits(parts, str(directory)).items()
    }
    return source_of("hf", str(directory), tables, known)


def read_with_loader(
    directory: Path, format: str, known: Sequence[str] | None = None
) -> ImageSource:
    """Read a folder with one of the loaders of `datasets`, which finds its splits by its names.

    Rows of webdataset and parquet are copied to the cache of `datasets`, once.

    Args:
        directory: Folder of the files.
        format: One of `LOADERS`.
        known: Class names of a trained model, which then define the labels.

    Raises:
        ValueError: If `datasets` is not installed or cannot read the files, a column is missing or
            several could be meant, or nothing usable is left.
    """
    datasets = _datasets(directory)
    if format == "webdataset":
        _check_complete(directory)
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(format, data_dir=str(directory))
    except Exception as error:  # loaders raise nearly anything on damaged files
        reason = error.__cause__ or error
        text = " ".join(str(reason).split()) or type(reason).__name__
        raise ValueError(f"{directory} cannot be read as {format}: {text}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    tables = {}
    for split, rows in named_splits(dict(loaded.items()), str(directory)).items():
        where = f"{directory} {split}"
        if format == "webdataset":
            tables[split] = _shards(rows, where)
        else:
            found = table_of(rows, where, _LABELS)
            names = _paths(rows, found.image, where) if format == "imagefolder" else None
            tables[split] = replace(found, labels=_whole(found.labels), names=names)
    return source_of(format, str(directory), tables, known, class_list(directory))


def _check_complete(directory: Path) -> None:
    """Refuse archives that were cut off, of which readers take what is left without a word.

    Raises:
        ValueError: If one lacks the two empty blocks that an archive ends with.
    """
    for path in _files(directory, ".tar"):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            whole = size % tarfile.BLOCKSIZE == 0 and not any(file.read())
        if not whole:
            raise ValueError(f"{path} has no end of a tar archive: it was cut off; copy it again")


def _datasets(directory: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{directory} is read by Hugging Face datasets, which is not installed: "
            "pip install datasets"
        ) from error
    return datasets


def _paths(rows: Any, column: str, where: str) -> list[str]:
    """Return the paths of images that are files, by which they are known in messages."""
    kind = type(rows.features[column])
    stored = rows.select_columns(column).cast_column(column, kind(decode=False))
    paths = [None if image is None else image["path"] for image in stored[column]]
    return [path or f"{where} row {row}" for row, path in enumerate(paths)]


def _shards(rows: Any, where: str) -> Table:
    """Return the table of a webdataset: its labels are in .cls, or in .json under a usual name."""
    names = [f"{url}/{key}" for url, key in zip(rows["__url__"], rows["__key__"], strict=True)]
    if "cls" in rows.features:
        labels = list(rows["cls"])
    elif isinstance(rows.features.get("json"), dict):
        fields = [name for name in rows.features["json"] if name in _LABELS]
        field = only(fields, _LABELS[:1], "label", f"{where} .json", "keep one of them")
        labels = [None if content is None else content[field] for content in rows["json"]]
    else:
        raise ValueError(f"{where} has neither .cls nor .json with a label in its samples")
    image = image_column(rows, where, "keep one image a sample")
    return Table(rows, image, _whole(labels), None, names)


def _whole(labels: Sequence[Any]) -> list[Any]:
    """Return labels with whole numbers for the floats that a missing value makes of a column."""
    return [
        int(label)
        if isinstance(label, float) and math.isfinite(label) and label % 1 == 0
        else label
        for label in labels
    ]
