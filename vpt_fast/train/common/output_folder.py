"""Outputs of commands: new, or in place of what an earlier run of the same command wrote."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNFINISHED = re.compile(r"\..+\.writing-[0-9a-f]+(-old)?")
"""Names of what `adapter.atomic` leaves where a process is killed."""


@dataclass(frozen=True)
class Output:
    """What a command writes, and how it is recognised as the command's own.

    Attributes:
        command: Name of the command, for messages.
        is_own: Function of the output's path, a file or a folder, that says whether the command
            wrote it.
        entries: Pattern of the names in a folder; None where the output is a file.
        mark: Name of the entry by which the folder is recognised, which is removed last.
        instead: What else can be done about an earlier run, for messages.
    """

    command: str
    is_own: Callable[[Path], bool]
    entries: re.Pattern[str] | None = None
    mark: str = ""
    instead: str = ""

    def check(self, output: Path, overwrite: bool = False) -> None:
        """Check that the output is new, or may be replaced.

        Args:
            output: Path of the output.
            overwrite: Whether what an earlier run of the command wrote may be replaced.

        Raises:
            FileExistsError: If it may not be, or something else is there.
        """
        if self.is_free(output):
            return
        if output.is_dir() == (self.entries is None):
            kind = "folder" if output.is_dir() else "file"
            raise FileExistsError(f"{output} is a {kind}; choose another --output")
        strange = self._strange(output)
        if strange or not self.is_own(output):
            holds = f" (it holds {strange[0]})" if strange else ""
            raise FileExistsError(
                f"{output} exists and is not of an earlier {self.command}{holds}; choose another "
                "--output"
            )
        if not overwrite:
            raise FileExistsError(
                f"{output} exists, of an earlier {self.command}; choose another --output"
                f"{self.instead}, or replace it with --overwrite"
            )

    def is_free(self, output: Path) -> bool:
        """Return whether nothing is there, or a folder without anything that was finished."""
        if self.entries is not None and output.is_dir():
            return all(_UNFINISHED.fullmatch(entry.name) for entry in output.iterdir())
        return not output.exists()

    def clear(self, folder: Path) -> None:
        """Create the folder, and remove what an earlier run wrote there, the mark last."""
        folder.mkdir(parents=True, exist_ok=True)
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == self.mark):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _strange(self, output: Path) -> list[str]:
        """Return the names of entries in a folder that the command does not write."""
        if self.entries is None:
            return []
        names = sorted(entry.name for entry in output.iterdir())
        return [n for n in names if not (self.entries.fullmatch(n) or _UNFINISHED.fullmatch(n))]


def starts_with(header: Sequence[str], table: str = "") -> Callable[[Path], bool]:
    """Return a function that says whether a CSV file begins with a header.

    Args:
        header: First line of the file.
        table: Name of the file in a folder; "" where the path is that of the file.
    """
    start = ",".join(header).encode()

    def is_own(path: Path) -> bool:
        if not (path / table).is_file():
            return False
        with (path / table).open("rb") as file:
            return file.read(len(start)) == start

    return is_own


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a header line, in UTF-8."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
