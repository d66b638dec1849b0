"""Data sets on disk: class folders, VTAB-1k, FGVC json files, Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from vpt_fast.train.common.names import FORMATS, SPLITS
from vpt_fast.train.data.formats.class_folders import class_names
from vpt_fast.train.data.formats.fgvc import is_fgvc, read_fgvc
from vpt_fast.train.data.formats.hf import is_hf, read_hf
from vpt_fast.train.data.formats.vtab import is_vtab, read_vtab, vtab_folder
from vpt_fast.train.data.images import ImageFolders, find_split, require_split
from vpt_fast.train.data.overlaps import overlap_warnings
from vpt_fast.train.data.split import ImageSource, split_of_files


def open_source(
    directory: str | Path, format: str = "auto", known: Sequence[str] | None = None
) -> ImageSource:
    """Open a data set: read its lists and labels but no image.

    Args:
        directory: Folder of the data set. For VTAB the folder of one set; if it is missing, another
            common name of the set is looked for beside it.
        format: One of `FORMATS`; "auto" detects it by the files.
        known: Class names of a trained model. None takes those of the training images.

    Raises:
        FileNotFoundError: If the directory is missing, or train is and `known` is None.
        ValueError: If the format is unknown or could be several, the content cannot be used, or
            the package `datasets` is needed and not installed.
    """
    format = check_format(directory, format)
    folder = vtab_folder(Path(directory))
    if format == "fgvc":
        source = read_fgvc(folder, known)
    elif format == "hf":
        source = read_hf(folder, known)
    elif format == "folders":
        source = read_folders(folder, known)
    else:
        source = read_vtab(folder, known, whole=format == "vtab-1000")
    if not source.splits or (known is None and "train" not in source.splits):
        there = ", ".join(source.splits) or "none"
        raise FileNotFoundError(f"{folder} ({source.format}) has no train split; it has {there}")
    return ImageSource(
        source.format,
        source.class_names,
        source.splits,
        [*source.warnings, *overlap_warnings(source.splits, source.class_names)],
    )


def check_format(directory: str | Path, format: str) -> str:
    """Return the format of a data set, detected by its files if it is "auto".

    Raises:
        FileNotFoundError: If the directory is missing.
        ValueError: If the format is unknown, or could be several.
    """
    if format not in FORMATS:
        raise ValueError(f"the data format is {format!r}; choose one of {', '.join(FORMATS)}")
    folder = vtab_folder(Path(directory))
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data folder {directory}")
    return _detect(folder) if format == "auto" else format


def read_folders(directory: Path, known: Sequence[str] | None = None) -> ImageSource:
    """Read train/<class>/<image>, and val/ and test/ if they exist; see `ImageFolders`."""
    if known is None:
        known = ImageFolders(require_split(directory, "train"), _nothing).classes
    splits, warnings = {}, []
    for name in SPLITS:
        folder = find_split(directory, name)
        if folder is not None:
            images = ImageFolders(folder, _nothing, known)
            splits[name] = split_of_files([path for path, _ in images.samples], images.targets)
            warnings += images.warnings
    return ImageSource("folders", list(known), splits, warnings)


def _nothing(image: Image.Image) -> torch.Tensor:
    """Stand in for a transform: only the lists of the folders are used."""
    return torch.empty(0)


def _detect(directory: Path) -> str:
    tests = {"vtab": is_vtab, "fgvc": is_fgvc, "hf": is_hf}
    found = [name for name, test in tests.items() if test(directory)]
    split_folders = [find_split(directory, name) for name in SPLITS]
    # A saved DatasetDict has a folder of files for each split too, and json files may stand beside
    # a folder train/ of images without class folders.
    if any(f is not None and (not found or _has_folders(f)) for f in split_folders):
        found.append("folders")
    if len(found) > 1:
        raise ValueError(
            f"{directory} could be several formats: {', '.join(found)}; name one with --format"
        )
    if not found:
        sets = sorted(e.name for e in directory.iterdir() if e.is_dir() and is_vtab(e))
        if sets:
            raise FileNotFoundError(
                f"{directory} holds VTAB sets; name one: {directory / sets[0]} "
                f"(there are {', '.join(sets)})"
            )
    return found[0] if found else "folders"


def _has_folders(folder: Path) -> bool:
    return bool(class_names(folder))
