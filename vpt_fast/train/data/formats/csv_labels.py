"""Labels in a CSV file: one class a row, several, or a column of 0 and 1 for each class.

A column label, class or target holds one class. So does a column labels, unless its cells have
several names, divided by `;` or `|`; spaces divide whole numbers and the names of a list of
classes, and are refused where they could belong to a name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vpt_fast.train.data.formats.class_lists import ClassList, check_listed
from vpt_fast.train.data.formats.labels import are_words, name_of, short, whole

LABEL_COLUMNS = ("label", "class", "target", "labels")
SEVERAL = "labels"
"""The column that may hold several classes."""
_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}

Entry = tuple[str, Mapping[str, str]]
"""Where a row stands, and its cells by column."""


@dataclass(frozen=True)
class Labels:
    """How the labels of a file are written.

    Attributes:
        column: Column of the labels; None where every class has one.
        divider: What divides several names, or None where there is one.
        words: Whether classes are words rather than whole numbers.
        listed: List of classes of the data set, or None.
        columns: Columns of the classes, where every class has one.
    """

    column: str | None
    divider: str | None
    words: bool
    listed: ClassList | None
    columns: tuple[str, ...] = ()

    @classmethod
    def of_column(
        cls, entries: Sequence[Entry], column: str, listed: ClassList | None, file: str
    ) -> Labels:
        """Return how a column's labels are written.

        Raises:
            ValueError: If spaces could divide names or belong to them, or both ; and | occur.
        """
        cells = [row[column] for _, row in entries]
        divider = _divider(cells, listed, file) if column == SEVERAL else None
        parts = [part for cell in cells for part in _parts(cell, divider)]
        return cls(column, divider, are_words(parts), listed)

    @property
    def several(self) -> bool:
        """Whether an image has any number of the classes."""
        return self.column is None or self.divider is not None

    @property
    def order(self) -> str:
        """What the order of the classes comes from, as `ImageSource.class_order` has it."""
        if self.listed is not None:
            return str(self.listed.path)
        if self.column is None:
            return "columns"
        return "strings" if self.words else "numbers"

    def names(self, rows: Sequence[Mapping[str, str]]) -> list[str]:
        """Return the classes in the order of the labels, of a list or of training rows.

        Raises:
            ValueError: If the list lacks one of them.
        """
        found = self._found(rows)
        check_listed(found, self.listed)
        return found if self.listed is None else list(self.listed.names)

    def known(self, names: Sequence[str], where: Path) -> list[str]:
        """Return the classes of a model.

        Raises:
            ValueError: If one of them has no column.
        """
        missing = [name for name in names if self.column is None and name not in self.columns]
        if missing:
            raise ValueError(f"{where} has no column {short(missing[0])}, a class of the model")
        return list(names)

    def undivided(self, rows: Sequence[Mapping[str, str]], where: str) -> list[str]:
        """Return a warning if names in a column of one class a row look like several."""
        cells = [row[self.column] for row in rows if self.column not in (None, SEVERAL)]
        odd = next((cell for cell in cells if not {";", "|"}.isdisjoint(cell)), None)
        if odd is None:
            return []
        return [
            f"{where}: {short(odd)} in the column {self.column} is the name of one class; several "
            f"are in a column called {SEVERAL}"
        ]

    def _found(self, rows: Sequence[Mapping[str, str]]) -> list[str]:
        """Return the classes of some rows, sorted; columns in their order."""
        if self.column is None:
            return list(self.columns)
        names = {
            self._name(part) for row in rows for part in _parts(row[self.column], self.divider)
        }
        known = [name for name in names if name is not None]
        return sorted(known) if self.words or self._numbers_a_list else sorted(known, key=int)

    def present(self, labels: Sequence[int] | Sequence[Sequence[int]]) -> set[int]:
        """Return the classes that occur in labels, or in rows of 0 and 1."""
        found: set[int] = set()
        for label in labels:
            found |= (
                {label} if isinstance(label, int) else {i for i, has in enumerate(label) if has}
            )
        return found

    def read(
        self, cells: Mapping[str, str], rank: Mapping[str, int], unknown: str
    ) -> int | list[int] | str:
        """Return the label of a row, or a row of 0 and 1; or the reason that it has none.

        Args:
            cells: Cells of the row.
            rank: Label of each class.
            unknown: What is said of other classes, before their name.
        """
        if self.column is None:
            parts = [name for name in self.columns if _BITS[cells[name]]]
            names: list[str | None] = list(parts)
        else:
            parts = _parts(cells[self.column], self.divider)
            names = [self._name(part) for part in parts]
        for part, name in zip(parts, names, strict=True):
            if name is None:
                kind = "word" if self.words else "whole number in range"
                return f"label {short(part)} is no {kind}"
            if name not in rank:
                return f"{unknown} {short(name)}"
        labels = [rank[name] for name in names if name is not None]
        if not self.several:
            return labels[0] if labels else "there is no label"
        return [int(label in labels) for label in range(len(rank))]

    @property
    def _numbers_a_list(self) -> bool:
        """Whether labels are numbers that index a list of classes."""
        return (
            self.listed is not None
            and not self.words
            and not all(whole(name) is not None for name in self.listed.names)
        )

    def _name(self, part: str) -> str | None:
        name = name_of(part, self.words)
        if self.listed is not None and name is not None and self._numbers_a_list:
            number = int(name)
            return self.listed.names[number] if 0 <= number < len(self.listed.names) else None
        return name


def label_column(header: Sequence[str], file: str) -> str | None:
    """Return the column of labels; None if there is none, where every class has a column.

    Raises:
        ValueError: If several could be meant.
    """
    found = [name for name in header if name in LABEL_COLUMNS]
    if len(found) > 1:
        raise ValueError(
            f"{file} has {len(found)} columns of labels ({', '.join(found)}); keep one of them"
        )
    return found[0] if found else None


def class_columns(
    entries: Sequence[Entry], columns: Sequence[str], listed: ClassList | None, file: str
) -> Labels:
    """Return labels of a column for each class.

    Raises:
        ValueError: If there is none, or a cell is neither 0 nor 1.
    """
    for where, row in entries:
        wrong = next((name for name in columns if row[name] not in _BITS), None)
        if wrong is not None:
            raise ValueError(
                f"{where}: {short(row[wrong])} in the column {short(wrong)} is neither 0 nor 1; "
                f"without a column of {', '.join(LABEL_COLUMNS)} every other one is a class"
            )
    if not columns:
        raise ValueError(f"{file} has no column of labels; name it {LABEL_COLUMNS[0]!r}")
    return Labels(None, None, True, listed, tuple(columns))


def _divider(cells: Sequence[str], listed: ClassList | None, file: str) -> str | None:
    """Return what divides the names in the cells of the column labels, or None.

    Raises:
        ValueError: If that is not clear.
    """
    found = [divider for divider in ";|" if any(divider in cell for cell in cells)]
    if len(found) > 1:
        raise ValueError(f"{file} divides labels by both ; and |; write one of them")
    if found:
        return found[0]
    spaced = next((cell for cell in cells if len(cell.split()) > 1), None)
    if spaced is None:
        return None
    words = {word for cell in cells for word in cell.split()}
    if all(whole(word) is not None for word in words) or (
        listed is not None and words <= set(listed.names)
    ):
        return " "
    raise ValueError(
        f"{file} has the labels {short(spaced)}, one name or several; write ; between names, or "
        "call the column label where each row has one"
    )


def _parts(cell: str, divider: str | None) -> list[str]:
    parts = [cell] if divider is None else cell.split(None if divider == " " else divider)
    return [part.strip() for part in parts if part.strip()]
