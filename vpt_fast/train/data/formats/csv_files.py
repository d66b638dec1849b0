"""CSV files of paths and labels, one for the data set or one for each split."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpt_fast.train.common.names import SPLITS
from vpt_fast.train.data.formats.class_lists import ClassList, class_list, unused
from vpt_fast.train.data.formats.csv_labels import (
    LABEL_COLUMNS,
    Labels,
    class_columns,
    label_column,
)
from vpt_fast.train.data.formats.labels import read_text, short
from vpt_fast.train.data.images import SkippedImage
from vpt_fast.train.data.split import (
    ImageSource,
    Split,
    check_classes,
    check_left,
    split_of_files,
)

PATH_COLUMNS = ("path", "file", "filename", "image", "file_name", "filepath")
SPLIT_COLUMN = "split"
ENDINGS = (".csv", ".tsv")
"""Extensions of the files, in lower case."""


@dataclass
class _Rows:
    """Entries of a split: where each stands, its path and its cells; and what is left out."""

    where: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    cells: list[Mapping[str, str]] = field(default_factory=list)
    refused: list[SkippedImage] = field(default_factory=list)

    def refuse(self, where: str, reason: str) -> None:
        self.refused.append(SkippedImage(where, f"{where}: {reason}"))


def split_files(directory: Path) -> dict[str, Path]:
    """Return the files of the splits in a folder, such as train.csv and val.csv."""
    names = {
        split: [f"{name}{end}" for name in aliases for end in ENDINGS]
        for split, aliases in SPLITS.items()
    }
    found = {
        split: next((directory / n for n in several if (directory / n).is_file()), None)
        for split, several in names.items()
    }
    return {split: path for split, path in found.items() if path is not None}


def read_csv(location: Path, known: Sequence[str] | None = None) -> ImageSource:
    """Read a CSV file with a path and a label a row, or train.csv, val.csv and test.csv.

    Columns are separated by commas, semicolons or tabs. One column is named like
    `PATH_COLUMNS`; its paths start at the file's folder. A column `split` divides one file. Labels
    are those of `csv_labels`. The classes are those of the training images, unless the folder has
    a list of classes.

    Args:
        location: The file, or the folder of train.csv.
        known: Class names of a trained model, which then define the labels.

    Raises:
        ValueError: If a file has no such columns, or nothing usable is left.
    """
    files = {"": location} if location.is_file() else split_files(location)
    folder = location.parent if location.is_file() else location
    tables = {split: (path, *_table(path)) for split, path in files.items()}
    column, warnings = _common_column(tables)
    splits: dict[str, _Rows] = {}
    for split, (path, header, lines) in tables.items():
        _collect(path, split, header, lines, splits)
    listed = class_list(folder)
    labels = _labels(splits, column, {path: header for path, header, _ in tables.values()}, listed)
    if known is None:
        rows = [cells for rows in splits.values() for cells in rows.cells]
        names = labels.names(splits["train"].cells if "train" in splits else rows)
    else:
        names = labels.known(known, location)
    warnings += labels.undivided([cells for _, cells in _entries(splits)], str(location))
    unknown = "no training image has the class" if known is None else "the model has no class"
    read = {split: _split(rows, labels, names, unknown) for split, rows in splits.items()}
    refused = [item for split in read.values() for item in split.refused]
    check_classes(names, str(location), refused)
    if known is None and "train" in read:
        warnings += unused(names, labels.present(read["train"].labels), str(location))
    order = labels.order if known is None else "known"
    splits_left = {split: check_left(one, f"{location} {split}") for split, one in read.items()}
    in_order = {split: splits_left[split] for split in SPLITS if split in splits_left}
    return ImageSource("csv", names, in_order, warnings, labels.several, order)


def _common_column(tables: dict[str, Any]) -> tuple[str | None, list[str]]:
    """Return the column of labels that all files have, and leave out a test file without labels.

    Returns:
        The column, or None where every class has one; and warnings.
    """
    found = {split: label_column(header, str(path)) for split, (path, header, _) in tables.items()}
    others = {column for split, column in found.items() if split != "test"}
    if "test" in found and others and found["test"] is None:
        path, header, _ = tables["test"]
        if others != {None} or set(header) <= {*PATH_COLUMNS, SPLIT_COLUMN}:
            del tables["test"], found["test"]
            warnings = [f"{path} has no column of labels: it is left out"]
            return _common_column(tables)[0], warnings
    if len(set(found.values())) > 1:
        which = (f"{tables[s][0]} in {column or 'one a class'}" for s, column in found.items())
        raise ValueError(f"labels are in different columns: {', '.join(which)}; rename them")
    return next(iter(found.values())), []


def _table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the names of the columns, in lower case where they are known, and numbered rows."""
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is no CSV: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty; its first line must name the columns")
    header = [_column(cell) for cell in rows[0][1]]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} has two columns {twice!r}; rename one")
    return header, rows[1:]


