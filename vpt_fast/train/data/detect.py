"""Format of a data set, told by its files."""

from __future__ import annotations

import re
from pathlib import Path

from vpt_fast.train.common.names import FORMATS, SPLITS
from vpt_fast.train.data.formats.class_folders import class_names, find_images, is_hidden, is_image
from vpt_fast.train.data.formats.csv_files import ENDINGS, split_files
from vpt_fast.train.data.formats.fgvc import is_fgvc
from vpt_fast.train.data.formats.hf import is_hf, is_imagefolder, is_parquet, is_webdataset
from vpt_fast.train.data.formats.refused import refuse_annotations, refuse_content, refuse_file
from vpt_fast.train.data.formats.vtab import is_vtab, vtab_folder
from vpt_fast.train.data.images import find_split

_TESTS = {
    "csv": split_files,
    "vtab": is_vtab,
    "fgvc": is_fgvc,
    "hf": is_hf,
    "webdataset": is_webdataset,
    "imagefolder": is_imagefolder,
    "parquet": is_parquet,
}
# Folders of splits by other names than those that are read, such as Training and test_set.
_LIKE_SPLITS = re.compile("(train|training|val|valid|validation|test|testing|dev|eval)([^a-z].*)?")


def check_format(directory: str | Path, format: str) -> str:
    """Return the format of a data set, detected by its files if it is "auto".

    Args:
        directory: Folder of the data set, or a CSV file.
        format: One of `names.FORMATS`.

    Raises:
        FileNotFoundError: If the directory is missing.
        ValueError: If the format is unknown, could be several, or is none that is read.
    """
    if format not in FORMATS:
        raise ValueError(f"the data format is {format!r}; choose one of {', '.join(FORMATS)}")
    folder = vtab_folder(Path(directory))
    if folder.is_file():
        if folder.suffix.lower() not in ENDINGS:
            refuse_file(folder)
        if format not in ("auto", "csv"):
            raise ValueError(f"{folder} is a file, and --format {format} is a folder")
        return "csv"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data folder {directory}")
    if format == "csv" and not split_files(folder):
        raise FileNotFoundError(f"{folder} has no train.csv; name the CSV file itself")
    return _detect(folder) if format == "auto" else format


def _detect(directory: Path) -> str:
    found = [name for name, test in _TESTS.items() if test(directory)]
    splits = [folder for name in SPLITS if (folder := find_split(directory, name)) is not None]
    # A saved DatasetDict has a folder of files for each split too, and json files may stand beside
    # a folder train/ of images without class folders.
    if any(not found or class_names(folder) for folder in splits):
        found.append("folders")
    if found in ([], ["folders"]) and not any(map(class_names, splits)):
        refuse_annotations(directory)
        if _has_classes(directory, bool(splits)):
            found.append("classes")
    if len(found) > 1:
        raise ValueError(
            f"{directory} could be several formats: {', '.join(found)}; name one with --format"
        )
    if not found:
        _refuse_nothing(directory)
    return found[0] if found else "folders"


def _has_classes(directory: Path, has_splits: bool) -> bool:
    """Return whether at least two folders hold images, and none could be one of a split.

    Raises:
        ValueError: If one could be.
    """
    images = [name for name in class_names(directory) if _holds_images(directory / name)]
    aliases = {alias for names in SPLITS.values() for alias in names}
    if len(images) < 2 or aliases.issuperset(images):
        return False
    like = [name for name in images if _LIKE_SPLITS.fullmatch(name.casefold())]
    nested = [name for name in images if not _holds_images(directory / name, below=False)]
    if not has_splits and (like or nested):
        name = (like or nested)[0]
        raise ValueError(
            f"{directory / name} could be a split or a class; rename it to one of train, val, test,"
            " or say --format classes"
        )
    return True


def _holds_images(folder: Path, below: bool = True) -> bool:
    if any(is_image(e.name) and not is_hidden(e.name) and e.is_file() for e in folder.iterdir()):
        return True
    return below and bool(find_images(folder).images)


def _refuse_nothing(directory: Path) -> None:
    """Refuse a folder in which nothing is found, where it can be said what to name or to do.

    Raises:
        FileNotFoundError: If it holds VTAB sets, or CSV files of other names.
        ValueError: If it holds what is not read.
    """
    entries = [entry for entry in directory.iterdir() if not is_hidden(entry.name)]
    sets = sorted(entry.name for entry in entries if entry.is_dir() and is_vtab(entry))
    if sets:
        raise FileNotFoundError(
            f"{directory} holds VTAB sets; name one: {directory / sets[0]} "
            f"(there are {', '.join(sets)})"
        )
    files = [entry for entry in entries if entry.is_file()]
    tables = sorted(file.name for file in files if file.suffix.lower() in ENDINGS)
    if tables:
        raise FileNotFoundError(
            f"{directory} has no train.csv; name the CSV file itself: {directory / tables[0]} "
            f"(there are {', '.join(tables)})"
        )
    if not any(_holds_images(directory / name) for name in class_names(directory)):
        refuse_content(directory, files)