def _column(name: str) -> str:
    """Return the name of a column: one that has a meaning in lower case, others as they are."""
    low = name.strip().lower()
    return low if low in (*PATH_COLUMNS, *LABEL_COLUMNS, SPLIT_COLUMN) else name.strip()


def _collect(
    path: Path,
    split: str,
    header: list[str],
    lines: Sequence[tuple[int, list[str]]],
    splits: dict[str, _Rows],
) -> None:
    """Add the rows of a file to the splits that they belong to."""
    paths = [name for name in header if name in PATH_COLUMNS]
    if len(paths) != 1:
        raise ValueError(
            f"{path} has {len(paths)} columns of paths ({', '.join(paths) or 'none'} of "
            f"{', '.join(header)}); the first line must name one {PATH_COLUMNS[0]!r}"
        )
    if split and SPLIT_COLUMN in header:
        raise ValueError(f"{path} has a column 'split' and is the file of one split; remove one")
    aliases = {name: part for part, names in SPLITS.items() for name in names}
    for number, row in lines:
        where = f"{path} line {number}"
        cells = {name: cell.strip() for name, cell in zip(header, row, strict=False)}
        part = split or "train"
        if not split and SPLIT_COLUMN in header and len(row) == len(header):
            part = aliases.get(cells[SPLIT_COLUMN].lower(), "")
        rows = splits.setdefault(part or "train", _Rows())
        if len(row) != len(header):
            rows.refuse(where, f"{len(row)} cells in {len(header)} columns")
        elif not part:
            rows.refuse(where, f"split {short(cells[SPLIT_COLUMN])} is none of {', '.join(SPLITS)}")
        elif not cells[paths[0]]:
            rows.refuse(where, "there is no path")
        else:
            rows.where.append(where)
            rows.paths.append(path.parent / cells[paths[0]])
            rows.cells.append(cells)


def _labels(
    splits: Mapping[str, _Rows],
    column: str | None,
    headers: Mapping[Path, list[str]],
    listed: ClassList | None,
) -> Labels:
    every = [(where, cells) for where, cells in _entries(splits)]
    if column is not None:
        return Labels.of_column(every, column, listed, str(next(iter(headers))))
    columns = {
        path: [n for n in header if n not in (*PATH_COLUMNS, SPLIT_COLUMN)]
        for path, header in headers.items()
    }
    first, *others = columns.items()
    for path, names in others:
        if set(names) != set(first[1]):
            differing = sorted(set(names) ^ set(first[1]))
            raise ValueError(f"{first[0]} and {path} differ in the columns {', '.join(differing)}")
    if listed is not None and set(listed.names) != set(first[1]):
        raise ValueError(f"{listed.path} and the columns of {first[0]} name different classes")
    return class_columns(every, first[1], listed, str(first[0]))


def _entries(splits: Mapping[str, _Rows]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for rows in splits.values():
        yield from zip(rows.where, rows.cells, strict=True)


def _split(rows: _Rows, labels: Labels, names: Sequence[str], unknown: str) -> Split:
    rank = {name: label for label, name in enumerate(names)}
    paths, found, refused = [], [], list(rows.refused)
    for where, path, cells in zip(rows.where, rows.paths, rows.cells, strict=True):
        label = labels.read(cells, rank, unknown)
        if isinstance(label, str):
            refused.append(SkippedImage(where, f"{where}: {label}"))
        else:
            paths.append(path)
            found.append(label)
    return split_of_files(paths, found, refused)
